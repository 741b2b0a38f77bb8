"""MonarchWeightSyncScheme keeps what every scheme keeps, in the driver and between processes."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import PATIENCE_S, row, threads_end

from aioinfer import (
    MonarchInferenceServer,
    MonarchTransport,
    MonarchWeightSyncScheme,
    WeightSyncScheme,
)
from aioinfer.weights.monarch import _MonarchSender

from . import clustered
from .clustered import Host, OneOfEach, OneSnapshot, ThroughAnActor, Trainer
from .models import Uniform
from .suite import Hooks, SchemeConformance, check

pytest.importorskip("monarch.actor")

import monarch.rdma  # noqa: F401  # it changes the warnings' filters
from monarch.actor import this_host

from .monarch_cast import Playing

pytestmark = [
    pytest.mark.xdist_group("monarch"),
    pytest.mark.usefixtures("monarch"),
    pytest.mark.timeout(100),
    # Once per process, and meant for those who have such hardware.
    pytest.mark.filterwarnings("ignore:No ibverbs RDMA hardware"),
]


class Cast(clustered.Cast):
    def __init__(self) -> None:
        self.procs = [this_host().spawn_procs(per_host={"procs": 1}) for _ in range(2)]
        self._host = self.procs[0].spawn("host", Playing, Host)
        self._trainer = self.procs[1].spawn("trainer", Playing, Trainer)
        self.transport = MonarchTransport("direct")

    def call(self, method: str, *args: Any) -> Any:
        return self._host.do.call_one(method, *args).get(timeout=60)

    def train(self, method: str, *args: Any) -> Any:
        return self._trainer.do.call_one(method, *args).get(timeout=60)


@pytest.fixture(scope="module")
def cast(monarch: None) -> Iterator[Cast]:
    cast = Cast()
    yield cast
    for procs in cast.procs:
        with contextlib.suppress(Exception):  # they were killed
            procs.stop().get(timeout=PATIENCE_S)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail a test after which a thread of the library is left.

    In place of the one that looks at descriptors too: Monarch keeps those of its processes for a
    while, and makes some when it is first asked for something.
    """
    yield from threads_end()


class OnMonarch(Hooks):
    def scheme(self, **options: Any) -> MonarchWeightSyncScheme:
        return MonarchWeightSyncScheme(**options)

    def trainer_of(self, scheme: WeightSyncScheme) -> WeightSyncScheme:
        return pickle.loads(pickle.dumps(scheme))


class TestInTheDriver(OnMonarch, SchemeConformance):
    """Trainer and server in the driver, a copy of the scheme at each end."""


class TestThroughAnActor(OnMonarch, ThroughAnActor):
    """The server in an actor, the trainer in the driver."""

    def test_replicas(self, cast: Cast) -> None:
        """A server on a mesh passes its scheme to its replicas, which serve what is sent."""
        model, scheme = Uniform(), self.scheme()
        with (
            self.trainer(scheme, model=model) as trainer,
            MonarchInferenceServer(Uniform, cast.procs[0], weight_sync=scheme) as server,
        ):
            self.joined(trainer)
            client = server.sync_client()
            for version in (1, 2):
                assert len(trainer.send(model=model.set_to(version)).applied) == 1
                assert check(client(row(1)), 0) == version


class _OneSnapshot(OneSnapshot, _MonarchSender):
    pass


class _CarelessScheme(MonarchWeightSyncScheme):
    def _make_sender(self, ticket: Any, weights: Any, overtaken: Any) -> _MonarchSender:
        return _OneSnapshot(self._address, ticket, weights, overtaken)


class TestOneOfEach(OnMonarch, OneOfEach):
    """What is shown once."""

    def careless(self) -> WeightSyncScheme:
        return _CarelessScheme()


def test_without_monarch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Monarch is not installed, the error says what to install."""
    monkeypatch.setitem(sys.modules, "monarch.actor", None)
    with pytest.raises(ImportError, match=r"MonarchWeightSyncScheme needs .*aioinfer\[monarch\]"):
        MonarchWeightSyncScheme()
