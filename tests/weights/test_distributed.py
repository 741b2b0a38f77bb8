"""DistributedWeightSyncScheme keeps what every scheme keeps, over Gloo."""

from __future__ import annotations

import contextlib
import datetime
import gc
import pickle
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from helpers import InThread, row

from aioinfer import DistributedWeightSyncScheme, InferenceServer, WeightSyncScheme
from aioinfer.weights import rendezvous
from aioinfer.weights.distributed import _Buckets, _DistributedSender
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.rendezvous import _DoorbellStore, meet

from .ends import FORK, LEAVES, Death, Ours, TrainersElsewhere, small
from .suite import InAProcess, SchemeConformance, ThroughAProcess, check


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


class Ends(OverGloo):
    deaths = (
        Death(_DoorbellStore, "get", sent=0),
        Death(_DoorbellStore, "met", sent=0),
        Death(_DistributedSender, "write"),
        Death(_Buckets, "pack"),  # after the header
        *[Death(_DistributedSender, "_sent", leaves) for leaves in range(1, LEAVES + 1)],
        Death(_DistributedSender, "_answered", sent=2),
    )

    @pytest.fixture(autouse=True)
    def _impatience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let Gloo try for half a second to connect to an end that died since it said where."""
        monkeypatch.setattr(rendezvous, "_CONNECT_TIMEOUT", datetime.timedelta(seconds=0.1))

    def in_leaves(self, **options: Any) -> DistributedWeightSyncScheme:
        scheme = self.scheme(**options)
        scheme._bucket_nbytes = 64  # a bucket is as large as a leaf
        return scheme

    def at_rest(self) -> bool:
        return not rendezvous._groups  # a child may wait for ever for what Gloo has locked


class TestTrainersElsewhere(Ends, TrainersElsewhere):
    """The trainer in a child of the server's process."""


class TestSiblings(Ends, InAProcess, TrainersElsewhere):
    """Trainer and server each in a process of its own."""


class TestEnds(Ends, Ours):
    """Senders and receivers that come and go."""


def test_a_child_of_a_process_with_a_group() -> None:
    """A child that is forked from a process with both ends of a group neither uses nor ends it."""
    model, scheme = small(), DistributedWeightSyncScheme()
    with InferenceServer(small(), weight_sync=scheme) as server:
        scheme.init_on_sender(model=model)
        scheme.connect(10)
        process = FORK.Process(target=gc.collect)
        process.start()
        process.join(20)
        assert process.exitcode == 0
        assert scheme.send(model=model.set_to(1)).ok
        assert check(server.sync_client()(row(1)), 0) == 1
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
