"""Several replicas in one process: who computes what, and that they change together."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from typing import Any

import pytest
import torch
from helpers import InThread, action, all_well, outcomes, row, rows, until, within
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer import InferenceServer, ModelError, ProcessInferenceServer, ServerClosedError
from aioinfer.testing import PuppetExecutor, RecordingModel


class Scale(torch.nn.Module):
    """action = factor * observation, where two copies of the factor show a torn update.

    All replicas share one RecordingModel, which says how many forwards ran at a time.
    """

    in_keys = ("observation",)
    out_keys = ("action", "torn", "where")

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("copy", torch.ones(1), persistent=False)
        self.shared = _Shared()

    def set_to(self, value: float) -> float:
        with torch.no_grad():
            self.factor.fill_(value)
            self.copy.fill_(value)
        return value

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        self.shared.recorder(td.select("observation"))
        size = td.batch_size
        return TensorDict(
            {
                "action": td["observation"] * self.factor,
                "torn": (self.factor - self.copy).expand(*size, 1),
                "where": torch.full(size, threading.get_ident()),
            },
            size,
        )


class _Shared:
    def __init__(self) -> None:
        self.recorder = RecordingModel()

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self


FORK = multiprocessing.get_context("fork")

TWO = ["cpu", "cpu"]


def two_linear() -> TensorDictModule:
    """A policy that a process can make."""
    return TensorDictModule(torch.nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])


class TestFeeding:
    """Whichever is free takes the next batch."""

    async def test_two_forwards_at_a_time(self) -> None:
        """While one replica computes, the other one takes what arrives; a third batch waits."""
        policy = Scale()
        recorder = policy.shared.recorder
        async with InferenceServer(
            policy, devices=TWO, max_batch_size=2, min_batch_size=1
        ) as server:
            client = server.async_client()
            with recorder.held():
                first = client.submit(row(1))
                await recorder.entered()
                second = client.submit(row(2))
                await recorder.entered(forwards=2)
                others = [client.submit(row(value)) for value in (3, 4)]
                await until(lambda: server.stats().queue_depth == 2)
                assert recorder.batch_sizes == [1, 1]
            replies = [await within(future) for future in (first, second, *others)]
        assert [action(reply) for reply in replies] == [1, 2, 3, 4]
        assert recorder.most_at_once == 2
        assert len(recorder.threads) == 2
        assert replies[0]["where"] != replies[1]["where"]
        assert recorder.batch_sizes == [1, 1, 2]

    async def test_a_batch_is_not_split_over_idle_replicas(self) -> None:
        """What a dozen clients ask at the same time is one forward, though two are free."""
        policy = Scale()
        async with InferenceServer(policy, devices=TWO) as server:
            clients = [server.async_client() for _ in range(12)]
            await all_well(*(client(row(1)) for client in clients))
        assert policy.shared.recorder.batch_sizes == [12]

    async def test_every_request_gets_its_own_rows(self) -> None:
        """Under load from coroutines and threads, with requests of several rows."""
        policy = Scale()
        async with InferenceServer(policy, devices=TWO, max_batch_size=4) as server:

            async def actor(number: int) -> None:
                client = server.async_client()
                for step in range(40):
                    value = 100.0 * number + step
                    if step % 4:
                        assert action(await client(row(value))) == value
                    else:
                        values = [value, -value, 3.0, value, value, 5.0]
                        assert action(await client(rows(values))) == values

            def thread(number: int) -> None:
                client = server.sync_client()
                for step in range(40):
                    assert action(client(row(1000.0 * number + step))) == 1000.0 * number + step

            threads = [InThread(thread, number) for number in range(3)]
            await all_well(*(actor(number) for number in range(6)), *threads)

    async def test_a_bad_request_fails_alone(self) -> None:
        """On whichever replica it is."""
        policy = Scale()
        policy.shared.recorder.fail_when(lambda td: bool((td["observation"] < 0).any()))
        async with InferenceServer(policy, devices=TWO, max_batch_size=4) as server:
            client = server.async_client()
            found = await outcomes(*(client(row(i if i % 5 else -1)) for i in range(20)))
        assert [isinstance(outcome, ModelError) for outcome in found] == [
            i % 5 == 0 for i in range(20)
        ]


class TestUpdates:
    """All replicas change, and a reply names the version that computed it."""

    async def test_replies_are_whole_and_labelled(self) -> None:
        """Through 30 updates, every reply is of one version and says which."""
        policy = Scale()
        async with InferenceServer(
            policy, devices=TWO, max_batch_size=2, policy_version=1
        ) as server:
            over = False
            replies: list[TensorDictBase] = []

            async def actor() -> None:
                client = server.async_client()
                while not over:
                    replies.append(await client(row(1)))

            actors = [asyncio.create_task(actor()) for _ in range(8)]
            for version in range(2, 32):
                update = server.aupdate_model if version % 2 else None
                if update is not None:
                    assert await update(lambda p, v=version: p.set_to(v)) == version
                else:
                    await InThread(server.update_model, lambda p, v=version: p.set_to(v))
                assert server.policy_version == version
                asked_after = await server.async_client()(row(1))
                assert action(asked_after) == version
            over = True
            await all_well(*actors)
            assert server.stats().weight_updates == 30
        assert len({reply["where"].item() for reply in replies}) == 2
        for reply in replies:
            assert reply["torn"].item() == 0
            assert action(reply) == reply["policy_version"].item()

    async def test_updates_at_once(self) -> None:
        """Of updates that race, all replicas end with the same one, whole."""
        policy = Scale()
        async with InferenceServer(policy, devices=TWO, max_batch_size=1) as server:
            changes = [server.aupdate_model(lambda p, v=v: p.set_to(v)) for v in range(2, 22)]
            await all_well(*changes)
            clients = [server.async_client() for _ in range(16)]
            replies = [await within(client(row(1))) for client in clients]
            replies += await outcomes(*(client(row(1)) for client in clients))
        assert {action(reply) for reply in replies} == {action(replies[0])}
        assert {reply["torn"].item() for reply in replies} == {0}
        assert {reply["policy_version"].item() for reply in replies} == {20}

    async def test_an_update_that_fails(self) -> None:
        """It comes to its caller, and the replicas stay alike."""

        def broken(policy: Scale) -> None:
            policy.set_to(9)
            raise ZeroDivisionError

        policy = Scale()
        async with InferenceServer(policy, devices=TWO, max_batch_size=1) as server:
            (error,) = await outcomes(server.aupdate_model(broken))
            assert type(error) is ZeroDivisionError
            assert server.policy_version == 0
            clients = [server.async_client() for _ in range(8)]
            replies = await outcomes(*(client(row(1)) for client in clients))
        assert {action(reply) for reply in replies} == {9}

    async def test_an_update_may_not_change_the_parameters_there_are(self) -> None:
        """What the others could not follow is an error that says so."""
        async with InferenceServer(Scale(), devices=TWO) as server:
            update = server.aupdate_model(lambda p: p.register_buffer("new", torch.zeros(1)))
            (error,) = await outcomes(update)
        assert isinstance(error, RuntimeError)
        assert "['new']" in str(error)

    async def test_a_server_that_is_closed(self) -> None:
        """It can be updated, and starts again with all replicas at the new version."""
        policy = Scale()
        server = InferenceServer(policy, devices=TWO, max_batch_size=1)
        await within(server.aupdate_model(lambda p: p.set_to(3)))
        for _ in range(2):
            async with server:
                clients = [server.async_client() for _ in range(8)]
                replies = await outcomes(*(client(row(1)) for client in clients))
                assert {action(reply) for reply in replies} == {3}
                assert {reply["policy_version"].item() for reply in replies} == {1}

    async def test_from_a_forward_it_is_refused(self) -> None:
        """A forward of one replica would wait for the others and for itself."""
        refused: list[BaseException] = []

        class Updating(Scale):
            def forward(self, td: TensorDictBase) -> TensorDictBase:
                try:
                    server.update_model(lambda p: None)
                except RuntimeError as error:
                    refused.append(error)
                return super().forward(td)

        server = InferenceServer(Updating(), devices=TWO)
        async with server:
            await within(server.async_client()(row(1)))
        assert "cannot update all of them" in str(refused[0])


class TestLife:
    """Start, close, arguments."""

    async def test_closing_answers_both(self) -> None:
        """Closing waits for the batches of all replicas."""
        policy = Scale()
        recorder = policy.shared.recorder
        async with InferenceServer(
            policy, devices=TWO, max_batch_size=1, min_batch_size=1
        ) as server:
            client = server.async_client()
            with recorder.held():
                futures = [client.submit(row(value)) for value in (1, 2, 3)]
                await recorder.entered(forwards=2)
                closing = asyncio.create_task(server.aclose())
                await until(lambda: server.stats().queue_depth == 1)
            await within(closing)
            assert [action(future.result()) for future in futures] == [1, 2, 3]

    async def test_closing_without_draining(self) -> None:
        """Nobody hangs on a forward of either."""
        policy = Scale()
        recorder = policy.shared.recorder
        async with InferenceServer(
            policy, devices=TWO, max_batch_size=1, min_batch_size=1
        ) as server:
            client = server.async_client()
            with recorder.held():
                futures = [client.submit(row(value)) for value in (1, 2, 3)]
                await recorder.entered(forwards=2)
                await within(server.aclose(drain=False))
                found = await outcomes(*futures)
        assert [type(error) for error in found] == [ServerClosedError] * 3

    async def test_in_a_process_of_its_own(self) -> None:
        """The options reach the child, which has a thread for each replica."""
        async with ProcessInferenceServer(
            two_linear, ctx=FORK, devices=TWO, max_batch_size=1
        ) as server:
            client = server.async_client()
            replies = await within(asyncio.gather(*(client(row(1)) for _ in range(4))), 60.0)
        assert len({tuple(reply["action"].tolist()) for reply in replies}) == 1

    def test_a_policy_that_cannot_be_copied(self) -> None:
        """A bare callable is refused; there would be one, used by two threads at once."""
        with pytest.raises(TypeError, match="devices needs a model that is an nn.Module"):
            InferenceServer(RecordingModel(), devices=TWO)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"devices": []}, ValueError, "devices must hold at least one device"),
            ({"devices": ["cpu", None]}, ValueError, "devices must hold at least one device"),
            ({"devices": "cpu"}, TypeError, "devices must be a sequence of torch devices"),
            ({"devices": ["cpu", "nowhere"]}, ValueError, "devices must be a torch device"),
            ({"device": "cpu", "devices": TWO}, ValueError, "either device or devices"),
            ({"devices": TWO, "executor": PuppetExecutor()}, ValueError, "executor runs one"),
            ({"device": "cuda:99"}, ValueError, "device must be a device of this machine"),
            ({"output_device": "cuda:99"}, ValueError, "output_device must be a device of this"),
            ({"device": "cpu:1"}, ValueError, "it has 1 cpu device"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        """What cannot be is refused by name."""
        with pytest.raises(error, match=message):
            InferenceServer(Scale(), **options)

    @pytest.mark.parametrize("kind", ["cuda", "mps"])
    @pytest.mark.parametrize("option", ["device", "output_device", "devices"])
    def test_a_device_that_is_not_there(self, kind: str, option: str) -> None:
        """The message says what the machine lacks."""
        if torch.get_device_module(kind).is_available():
            pytest.skip(f"there is a {kind} device")
        value = [kind, kind] if option == "devices" else kind
        with pytest.raises(ValueError, match=f"{option} must be .* it has no {kind} devices"):
            InferenceServer(Scale(), **{option: value})

    async def test_one_device_is_no_pool(self) -> None:
        """``devices`` of one is ``device``."""
        async with InferenceServer(Scale(), devices=["cpu"]) as server:
            assert action(await within(server.async_client()(row(2)))) == 2
