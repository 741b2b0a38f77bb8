"""The slots themselves: who waits for whom, updates by hand, and the order on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from helpers import InThread, outcomes, row, until, within
from tensordict import TensorDictBase
from torch import nn

from aioinfer import InferenceServer, InProcessWeightSyncScheme, WeightSyncError
from aioinfer.testing import ManualClock
from aioinfer.weights.reading import read
from aioinfer.weights.slots import AtHand, Slots
from aioinfer.weights.streams import CudaStreams

from .models import Uniform
from .suite import check


def weights(value: float) -> AtHand:
    return AtHand(read(Uniform(value=value)))


class TestWaiting:
    """The updater waits, the server does not."""

    async def test_an_update_waits_for_its_spare_slot(self) -> None:
        """An update waits for a batch in the spare slot; batches go on with the current one."""
        slots = Slots(Uniform(), 0)
        slots.publish(weights(1), 1)
        old = slots.take()
        slots.publish(weights(2), 2)  # into the slot that is free
        held = old
        assert held is not slots.current
        publishing = InThread(slots.publish, weights(3), 3)
        await publishing.blocked()
        current = slots.take()
        assert current.version == 2
        slots.give_back(current)
        assert {w[0].item() for w in held.model.weights} == {1}
        slots.give_back(held)
        await publishing
        assert slots.current.version == 3
        assert slots.current is held

    def test_a_batch_that_never_ends(self) -> None:
        """Waiting for it ends with the timeout, and changes nothing."""
        slots = Slots(Uniform(), 0)
        slots.publish(weights(1), 1)
        slots.take()
        slots.publish(weights(2), 2)
        with pytest.raises(TimeoutError):
            slots.publish(weights(3), 3, timeout=0.01)
        assert slots.current.version == 2

    def test_addresses_stay(self) -> None:
        """The parameters of a slot stay where they are, as a captured graph needs it."""
        slots = Slots(Uniform(), 0)
        seen = set()
        for version in range(1, 7):
            slots.publish(weights(version), version)
            slot = slots.current
            seen.add((id(slot), tuple(w.data_ptr() for w in slot.model.weights)))
        assert len(seen) == 2

    def test_a_call_is_prepared_once_per_slot(self) -> None:
        """What a forward calls is made of each slot's model, and made anew only with the slot."""
        made: list[Any] = []
        slots = Slots(Uniform(), 0, prepare=lambda model: made.append(model) or model)
        for version in range(1, 7):
            slots.publish(weights(version), version)
        assert len(made) == 2
        slots.update(lambda model: model.set_to(9), mark=True)
        assert len(made) == 2
        slots.publish(weights(10), 10)  # whatever the update changed is in both from now on
        assert len(made) == 3
        slots.update(lambda model: model.weights.append(nn.Parameter(torch.ones(1))), mark=True)
        assert len(made) == 4  # the addresses are others


class TestUpdatesByHand:
    """``update_model`` beside a scheme."""

    def test_both(self) -> None:
        """Updates by hand and weights that are sent take turns, each with a version above."""
        scheme, model = InProcessWeightSyncScheme(), Uniform()
        scheme.init_on_sender(model=model)
        with InferenceServer(model, weight_sync=scheme) as server:
            client = server.sync_client()
            for version in range(1, 10, 3):
                server.update_model(lambda policy, v=version: policy.set_to(v) and None)
                assert check(client(row(1)), 0) == version
                for more in (1, 2):
                    report = scheme.send(model=model.set_to(version + more))
                    assert report.version == version + more
                    assert check(client(row(1)), 0) == version + more
            assert model is not server.model
        scheme.close()

    def test_what_is_no_weight_is_kept(self) -> None:
        """What an update by hand changed besides weights holds after the next flip, too."""
        scheme, model = InProcessWeightSyncScheme(), Uniform()
        scheme.init_on_sender(model=model)
        with InferenceServer(Uniform(), weight_sync=scheme) as server:
            scheme.send(model=model)
            server.update_model(lambda policy: policy.eval())
            for _ in range(3):
                scheme.send(model=model)
                assert not server.model.training
        scheme.close()

    def test_a_policy_that_cannot_be_copied(self) -> None:
        """The error says what does without a copy."""
        policy = Uniform()
        policy.lock = __import__("threading").Lock()
        with pytest.raises(WeightSyncError, match="inplace"):
            InferenceServer(policy, weight_sync=InProcessWeightSyncScheme())


