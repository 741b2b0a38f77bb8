"""DistributedWeightSyncScheme keeps what every scheme keeps, over Gloo."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from helpers import InThread, row, wait_until

from aioinfer import DistributedWeightSyncScheme, InferenceServer, WeightSyncError, WeightSyncScheme
from aioinfer.weights.distributed import _DistributedSender
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.rendezvous import _DoorbellStore, meet

from .models import Uniform
from .suite import SchemeConformance, ThroughAProcess, check

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def _gloo_has_begun() -> None:
    """Let Gloo make what it makes once per process, and keeps."""
    store = torch.distributed.HashStore()
    torch.distributed.ProcessGroupGloo(store, 0, 1, datetime.timedelta(seconds=5))


class OverGloo:
    def scheme(self, **options: Any) -> DistributedWeightSyncScheme:
        return DistributedWeightSyncScheme(**options)

    def trainer_of(self, scheme: WeightSyncScheme) -> WeightSyncScheme:
        return pickle.loads(pickle.dumps(scheme))


class TestDistributed(OverGloo, SchemeConformance):
    """Both ends in one process."""


class TestThroughAProcess(OverGloo, ThroughAProcess):
    """The server in a process of its own."""

    # These say nothing about processes, and are held above.
    test_arguments = None
    test_awaitable = None
    test_a_cancelled_send = None
    test_receiving_without_a_server = None
    test_compiled_models = None


def small(value: float = 0.0) -> Uniform:
    return Uniform(leaves=3, numel=16, value=value)  # a bucket is as large as a leaf


class Mortal(DistributedWeightSyncScheme):
    """Its trainer is killed once it has sent so many buckets of version 2."""

    _bucket_nbytes = 64

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "buckets": self.buckets}

    def _make_sender(self, *args: Any) -> _DistributedSender:
        sender = super()._make_sender(*args)

        def sent(bucket: int) -> None:
            if sender.version == 2 and bucket + 1 >= self.buckets:
                os.kill(os.getpid(), signal.SIGKILL)

        sender._sent = sent
        return sender


def _train_and_die(scheme: Mortal) -> None:
    model = small()
    scheme.init_on_sender(model=model)
    scheme.connect(10)
    for version in (1, 2):
        scheme.send(model=model.set_to(version))


@pytest.mark.parametrize("buckets", range(1, 4))
def test_a_trainer_that_is_killed(buckets: int) -> None:
    """5: killed after each bucket, the last whole version stays; a new trainer goes on above it."""
    scheme = Mortal(buckets)
    with InferenceServer(small(), weight_sync=scheme) as server:
        client = server.sync_client()
        process = FORK.Process(target=_train_and_die, args=(scheme,))
        process.start()
        process.join(20)
        assert process.exitcode == -signal.SIGKILL
        wait_until(lambda: not server._link._offered.is_set(), "the end to be noticed")
        assert check(client(row(1)), 0) == 1
        scheme.buckets = 10
        model = small()
        scheme.init_on_sender(model=model)
        scheme.connect(10)
        report = scheme.send(model=model.set_to(2))
        assert (report.version, len(report.applied)) == (2, 1)
        assert check(client(row(1)), 1) == 2
        scheme.close()


def test_two_senders_at_once() -> None:
    """9: a second sender of the same scheme is refused."""
    scheme = DistributedWeightSyncScheme()
    scheme.init_on_sender(model=Uniform())
    with pytest.raises(WeightSyncError, match="another sender"):
        pickle.loads(pickle.dumps(scheme)).init_on_sender(model=Uniform())
    scheme.close()


def test_who_does_not_know_the_token() -> None:
    """A process that does not know the token is told nothing."""
    scheme = DistributedWeightSyncScheme()
    scheme.init_on_sender(model=Uniform(value=3), version=3)
    stranger = pickle.loads(pickle.dumps(scheme))
    stranger._address = stranger._address._replace(token=bytes(32))
    with InferenceServer(Uniform(), weight_sync=stranger) as server:
        assert check(server.sync_client()(row(1)), 0) == 0
    assert not scheme._sender.peers
    scheme.close()


@contextlib.contextmanager
def doorbells() -> Iterator[list[Doorbell]]:
    """The two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ends = [socket.create_connection(listener.getsockname()), listener.accept()[0]]
    bells = [Doorbell(end) for end in ends]
    yield bells
    for bell in bells:
        bell.close()


def test_two_ends_meet() -> None:
    """Both come out of it with a group of the two of them, and with nothing left to read."""
    with doorbells() as (first, second):
        meeting = InThread(meet, second, 1)
        sends, receives = meet(first, 0), meeting.result()
        sending = InThread(lambda: sends.send([torch.ones(3)], 1, 0).wait())
        received = torch.zeros(3)
        receives.recv([received], 0, 0).wait()
        sending.result()
        assert received.tolist() == [1, 1, 1]
        first.send("the next message")
        assert second.receive() == ("the next message", None)


@pytest.mark.parametrize("says", [0, 1, 2])
def test_an_end_that_goes_away_while_they_meet(says: int) -> None:
    """The other one is told so at once, however far they had come."""
    with doorbells() as (first, second):
        meeting = InThread(meet, first, 0)
        store = _DoorbellStore(second)
        if says > 0:
            store.get("0/0")
        if says > 1:  # it says that it has met the other one, and never told it where it is
            second.send((None, b""))
        second.shut_down()
        with pytest.raises(ConnectionError):
            meeting.result()
