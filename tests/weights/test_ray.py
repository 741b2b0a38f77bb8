"""RayWeightSyncScheme keeps what every scheme keeps, in the driver and between processes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from helpers import wait_until
from rays import Relays, start_ray
from rays import nothing_left as nothing_left

from aioinfer import RayTransport, RayWeightSyncScheme, WeightSyncScheme
from aioinfer.transports import ray as transports
from aioinfer.weights.ray import _RaySender

from . import clustered
from .clustered import Host, OneOfEach, OneSnapshot, ThroughAnActor, Trainer
from .suite import Hooks, SchemeConformance

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(100)]


@pytest.fixture(scope="module")
def relays() -> Relays:
    start_ray()
    return Relays()


@pytest.fixture(autouse=True)
def _use_relays_again(relays: Relays, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(transports, "_new_relay", relays.take)
    yield
    relays.give_back()


class Cast(clustered.Cast):
    def __init__(self) -> None:
        light = ray.remote(num_cpus=0)
        self._host = light(Host).remote()
        self._trainer = light(Trainer).remote()
        self.transport = RayTransport("direct")

    def call(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self._host, method).remote(*args))

    def train(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self._trainer, method).remote(*args))


@pytest.fixture(scope="module")
def cast(relays: Relays) -> Cast:
    return Cast()


class OnRay(Hooks):
    def scheme(self, **options: Any) -> RayWeightSyncScheme:
        return RayWeightSyncScheme(**options)

    def trainer_of(self, scheme: WeightSyncScheme) -> WeightSyncScheme:
        return pickle.loads(pickle.dumps(scheme))


class TestInTheDriver(OnRay, SchemeConformance):
    """Trainer and server in the driver, a copy of the scheme at each end."""

    def test_nothing_grows(self) -> None:
        """15: 10,000 updates leave no object behind either."""
        before = references()
        super().test_nothing_grows()
        wait_until(lambda: len(references()) <= len(before), "the end of the objects")


def references() -> Any:
    """The objects that the driver refers to."""
    return ray._private.worker.global_worker.core_worker.get_all_reference_counts()


class TestThroughAnActor(OnRay, ThroughAnActor):
    """The server in an actor, the trainer in the driver."""


class _OneSnapshot(OneSnapshot, _RaySender):
    pass


class _CarelessScheme(RayWeightSyncScheme):
    def _make_sender(self, ticket: Any, weights: Any, overtaken: Any) -> _RaySender:
        return _OneSnapshot(self._address, ticket, weights, overtaken)


class TestOneOfEach(OnRay, OneOfEach):
    """What is shown once."""

    def careless(self) -> WeightSyncScheme:
        return _CarelessScheme()


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray is not installed, the error says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"RayWeightSyncScheme needs Ray: .*aioinfer\[ray\]"):
        RayWeightSyncScheme()
