"""SharedMemWeightSyncScheme keeps what every scheme keeps, and what processes add to that."""

from __future__ import annotations

import pickle
from typing import Any

from aioinfer import SharedMemWeightSyncScheme, WeightSyncScheme

from .suite import SchemeConformance, ThroughAProcess


class OnSharedMemory:
    def scheme(self, **options: Any) -> SharedMemWeightSyncScheme:
        return SharedMemWeightSyncScheme(**options)


class TestSharedMemory(OnSharedMemory, SchemeConformance):
    """One object at both ends."""


class TestTwoObjects(OnSharedMemory, SchemeConformance):
    """A copy of the scheme at each end, as after a journey to another process."""

    def trainer_of(self, scheme: WeightSyncScheme) -> WeightSyncScheme:
        return pickle.loads(pickle.dumps(scheme))


class TestInPieces(OnSharedMemory, SchemeConformance):
    """Weights in many pieces, which the reader takes while they are written."""

    def scheme(self, **options: Any) -> SharedMemWeightSyncScheme:
        scheme = SharedMemWeightSyncScheme(**options)
        scheme._piece_nbytes = 700
        return scheme


class TestThroughAProcess(OnSharedMemory, ThroughAProcess):
    """The server in a process of its own."""
