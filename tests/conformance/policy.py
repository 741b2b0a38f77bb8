"""The policy: updates between batches, sampling modes, devices, several links, figures."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import Any

import pytest
import torch
from helpers import (
    InThread,
    action,
    all_well,
    doubling,
    outcomes,
    row,
    rows,
    sampling,
    seen,
    until,
    within,
)
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.nn.probabilistic import interaction_type

from aioinfer import (
    InferenceServer,
    InferenceTransport,
    InvalidRequestError,
    ModelError,
    ThreadingTransport,
)
from aioinfer.testing import ManualClock, RecordingModel

from .hooks import Hooks


class Scale(torch.nn.Module):
    """action = factor * observation, and two copies of the factor to see a torn update."""

    in_keys = ("observation",)
    out_keys = ("action", "torn")

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.zeros(1))
        self.copy = torch.nn.Parameter(torch.zeros(1))

    def set_to(self, value: float) -> float:
        with torch.no_grad():
            self.factor.fill_(value)
            self.copy.fill_(value)
        return value

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        td["action"] = td["observation"] * self.factor
        td["torn"] = (self.factor - self.copy).expand(*td.batch_size, 1)
        return td


class Policies(Hooks):
    """What the server does with the policy besides calling it."""

    # -- updates ------------------------------------------------------------

    async def test_updates_between_batches(self):
        """Every reply is computed by one whole version, and says which."""
        policy = Scale()
        async with self.serve(policy, max_batch_size=4) as link:
            server = link.server
            over = False
            replies: list[TensorDictBase] = []

            async def actor() -> None:
                client = link.client()
                while not over:
                    replies.append(await client(row(1)))

            def thread() -> None:
                client = link.sync_client()
                while not over:
                    replies.append(client(row(1)))

            actors = [asyncio.create_task(actor()) for _ in range(4)]
            threads = [InThread(thread) for _ in range(2)]
            for version in range(1, 21):
                assert await server.aupdate_model(lambda p, v=version: p.set_to(v)) == version
                assert server.policy_version == version
                asked_after = await link.client()(row(1))
                assert asked_after["policy_version"] >= version
            for version in range(21, 31):
                await InThread(server.update_model, lambda p, v=version: p.set_to(v))
            over = True
            await all_well(*actors, *threads)
            assert server.stats().weight_updates == 30
        assert replies
        for reply in replies:
            assert reply["torn"].item() == 0
            assert action(reply) == reply["policy_version"].item()

    async def test_an_update_waits_for_the_forward(self):
        """An update during a forward happens after it; that batch keeps its version."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client, server = link.client(), link.server
            with model.held():
                before = client.submit(row(0))
                await model.entered()
                update = asyncio.create_task(server.aupdate_model(lambda m: m.batch_sizes))
                thread = InThread(server.update_model, lambda m: m.batch_sizes)
                await thread.blocked()
                assert not update.done()
                assert server.policy_version == 0
            assert (await within(before))["policy_version"] == 0
            assert await within(update) == [1]
            assert await thread == [1]
            assert (await within(client(row(1))))["policy_version"] == 2

    async def test_an_update_that_fails(self):
        """What an update raises comes to its caller alone; the version stays."""

        def broken(policy: Any) -> None:
            raise ZeroDivisionError("no such weights")

        async with self.serve(doubling()) as link:
            server = link.server
            for error in await outcomes(
                server.aupdate_model(broken), InThread(server.update_model, broken)
            ):
                assert type(error) is ZeroDivisionError
            assert server.policy_version == 0
            assert server.stats().weight_updates == 0
            assert action(await within(link.client()(row(1)))) == 2

    async def test_an_update_that_is_no_new_version(self):
        """``mark_weight_update=False`` leaves the version alone."""
        async with self.serve(doubling(), policy_version=5) as link:
            await link.server.aupdate_model(lambda policy: None, mark_weight_update=False)
            assert link.server.policy_version == 5
            await link.server.aupdate_model(lambda policy: None)
            assert link.server.policy_version == 6
            assert (await link.client()(row(1)))["policy_version"] == 6

    async def test_updates_run_where_the_forward_runs(self):
        """Updates and forwards share a thread; gradients are on for one, off for the other."""
        grads = []
        model = RecordingModel(lambda td: (grads.append(torch.is_grad_enabled()), td)[1])
        async with self.serve(model) as link:
            await link.client()(row(1))
            where = await link.server.aupdate_model(
                lambda policy: (threading.get_ident(), torch.is_grad_enabled())
            )
        assert model.threads == {where[0]}
        assert where[0] != threading.get_ident()
        assert where[1]
        assert grads == [False]

    async def test_an_update_of_a_server_that_is_closed(self):
        """A server that does not run can be updated; the next start serves the new version."""
        server = InferenceServer(Scale(), self.transport())
        await within(server.aupdate_model(lambda policy: policy.set_to(1)))
        async with self.running(server) as link:
            reply = await within(link.client()(row(1)))
            assert (action(reply), reply["policy_version"]) == (1, 1)
        await InThread(server.update_model, lambda policy: policy.set_to(2))
        async with self.running(server) as link:
            reply = await within(link.client()(row(1)))
            assert (action(reply), reply["policy_version"]) == (2, 2)

    async def test_an_update_while_a_closed_server_is_stuck(self):
        """An update waits for a last forward that nobody else waits for, without blocking."""
        model = RecordingModel()
        async with self.serve(model) as link:
            with model.held():
                stuck = link.client().submit(row(0))
                await model.entered()
                closing = asyncio.create_task(link.server.aclose(drain=False))
                await outcomes(stuck)
                await within(closing)
                update = asyncio.create_task(link.server.aupdate_model(lambda m: m.batch_sizes))
                await asyncio.wait([update], timeout=0.02)
                assert not update.done()
            assert await within(update) == [1]

    # -- sampling modes -----------------------------------------------------

    async def test_a_sampling_mode_per_request(self):
        """Requests of different modes at the same time are each sampled as they asked."""
        policy = sampling(InteractionType.RANDOM)
        async with self.serve(policy) as link:
            client, sync_client = link.client(), link.sync_client()
            modes = ["deterministic", "random", None, InteractionType.MEAN, "mode"] * 4
            replies = await outcomes(
                *(client(row(3), interaction_type=mode) for mode in modes),
                InThread(sync_client, row(3), interaction_type="deterministic"),
                InThread(sync_client, row(3), interaction_type="random"),
            )
            modes += ["deterministic", "random"]
            for mode, reply in zip(modes, replies, strict=True):
                exact = reply["action"].tolist() == [3, 3, 3]
                assert exact == (mode not in ("random", None)), mode
        assert policy[-1].default_interaction_type is InteractionType.RANDOM

    async def test_modes_do_not_share_a_batch(self):
        """A sampling mode is part of what a batch has in common."""
        policy = sampling()
        sizes = []
        policy[0].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        gate = threading.Event()
        async with self.serve(policy) as link:
            client = link.client()
            update = asyncio.create_task(link.server.aupdate_model(lambda _: gate.wait(10)))
            futures = [
                client.submit(row(1), interaction_type=mode)
                for mode in ("mean", "random", "mean", "random", "mean")
            ]
            await asyncio.sleep(0)
            gate.set()
            await all_well(update, *futures)
        assert sum(sizes) == 5
        assert len(sizes) >= 2

    async def test_the_process_wide_mode_is_left_alone(self):
        """A request's mode does not leak into the mode of the process, nor the other way."""
        seen_during = []
        policy = sampling(InteractionType.RANDOM)
        policy[0].register_forward_hook(lambda *_: seen_during.append(interaction_type()))
        async with self.serve(policy) as link:
            client = link.client()
            await client(row(3), interaction_type="deterministic")
            assert interaction_type() is None
            for mode in (InteractionType.RANDOM, InteractionType.MEAN):
                with set_interaction_type(mode):  # a learner in another thread, say
                    replies = await outcomes(
                        client(row(3), interaction_type="deterministic"),
                        client(row(3), interaction_type="random"),
                    )
                    assert interaction_type() is mode
                assert replies[0]["action"].tolist() == [3, 3, 3]
                assert replies[1]["action"].tolist() != [3, 3, 3]
        assert interaction_type() is None

    async def test_a_mode_that_the_policy_cannot_take(self):
        """A mode for a policy that does not sample is refused, and says so."""
        async with self.serve(doubling()) as link:
            client = link.client()
            for error in await outcomes(
                client(row(1), interaction_type="random"),
                InThread(link.sync_client(), row(1), interaction_type="random"),
            ):
                assert type(error) is InvalidRequestError
                assert "interaction_type" in str(error)
                assert "random" in str(error)
            assert action(await client(row(1))) == 2

    # -- several links ------------------------------------------------------

    async def test_several_transports_on_one_server(self):
        """One server serves callers of several links, in the same batches."""
        own = self.transport() or InferenceTransport.default()
        other = ThreadingTransport()
        model = RecordingModel()
        async with self.running(InferenceServer(model, [own, other])) as link:
            client, thread_client = link.client(), other.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(row(1)), other.async_client().submit(row(2))]
                rest.append(InThread(thread_client, row(3)))
                await link.queued(3)
            replies = await outcomes(first, *rest)
        assert [action(reply) for reply in replies] == [0, 2, 4, 6]
        assert model.batch_sizes == [1, 3]

    # -- collate_fn and devices ---------------------------------------------

    async def test_a_collate_fn_of_its_own(self):
        """``collate_fn`` gets single rows, of every kind of request, and makes the batch."""
        collated = []

        def collate(items: list[TensorDictBase]) -> TensorDictBase:
            collated.append([(list(td.batch_size), td["observation"][0].item()) for td in items])
            batch = torch.stack(items)
            return batch.set("observation", batch["observation"] + 100)

        model = RecordingModel(doubling(), out_keys=["action"])
        async with self.serve(model, collate_fn=collate, max_batch_size=8) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(td) for td in (row(1), rows([2, 3]))]
                await link.queued(3)
            replies = await outcomes(first, *rest)
        assert [action(reply) for reply in replies] == [200, 202, [204, 206]]
        assert collated == [[([], 0)], [([], 1), ([], 2), ([], 3)]]

    async def test_the_collate_fn_of_torchrl(self):
        """TorchRL's default, ``lazy_stack``, can be given."""
        async with self.serve(doubling(), collate_fn=lazy_stack) as link:
            client = link.client()
            replies = await outcomes(client(row(1)), client(rows([2, 3])), client(row(4)))
        assert [action(reply) for reply in replies] == [2, [4, 6], 8]

    async def test_a_collate_fn_that_fails(self):
        """A ``collate_fn`` that raises, or loses rows, is a ModelError; the server goes on."""

        def collate(items: list[TensorDictBase]) -> TensorDictBase:
            if any(td["observation"][0] < 0 for td in items):
                raise ZeroDivisionError("negative")
            return torch.stack([td for td in items if td["observation"][0] != 7] or [row(8)] * 2)

        async with self.serve(doubling(), collate_fn=collate) as link:
            client = link.client()
            good, raising, losing = await outcomes(client(row(1)), client(row(-1)), client(row(7)))
            assert action(good) == 2
            assert type(raising) is ModelError
            self.check_cause(raising, ZeroDivisionError)
            assert type(losing) is ModelError
            assert "collate_fn" in str(losing)
            assert action(await within(client(row(2)))) == 4

    async def test_device(self):
        """``device`` moves the policy and every batch; requests may be anywhere."""
        policy = Scale()
        devices = []
        policy.register_forward_pre_hook(lambda _, inputs: devices.append(inputs[0].device))
        async with self.serve(policy, device="cpu") as link:
            reply = await link.client()(row(1))
            assert reply["action"].device.type == "cpu"
        assert devices == [torch.device("cpu")]
        async with self.serve(policy, device="meta", output_device=None) as link:
            assert policy.factor.device.type == "meta"
            reply = await link.client()(row(1))
            assert reply["action"].device.type == "meta"
        assert devices[-1] == torch.device("meta")

    async def test_output_device(self):
        """``output_device`` moves what callers get, nested entries too."""

        def nested(td: TensorDictBase) -> TensorDictBase:
            return TensorDict({"a": {"b": td["observation"]}}, td.batch_size)

        async with self.serve(doubling(), output_device="meta") as link:
            reply = await link.client()(row(1))
            assert reply["action"].device.type == "meta"
        async with self.serve(nested, output_device="meta") as link:
            reply = await link.client()(row(1))
            assert reply["a", "b"].device.type == "meta"

    # -- figures ------------------------------------------------------------

    async def test_stats_of_known_traffic(self):
        """The figures of known traffic are known, by attribute and by name."""
        clock, model = ManualClock(), RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        async with self.serve(model, clock=clock, timeout=0.0, policy_version=3) as link:
            client, server = link.client(), link.server
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                good = [client.submit(row(1)), client.submit(rows([2, 3, 4]))]
                cancelled = client.submit(row(5))
                late = client.submit(row(6), timeout=0.5)
                await link.queued(6)
                cancelled.cancel()
                clock.advance(1.0)
                await outcomes(late)
                await link.told()
            await all_well(first, *good)
            for td in (row(-1), {}, row(7)):
                await outcomes(client(td))
            await server.aupdate_model(lambda policy: None)
            await until(lambda: server.stats().batches >= 4)
            stats = server.stats()
            assert stats.requests == 7
            assert stats.rows == 4 + 1 + 1 + 1
            assert stats.batches == 4
            assert stats.batch_sizes == {1: 3, 4: 1}
            assert sum(stats.reasons.values()) == 4
            assert stats.avg_batch_size == 7 / 4
            assert (stats.cancelled, stats.timed_out, stats.failed) == (1, 1, 1)
            assert (stats.queue_depth, stats.policy_version, stats.weight_updates) == (0, 4, 1)
            assert stats.p50_queue_ms == stats.p50_forward_ms == 0.0 or stats.p99_queue_ms == 1e3
            assert stats.elapsed_s == 1.0
            assert stats.requests_per_s == 7.0

    async def test_stats_are_a_snapshot(self):
        """A snapshot does not change, can be read like a mapping, and counting goes on."""
        async with self.serve(doubling()) as link:
            client, server = link.client(), link.server
            await client(row(1))
            await until(lambda: server.stats().batches == 1)
            before = server.stats()
            await client(row(2))
            await until(lambda: server.stats()["batches"] == 2)
            assert before.requests == before["requests"] == 1
            assert server.stats().requests == 2
            with pytest.raises(dataclasses.FrozenInstanceError):
                before.requests = 5  # type: ignore[misc]
            with pytest.raises(KeyError):
                before["nonsense"]
            assert dict(before)["avg_batch_size"] == 1
            assert set(before) >= {
                *("requests", "batches", "requests_per_s", "batches_per_s", "avg_batch_size"),
                *("p50_queue_ms", "p95_queue_ms", "p50_forward_ms", "p95_forward_ms"),
                *("policy_version", "weight_updates"),  # TorchRL's
                *("rows", "batch_sizes", "reasons", "queue_depth", "p99_latency_ms"),
                *("cancelled", "timed_out", "refused", "failed"),
            }

    async def test_stats_can_be_reset(self):
        """``stats(reset=True)`` returns what was counted and starts anew."""
        clock, model = ManualClock(), RecordingModel()
        async with self.serve(model, clock=clock, timeout=0.0) as link:
            client, server = link.client(), link.server
            await client(row(1))
            await until(lambda: server.stats().batches == 1)
            clock.advance(2.0)
            assert server.stats(reset=True).requests == 1
            empty = server.stats()
            assert (empty.requests, empty.rows, empty.batches, empty.elapsed_s) == (0, 0, 0, 0)
            assert (empty.batch_sizes, empty.reasons) == ({}, {})
            assert (empty.requests_per_s, empty.avg_batch_size, empty.p99_latency_ms) == (0, 0, 0)
            await client(rows([1, 2]))
            await until(lambda: server.stats().batches == 1)
            assert server.stats().batch_sizes == {2: 1}

    async def test_why_batches_left(self):
        """The reasons say why batches left: full, all clients in, deadline, minimum, closing."""
        clock, model = ManualClock(), RecordingModel()
        options = {"clock": clock, "timeout": 5.0, "max_batch_size": 3, "min_batch_size": 2}
        async with self.serve(model, **options) as link:
            client, server = link.client(), link.server
            lonely = client.submit(row(1))
            await link.queued(1)
            clock.advance(5.0)
            await within(lonely)
            await all_well(client.submit(row(1)), client.submit(row(2)))
            await within(client(rows([1, 2, 3])))
            last = client.submit(row(1))
            await link.queued(1)
            await within(server.aclose())
            await within(last)
            assert server.stats().reasons == {
                "deadline": 1,
                "minimum reached": 1,
                "full": 1,
                "closing": 1,
            }
        async with self.serve(model, clock=clock, timeout=5.0) as link:
            await within(link.client()(row(1)))
            await until(lambda: link.server.stats().reasons == {"all clients in": 1})
        assert seen(model)[-1] == [1]
