"""SharedMemWeightSyncScheme keeps what every scheme keeps, and what processes add to that."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
from typing import Any

import pytest
from helpers import InThread, row, wait_until

from aioinfer import (
    InferenceServer,
    ProcessInferenceServer,
    SharedMemWeightSyncScheme,
    WeightSyncError,
    WeightSyncScheme,
)
from aioinfer.weights.buffers import Buffer, Pieces
from aioinfer.weights.reading import read
from aioinfer.weights.shared_sender import Sender
from aioinfer.weights.slots import AtHand, Outdated, Slots

from .models import Uniform
from .suite import SchemeConformance, ThroughAProcess, check


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


# -- processes that end ---------------------------------------------------------

FORK = multiprocessing.get_context("fork")
LEAVES = 4


def small(value: float = 0.0) -> Uniform:
    return Uniform(leaves=LEAVES, numel=16, value=value)  # a piece is as large as a leaf


class Mortal(SharedMemWeightSyncScheme):
    """Its trainer is killed once it has written so many leaves of version 2."""

    _piece_nbytes = 64

    def __init__(self, leaves: int) -> None:
        super().__init__()
        self.leaves = leaves

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "leaves": self.leaves}

    def _make_sender(self, ticket: Any, weights: Any, overtaken: Any) -> Sender:
        leaves = self.leaves

        class MortalSender(Sender):
            def _wrote(self, piece: int) -> None:
                if self.version == 2 and piece + 1 >= leaves:
                    os.kill(os.getpid(), signal.SIGKILL)

            def write(self, weights: Any, delivery: Any) -> None:
                if delivery.version == 2 and leaves == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                super().write(weights, delivery)

        return MortalSender(
            self._address, ticket.epoch, weights, ticket.version, overtaken, self._piece_nbytes
        )


def _train_and_die(scheme: Mortal) -> None:
    model = small()
    scheme.init_on_sender(model=model)
    scheme.connect(10)
    for version in (1, 2):
        scheme.send(model=model.set_to(version))


@pytest.mark.parametrize("mode", ["slots", "inplace"])
@pytest.mark.parametrize("leaves", range(LEAVES + 1))
def test_a_trainer_that_is_killed(leaves: int, mode: Any) -> None:
    """5: killed after each leaf, the last whole version stays; a new trainer goes on above it."""
    scheme = Mortal(leaves)
    scheme._taking = dataclasses.replace(scheme._taking, mode=mode)
    with InferenceServer(small(), weight_sync=scheme) as server:
        client = server.sync_client()
        process = FORK.Process(target=_train_and_die, args=(scheme,))
        process.start()
        process.join(20)
        assert process.exitcode == -signal.SIGKILL
        wait_until(lambda: not server._link._offered.is_set(), "the end to be noticed")
        assert check(client(row(1)), 0) == 1
        assert server.stats().weights_refused == 0
        scheme.leaves = LEAVES + 2
        model = small()
        scheme.init_on_sender(model=model)
        scheme.connect(10)
        report = scheme.send(model=model.set_to(2))
        assert (report.version, len(report.applied)) == (2, 1)
        assert check(client(row(1)), 1) == 2
        scheme.close()


def test_a_server_that_is_killed() -> None:
    """6: a stopped server times out, a killed one is gone; no send hangs, the others are served."""
    model, scheme = Uniform(), SharedMemWeightSyncScheme()
    scheme.init_on_sender(model=model)
    process = ProcessInferenceServer(Uniform, ctx=FORK, weight_sync=scheme)
    with process, InferenceServer(Uniform(), weight_sync=scheme) as other:
        wait_until(lambda: len(scheme._sender.peers) == 2)
        assert len(scheme.send(model=model.set_to(1)).applied) == 2
        os.kill(process.pid, signal.SIGSTOP)
        for version in range(2, 50):
            model.set_to(version)
            report = scheme.send(model=model, timeout=0.2 if version == 2 else 0.02)
            assert len(report.timed_out) == 1
        assert check(other.sync_client()(row(1)), 0) >= 48
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: len(scheme._sender.peers) == 1)
        report = scheme.send(model=model.set_to(60), version=60)
        assert report.ok
        assert len(scheme._sender._buffers) <= 3
        # 7: started again, it catches up.
        process.shutdown()
        with process:
            assert check(process.sync_client()(row(1)), 0) == 60
    scheme.close()


def test_a_server_killed_during_a_send() -> None:
    """6: a send that waits for a server which is killed ends, and says so."""
    model, scheme = Uniform(), SharedMemWeightSyncScheme()
    scheme.init_on_sender(model=model)
    with ProcessInferenceServer(Uniform, ctx=FORK, weight_sync=scheme) as process:
        scheme.connect(10)
        os.kill(process.pid, signal.SIGSTOP)
        sending = InThread(scheme.send, model=model.set_to(1))
        wait_until(lambda: any(peer.deliveries for peer in scheme._sender.peers))
        os.kill(process.pid, signal.SIGKILL)
        report = sending.result()
        assert len(report.gone) == 1
        assert not report.ok
    scheme.close()


def test_two_senders_at_once() -> None:
    """9: a second sender of the same scheme is refused, in this process or another."""
    scheme = SharedMemWeightSyncScheme()
    scheme.init_on_sender(model=Uniform())
    with pytest.raises(WeightSyncError, match="another sender"):
        pickle.loads(pickle.dumps(scheme)).init_on_sender(model=Uniform())
    scheme.close()


def test_a_sender_that_was_superseded() -> None:
    """9: of two senders, the one that began later counts, whatever the other one's versions."""
    slots = Slots(Uniform(), 0)
    slots.publish(AtHand(read(Uniform(value=5))), 5, epoch=1)
    slots.publish(AtHand(read(Uniform(value=6))), 6, epoch=2)
    with pytest.raises(Outdated, match="another sender"):
        slots.publish(AtHand(read(Uniform(value=9))), 9, epoch=1)
    assert slots.current.version == 6


def test_a_ticket() -> None:
    """A receiver that was made apart finds the sender by its ticket."""
    sender, receiver = SharedMemWeightSyncScheme(), SharedMemWeightSyncScheme()
    ticket = pickle.loads(pickle.dumps(sender.init_on_sender(model=Uniform(value=3), version=3)))
    assert ticket.address.token.hex() not in repr(ticket)
    receiver.init_on_receiver(ticket)
    with InferenceServer(Uniform(), weight_sync=receiver) as server:
        assert check(server.sync_client()(row(1)), 0) == 3
    sender.close()


def test_who_does_not_know_the_token() -> None:
    """A process that does not know the token is told nothing, and learns nothing."""
    scheme = SharedMemWeightSyncScheme()
    scheme.init_on_sender(model=Uniform(value=3), version=3)
    stranger = pickle.loads(pickle.dumps(scheme))
    stranger._address = stranger._address._replace(token=bytes(32))
    with InferenceServer(Uniform(), weight_sync=stranger) as server:
        assert check(server.sync_client()(row(1)), 0) == 0
    assert not scheme._sender.peers
    scheme.close()


def test_a_scheme_that_is_forgotten() -> None:
    """A sender that nobody refers to any more ends by itself (the test checks what is left)."""
    scheme = SharedMemWeightSyncScheme()
    scheme.init_on_sender(model=Uniform())
    del scheme


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
