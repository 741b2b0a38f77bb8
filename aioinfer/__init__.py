"""Batched inference for reinforcement-learning actors, asyncio first."""

from aioinfer.client import InferenceClient, SyncInferenceClient
from aioinfer.errors import (
    InferenceError,
    InvalidRequestError,
    ModelError,
    QueueFullError,
    ServerClosedError,
    ServerDiedError,
    WeightSyncError,
)
from aioinfer.hosting.monarch import MonarchInferenceServer
from aioinfer.hosting.process import ProcessInferenceServer
from aioinfer.hosting.ray import RayInferenceServer
from aioinfer.server import InferenceServer
from aioinfer.stats import ServerStats
from aioinfer.transports.asyncio import AsyncioTransport
from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.monarch import MonarchTransport
from aioinfer.transports.mp import MPTransport
from aioinfer.transports.ray import RayTransport
from aioinfer.transports.threading import ThreadingTransport
from aioinfer.weights import torchrl as torchrl  # it registers itself
from aioinfer.weights.base import WeightSyncScheme
from aioinfer.weights.delivery import SendReport
from aioinfer.weights.distributed import DistributedWeightSyncScheme
from aioinfer.weights.in_process import InProcessWeightSyncScheme
from aioinfer.weights.mailbox import Staged
from aioinfer.weights.manifest import Manifest
from aioinfer.weights.monarch import MonarchWeightSyncScheme
from aioinfer.weights.ray import RayWeightSyncScheme
from aioinfer.weights.sending import Ticket
from aioinfer.weights.shared_memory import SharedMemWeightSyncScheme

__version__ = "0.1.0"

__all__ = [
    "AsyncioTransport",
    "DistributedWeightSyncScheme",
    "InProcessWeightSyncScheme",
    "InferenceClient",
    "InferenceError",
    "InferenceServer",
    "InferenceTransport",
    "InvalidRequestError",
    "MPTransport",
    "Manifest",
    "ModelError",
    "MonarchInferenceServer",
    "MonarchTransport",
    "MonarchWeightSyncScheme",
    "ProcessInferenceServer",
    "QueueFullError",
    "RayInferenceServer",
    "RayTransport",
    "RayWeightSyncScheme",
    "SendReport",
    "ServerClosedError",
    "ServerDiedError",
    "ServerStats",
    "SharedMemWeightSyncScheme",
    "Staged",
    "SyncInferenceClient",
    "ThreadingTransport",
    "Ticket",
    "WeightSyncError",
    "WeightSyncScheme",
]