class TestStaleness:
    """15: each policy, on a clock that stands still."""

    @contextlib.asynccontextmanager
    async def served(self, **options: Any) -> Any:
        scheme, model = InProcessWeightSyncScheme(), Uniform()
        scheme.init_on_sender(model=model)
        server = InferenceServer(Uniform(), weight_sync=scheme, timeout=0.0, **options)
        async with server:
            yield server, scheme, model
        scheme.close()

    async def test_reject(self) -> None:
        """``"reject"``: requests fail while the weights are too far behind, and then do not."""
        async with self.served(max_staleness=1) as (server, scheme, model):
            client = server.async_client()
            server._weights.announce(1)
            assert check(await within(client(row(1))), 0) == 0
            server._weights.announce(2)
            for error in await outcomes(client(row(1)), client(row(1))):
                assert type(error) is WeightSyncError
                assert "version 0" in str(error)
                assert "max_staleness=1" in str(error)
            assert server.stats().policy_staleness == 2
            await scheme.asend(model=model.set_to(1))
            assert check(await within(client(row(1))), 0) == 1
            assert server.stats().failed == 2

    async def test_wait(self) -> None:
        """``"wait"``: requests wait for newer weights, or for their own timeout."""
        options = {"max_staleness": 0, "staleness_policy": "wait"}
        async with self.served(**options) as (server, scheme, model):
            client = server.async_client()
            server._weights.announce(1)
            patient = [client.submit(row(1)) for _ in range(3)]
            with pytest.raises(TimeoutError):
                await within(client(row(1), timeout=0.05))
            assert not any(future.done() for future in patient)
            await scheme.asend(model=model.set_to(1))
            for future in patient:
                assert check(await within(future), 0) == 1
            # A server that closes waits for no weights.
            server._weights.announce(2)
            last = client.submit(row(1))
            await until(lambda: server.stats().queue_depth == 1)
            await within(server.aclose())
            (error,) = await outcomes(last)
            assert type(error) is WeightSyncError

    async def test_tag(self) -> None:
        """``"tag"``: every reply says whether its weights were too old, whatever its form."""
        options = {"max_staleness": 0, "staleness_policy": "tag", "max_batch_size": 1}
        async with self.served(**options) as (server, scheme, model):
            client = server.async_client()
            for stale in (False, True):
                server._weights.announce(int(stale))
                reply = await within(client(row(1)))
                assert reply["policy_stale"].item() is stale
                assert reply["policy_stale"].dtype == torch.bool
            await scheme.asend(model=model.set_to(1))
            assert (await within(client(row(1))))["policy_stale"].item() is False

    async def test_age(self) -> None:
        """``max_age_s``: the same for weights that have been in service for too long."""
        clock = ManualClock()
        async with self.served(max_age_s=10.0, clock=clock) as (server, scheme, model):
            client = server.async_client()
            clock.advance(10.0)
            assert check(await within(client(row(1))), 0) == 0
            clock.advance(0.5)
            (error,) = await outcomes(client(row(1)))
            assert type(error) is WeightSyncError
            assert "max_age_s=10.0" in str(error)
            assert server.stats().policy_age_s == 10.5
            await scheme.asend(model=model.set_to(1))
            assert check(await within(client(row(1))), 0) == 1
            clock.advance(10.5)
            await server.aupdate_model(lambda policy: policy.set_to(2))
            assert check(await within(client(row(1))), 0) == 2

    def test_arguments(self) -> None:
        """Limits and policies are checked."""
        for wrong in ({"max_staleness": -1}, {"max_age_s": -1.0}, {"staleness_policy": "no"}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                InferenceServer(Uniform(), **wrong)
        with pytest.raises(TypeError, match="max_staleness"):
            InferenceServer(Uniform(), max_staleness=1.5)


class Ordering(FakeCuda):
    """And as much as orders what they do."""

    def __init__(self) -> None:
        super().__init__("serving", "side")

    def Event(self) -> Any:
        cuda = self

        class Event:
            of = "nothing"

            def record(self, stream: Any) -> None:
                self.of = f"an event of {stream}"
                cuda.calls.append(f"{stream} records")

        return Event()


def test_the_order_on_a_device() -> None:
    """A copy waits for the slot's last forward, the next forward for the copy: on the device."""
    cuda = Ordering()
    slots = Slots(Uniform(), 0, streams=CudaStreams(torch.device("cpu"), cuda))
    slots.publish(weights(1), 1)
    slots.give_back(slots.take())
    slots.publish(weights(2), 2)
    slots.give_back(slots.take())
    cuda.calls.clear()

    class Watched(AtHand):
        def copy_into(self, targets: Any, *, whole: bool) -> None:
            assert str(cuda.now) == "side"
            cuda.calls.append("copy")
            super().copy_into(targets, whole=whole)

    slots.publish(Watched(read(Uniform(value=3))), 3)
    assert cuda.calls == [
        "side waits for serving",  # an optimiser's step may still be on its way
        "side waits for an event of serving",  # the last forward that used this slot
        "copy",
        "side records",
        "serving waits for an event of side",  # the next step must not change what is copied
    ]
    cuda.calls.clear()
    slot = slots.take()
    slots.give_back(slot)
    assert cuda.calls == ["serving waits for an event of side", "serving records"]
    assert slot.version == 3


def test_who_uses_a_slot_on_a_device() -> None:
    """A copy waits for all of them: a replica on another thread may read it too."""
    cuda = Ordering()
    slots = Slots(Uniform(), 0, streams=CudaStreams(torch.device("cpu"), cuda))
    slots.publish(weights(1), 1)
    slots.give_back(slots.take())
    serving, cuda.now = cuda.now, cuda.named("follower")
    slots.give_back(slots.take())
    cuda.now = serving
    slots.publish(weights(2), 2)
    cuda.calls.clear()
    slots.publish(weights(3), 3)
    assert cuda.calls[1:3] == [
        "side waits for an event of serving",
        "side waits for an event of follower",
    ]


def test_a_policy_on_a_device_is_there_before_it_is_used() -> None:
    """The first forward waits for what made the policy, on whatever stream that was."""
    cuda = Ordering()
    cuda.now = cuda.named("building")
    slots = Slots(Uniform(), 0, streams=CudaStreams(torch.device("cpu"), cuda))
    cuda.now = cuda.named("serving")
    cuda.calls.clear()
    slots.take()
    assert cuda.calls == ["serving waits for an event of building"]


@pytest.mark.parametrize("mode", ["by hand", "inplace"])
def test_weights_that_the_forward_thread_writes_on_a_device(mode: str) -> None:
    """They are read once the caller has computed them, and before the caller goes on."""
    cuda = Ordering()
    caller = cuda.named("trainer")

    def between(function: Callable[[], Any]) -> Future[Any]:
        cuda.now = cuda.named("serving")
        future: Future[Any] = Future()
        future.set_result(function())
        cuda.now = caller
        return future

    streams = CudaStreams(torch.device("cpu"), cuda)
    slots = Slots(Uniform(), 0, between=between, streams=streams)
    cuda.now = caller
    cuda.calls.clear()
    if mode == "inplace":
        slots.publish(weights(1), 1, mode="inplace")
    else:
        between(slots.after_caller(lambda: slots.update(lambda model: None, mark=True)))
    assert cuda.calls[:2] == ["trainer records", "serving waits for an event of trainer"]
    assert cuda.calls[-1] == "the thread waits for serving"
    assert slots.current.version == 1


async def test_both_slots_are_warmed_up() -> None:
    """What an example is for, such as compiling, is done for the weights to come, too."""
    seen: list[tuple[int, int]] = []

    class Policy(Uniform):
        def forward(self, td: TensorDictBase) -> TensorDictBase:
            seen.append((id(self), td.batch_size[0]))
            return super().forward(td)

    scheme = InProcessWeightSyncScheme()
    scheme.init_on_sender(model=Uniform())
    async with InferenceServer(
        Policy(), weight_sync=scheme, batch_sizes=[2, 4], max_batch_size=4, example=row(0)
    ):
        assert [size for _, size in seen] == [4, 4, 2, 2]
        assert len({slot for slot, _ in seen}) == 2
    scheme.close()


def test_no_batch_waits_for_the_spare_slot() -> None:
    """A server with a scheme has both slots from the beginning: no forward waits for a copy."""
    scheme = InProcessWeightSyncScheme()
    scheme.init_on_sender(model=Uniform())
    server = InferenceServer(Uniform(), weight_sync=scheme)
    assert server._slots._spare is not None
    assert InferenceServer(Uniform())._slots._spare is None
    scheme.close()
