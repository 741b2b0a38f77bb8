"""Batched inference for reinforcement-learning actors, asyncio first."""

from aioinfer.client import InferenceClient, SyncInferenceClient
from aioinfer.errors import (
    InferenceError,
    InvalidRequestError,
    ModelError,
    QueueFullError,
    ServerClosedError,
    ServerDiedError,
)
from aioinfer.monarch_server import MonarchInferenceServer
from aioinfer.process import ProcessInferenceServer
from aioinfer.server import InferenceServer
from aioinfer.stats import ServerStats
from aioinfer.transports.asyncio import AsyncioTransport
from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.monarch import MonarchTransport
from aioinfer.transports.mp import MPTransport
from aioinfer.transports.ray import RayTransport
from aioinfer.transports.threading import ThreadingTransport

__version__ = "0.1.0"

__all__ = [
    "AsyncioTransport",
    "InferenceClient",
    "InferenceError",
    "InferenceServer",
    "InferenceTransport",
    "InvalidRequestError",
    "MPTransport",
    "ModelError",
    "MonarchInferenceServer",
    "MonarchTransport",
    "ProcessInferenceServer",
    "QueueFullError",
    "RayTransport",
    "ServerClosedError",
    "ServerDiedError",
    "ServerStats",
    "SyncInferenceClient",
    "ThreadingTransport",
]
