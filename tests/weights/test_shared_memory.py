"""SharedMemWeightSyncScheme keeps what every scheme keeps, and what processes add to that."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from helpers import row, wait_until

from aioinfer import InferenceServer, SharedMemWeightSyncScheme, WeightSyncScheme
from aioinfer.weights import hub
from aioinfer.weights.buffers import Buffer, Pieces
from aioinfer.weights.reading import read
from aioinfer.weights.shared_sender import Sender
from aioinfer.weights.slots import AtHand, Outdated, Slots

from .ends import LEAVES, Death, Ours, TrainersElsewhere
from .models import Uniform
from .suite import InAProcess, SchemeConformance, ThroughAProcess, check


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


class Ends(OnSharedMemory):
    deaths = (
        Death(Sender, "_welcome", sent=0),
        Death(Sender, "write"),
        *[Death(Sender, "_wrote", leaves) for leaves in range(1, LEAVES + 1)],
        Death(Sender, "_answered", sent=2),
    )

    def in_leaves(self, **options: Any) -> SharedMemWeightSyncScheme:
        scheme = self.scheme(**options)
        scheme._piece_nbytes = 64  # a piece is as large as a leaf
        return scheme


class TestTrainersElsewhere(Ends, TrainersElsewhere):
    """The trainer in a child of the server's process."""


class TestSiblings(Ends, InAProcess, TrainersElsewhere):
    """Trainer and server each in a process of its own."""


class TestEnds(Ends, Ours):
    """Senders and receivers that come and go."""

    def check_sender(self, trainer: Any) -> None:
        assert len(trainer._sender._buffers) <= 3

    def test_many_who_say_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of those who connect and say nothing the oldest give way, so a receiver gets through."""
        monkeypatch.setattr(hub, "MAX_HALF_OPEN", 8)
        scheme = self.scheme()
        scheme.init_on_sender(model=Uniform(value=3), version=3)
        silent = [scheme._address.connect() for _ in range(100)]
        wait_until(lambda: len(scheme._sender._half_open) == 8)
        receiver = pickle.loads(pickle.dumps(scheme))
        with InferenceServer(Uniform(), weight_sync=receiver) as server:
            assert check(server.sync_client()(row(1)), 0) == 3
            wait_until(lambda: len(scheme._sender._doorbells) <= 8 + 1)
        scheme.close()
        for connection in silent:
            connection.close()


def test_a_sender_that_was_superseded() -> None:
    """9: of two senders, the one that began later counts, whatever the other one's versions."""
    slots = Slots(Uniform(), 0)
    slots.publish(AtHand(read(Uniform(value=5))), 5, epoch=1)
    slots.publish(AtHand(read(Uniform(value=6))), 6, epoch=2)
    with pytest.raises(Outdated, match="another sender"):
        slots.publish(AtHand(read(Uniform(value=9))), 9, epoch=1)
    assert slots.current.version == 6


def test_a_writer_ahead_of_its_reader() -> None:
    """A buffer that was written again while it was read is not served."""
    pieces = Pieces(read(Uniform()).manifest)
    buffer = Buffer(pieces)
    sequence = buffer.begin()
    buffer.write(0, read(Uniform(value=1)).tensors)
    assert not buffer.is_still(sequence)
    buffer.end()
    assert buffer.is_still(sequence)
    buffer.begin()
    assert not buffer.is_still(sequence)
    buffer.close()
