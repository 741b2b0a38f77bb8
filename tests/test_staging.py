"""Batches that overlap, on a stand-in for a device that does its work when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import InThread, action, all_well, doubling, outcomes, row, rows, until, within
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer import InferenceServer, ModelError, ServerClosedError, ServerDiedError, arguments
from aioinfer.devices import assembly, staging
from aioinfer.testing import RecordingModel


class PuppetLane:
    """Computes at once, writes down what it was asked, and says that work is done when told to."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.allocated: list[int] = []
        self.entered: set[int] = set()
        self.blocked = 0
        self.error: Exception | None = None
        self.refuses: Exception | None = None
        self.lent: list[torch.Tensor] = []
        self._marks = 0
        self._open = threading.Event()
        self._open.set()
        self._steps = threading.Semaphore(0)

    # -- for the test -------------------------------------------------------

    def hold(self) -> None:
        """Nothing is done from now on."""
        self._open.clear()

    def step(self) -> None:
        """The one batch that has been waited for longest is done."""
        self._steps.release()

    def release(self) -> None:
        """Everything is done, and will be."""
        self._open.set()
        self._steps.release()

    # -- for the server -----------------------------------------------------

    def enter(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.entered.add(threading.get_ident())

    def follow(self) -> None:
        self.log.append("follow")

    def lend(self, tensor: torch.Tensor) -> None:
        self.lent.append(tensor)

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.allocated.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    @contextlib.contextmanager
    def copying_in(self) -> Iterator[None]:
        self.log.append("copy in")
        yield

    @contextlib.contextmanager
    def copying_out(self) -> Iterator[None]:
        self.log.append("copy out")
        yield

    def mark(self) -> int:
        self._marks += 1
        self.log.append("mark")
        return self._marks

    def wait_for(self, event: int) -> None:
        assert event == self._marks, "waits for the operation before"
        self.log.append("wait")

    def block_on(self, event: int) -> None:
        self.log.append("block")
        self.blocked += 1
        if not self._open.is_set():
            assert self._steps.acquire(timeout=10.0)
        if self.error is not None:
            raise self.error


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PuppetLane]]:
    """Let the CPU pass for a device with queues; the lanes that servers made."""
    made: list[PuppetLane] = []

    def lane(*_: Any) -> PuppetLane:
        made.append(PuppetLane())
        return made[-1]

    monkeypatch.setattr(assembly, "_lane", lane)
    yield made
    for one in made:
        one.release()


def serve(model: Any, **options: Any) -> InferenceServer:
    return InferenceServer(model, **{"device": "cpu", "output_device": "cpu", **options})


class TestABatch:
    """What one batch comes to."""

    @pytest.mark.parametrize("count", [1, 20])
    async def test_is_a_fixed_number_of_operations(
        self, lanes: list[PuppetLane], count: int
    ) -> None:
        """In this order, whatever the number of requests."""
        order: list[str] = []
        model = TensorDictModule(
            lambda x: (order.append("forward"), x * 2)[1],
            in_keys=["observation"],
            out_keys=["action"],
        )
        async with serve(model) as server:
            (lane,) = lanes
            lane.log = order
            clients = [server.async_client() for _ in range(count)]
            replies = await within(asyncio.gather(*(c(row(i)) for i, c in enumerate(clients))))
        assert [action(reply) for reply in replies] == [2 * i for i in range(count)]
        assert order == [
            *("copy in", "mark", "wait", "forward"),
            *("mark", "copy out", "wait", "mark", "block"),
        ]

    async def test_replies_that_stay_on_the_device(self, lanes: list[PuppetLane]) -> None:
        """They are not copied back, and are there when the caller gets them."""
        async with serve(doubling(), output_device=None) as server:
            reply = await within(server.async_client()(row(2)))
        assert action(reply) == 4
        assert lanes[0].log == ["copy in", "mark", "wait", "mark", "block"]
        assert [lent.data_ptr() for lent in lanes[0].lent] == [reply["action"].data_ptr()]

    async def test_replies_that_stay_and_are_not_plain(self, lanes: list[PuppetLane]) -> None:
        """They are done too when the caller gets them, and their memory is the caller's."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            return TensorDict({"deep": {"action": td["observation"] * 2}}, td.batch_size)

        async with serve(policy, output_device=None) as server:
            client = server.async_client()
            replies = [await within(client(asked)) for asked in (row(2), rows([3, 4]))]
        assert [action(reply["deep"]) for reply in replies] == [4, [6, 8]]
        lent = {tensor.data_ptr() for tensor in lanes[0].lent}
        assert lent >= {reply["deep", "action"].data_ptr() for reply in replies}
        assert lanes[0].log[-2:] == ["mark", "block"]

    async def test_requests_that_are_on_the_device(
        self, lanes: list[PuppetLane], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What their callers have queued is waited for, on the device, before they are read."""
        monkeypatch.setattr(staging, "_HOST", "elsewhere")
        order: list[str] = []

        def policy(td: TensorDictBase) -> TensorDictBase:
            order.append("forward")
            return TensorDict({"action": td["observation"] * 2}, td.batch_size)

        async with serve(policy) as server:
            lanes[0].log = order
            assert action(await within(server.async_client()(row(2)))) == 4
        assert order == ["follow", "forward"]

    @pytest.mark.parametrize("options", [{"collate_fn": torch.stack}, {"output_device": "meta"}])
    async def test_what_is_not_queued(
        self, lanes: list[PuppetLane], options: dict[str, Any]
    ) -> None:
        """It runs on the device's thread all the same."""
        model = RecordingModel()
        async with serve(model, **options) as server:
            await within(server.async_client()(row(1)))
        assert lanes[0].entered == model.threads
        assert "copy in" not in lanes[0].log

    async def test_entries_of_one_size(self, lanes: list[PuppetLane]) -> None:
        """A reply of several entries needs no more than its memory, and waits for nothing else."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            found = {f"action {i}": td["observation"] + i for i in range(5)}
            return TensorDict(found, td.batch_size)

        async with serve(policy, max_batch_size=1, min_batch_size=1) as server:
            (lane,) = lanes
            client = server.async_client()
            lane.hold()
            futures = [client.submit(row(value)) for value in range(8)]
            await until(lambda: lane.log.count("copy out") == 2)
            lane.release()
            replies = await within(asyncio.gather(*futures))
        for value, reply in enumerate(replies):
            found = [reply[f"action {i}"][0].item() for i in range(5)]
            assert found == [value + i for i in range(5)]
        # Two batches are in flight; a third may be gathered before the first has given back.
        assert 2 * (5 + 1) <= len(lane.allocated) <= 3 * (5 + 1)

    async def test_requests_of_every_shape(self, lanes: list[PuppetLane]) -> None:
        """Bare rows, K rows, more rows than a batch, several leaves, small dtypes, padding."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            total = td["image"].float().mean((-1, -2)) + td["flag"]
            return TensorDict({"action": total, "index": td["index"]}, td.batch_size)

        def ask(index: int, count: int) -> TensorDict:
            size = [count] if count else []
            return TensorDict(
                {
                    "image": torch.full((*size, 5, 7), index, dtype=torch.uint8),
                    "flag": torch.ones(size, dtype=torch.bool),
                    "index": torch.full(size, index),
                },
                size,
            )

        async with serve(policy, max_batch_size=8, batch_sizes=[3, 8]) as server:
            client = server.async_client()
            asked = [(i, i % 12) for i in range(40)]
            replies = await within(asyncio.gather(*(client(ask(*one)) for one in asked)))
        for (index, count), reply in zip(asked, replies, strict=True):
            size = [count] if count else []
            assert list(reply.batch_size) == size
            assert (reply["action"] == index + 1).all()
            assert (reply["index"] == index).all()
            assert (reply["policy_version"] == 0).all()
            assert list(reply["policy_version"].shape) == size

    async def test_memory_is_used_again(self, lanes: list[PuppetLane]) -> None:
        """Few buffers, of sizes that double, serve all batches; no reply changes afterwards."""
        async with serve(doubling(), max_batch_size=16) as server:
            client = server.async_client()
            kept = []
            for step in range(60):
                values = [float(step + i) for i in range(1 + step % 16)]
                kept.append((values, await within(client(rows(values)))))
        for values, reply in kept:
            assert action(reply) == [2 * value for value in values]
        (lane,) = lanes
        assert len(lane.allocated) <= 3 * 2 * len(set(lane.allocated))
        assert all(nbytes & (nbytes - 1) == 0 for nbytes in lane.allocated)
        assert max(lane.allocated) == 256  # 16 rows of 12 bytes

    async def test_a_policy_that_keeps_its_batch(self, lanes: list[PuppetLane]) -> None:
        """What it keeps does not change under it."""
        model = RecordingModel()
        async with serve(model) as server:
            client = server.async_client()
            for value in range(6):
                await within(client(row(value)))
        assert [batch["observation"][0, 0].item() for batch in model.batches] == list(range(6))

    @pytest.mark.parametrize("kind", ["nested answer", "nested request", "return_inputs"])
    async def test_what_is_not_plain(self, lanes: list[PuppetLane], kind: str) -> None:
        """It is answered all the same."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            found = td.get(("in", "observation"), None)
            doubled = 2 * (td["observation"] if found is None else found)
            answer = TensorDict({"action": doubled}, td.batch_size)
            return TensorDict({"deep": answer}, td.batch_size) if "answer" in kind else answer

        async with serve(policy, return_inputs=kind == "return_inputs") as server:
            client = server.async_client()
            for value in range(3):
                asked = TensorDict({"in": row(value)}) if kind == "nested request" else row(value)
                reply = await within(client(asked))
                answer = reply["deep"] if "answer" in kind else reply
                assert action(answer) == 2 * value
                if kind == "return_inputs":
                    assert reply["observation"].tolist() == [value] * 3


class TestOverlap:
    """One batch computes while the next is staged."""

    async def test_two_in_flight(self, lanes: list[PuppetLane]) -> None:
        """The second is queued before the first is done; the third is not even chosen."""
        model = RecordingModel()
        async with serve(model, max_batch_size=2, min_batch_size=1) as server:
            (lane,) = lanes
            client = server.async_client()
            lane.hold()
            first = client.submit(row(1))
            await until(lambda: model.batch_sizes == [1])
            second = client.submit(row(2))
            await until(lambda: model.batch_sizes == [1, 1])
            third = [client.submit(row(value)) for value in (3, 4)]
            await until(lambda: server.stats().queue_depth == 2)
            assert not first.done()
            lane.step()
            assert action(await within(first)) == 2
            await until(lambda: model.batch_sizes == [1, 1, 2])
            assert not second.done()
            lane.release()
            replies = await within(asyncio.gather(second, *third))
            assert [action(reply) for reply in replies] == [4, 6, 8]
            assert len(model.threads) == 1
        assert lane.entered == model.threads

    async def test_an_update_waits_for_what_is_in_flight(self, lanes: list[PuppetLane]) -> None:
        """It runs between two batches, on the thread of the forwards; versions stay true."""
        model = RecordingModel()
        async with serve(model) as server:
            (lane,) = lanes
            client = server.async_client()
            lane.hold()
            before = client.submit(row(1))
            await until(lambda: lane.blocked == 1)
            update = asyncio.create_task(server.aupdate_model(lambda m: threading.get_ident()))
            after = client.submit(row(1))
            await until(lambda: server.stats().queue_depth == 0)
            assert not update.done()
            assert model.batch_sizes == [1]
            lane.release()
            assert {await within(update)} == model.threads
            assert (await within(before))["policy_version"] == 0
            assert (await within(after))["policy_version"] == 1

    async def test_many_clients(self, lanes: list[PuppetLane]) -> None:
        """Under load, with updates, everybody gets their own rows."""
        async with serve(doubling(), max_batch_size=4) as server:

            async def actor(number: int) -> None:
                client = server.async_client()
                for step in range(30):
                    value = 100.0 * number + step
                    assert action(await client(row(value))) == 2 * value

            def thread(number: int) -> None:
                client = server.sync_client()
                for step in range(30):
                    value = 1000.0 * number + step
                    assert action(client(row(value))) == 2 * value

            async def trainer() -> None:
                for _ in range(10):
                    await server.aupdate_model(lambda model: None)

            threads = [InThread(thread, number) for number in range(3)]
            await all_well(*(actor(number) for number in range(8)), trainer(), *threads)
            assert server.stats().weight_updates == 10

    async def test_several_devices(self, lanes: list[PuppetLane]) -> None:
        """Each has two in flight, and none has three."""
        forwards: list[int] = []

        class Policy(torch.nn.Module):
            in_keys = ("observation",)
            out_keys = ("action",)

            def forward(self, td: TensorDictBase) -> TensorDictBase:
                forwards.append(threading.get_ident())
                return TensorDict({"action": td["observation"] * 2}, td.batch_size)

        async with serve(
            Policy(), device=None, devices=["cpu", "cpu"], max_batch_size=1, min_batch_size=1
        ) as server:
            client = server.async_client()
            for lane in lanes:
                lane.hold()
            answers = [client.submit(row(value)) for value in range(6)]
            await until(lambda: len(forwards) == 4)
            await until(lambda: server.stats().queue_depth == 2)
            assert sorted(forwards.count(thread) for thread in set(forwards)) == [2, 2]
            for lane in lanes:
                lane.release()
            replies = await within(asyncio.gather(*answers))
        assert [action(reply) for reply in replies] == [2 * value for value in range(6)]


class TestFaults:
    """What fails, when it is queued and when it is waited for."""

    async def test_a_bad_request_fails_alone(self, lanes: list[PuppetLane]) -> None:
        """A forward that raises is repeated until the culprit is found."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        async with serve(model) as server:
            client = server.async_client()
            found = await outcomes(*(client(row(value)) for value in (1, 2, -1, 3)))
        assert [isinstance(outcome, ModelError) for outcome in found] == [False, False, True, False]

    async def test_out_of_memory(self, lanes: list[PuppetLane]) -> None:
        """It is divided, and the limit kept."""
        model = RecordingModel()
        model.fail_when(lambda td: td.batch_size[0] > 3, lambda: torch.OutOfMemoryError("CUDA"))
        async with serve(model) as server:
            client = server.async_client()
            for _ in range(2):
                found = await outcomes(*(client(row(value)) for value in range(6)))
                assert [action(reply) for reply in found] == [2 * value for value in range(6)]
        assert model.batch_sizes.count(6) == 2  # once queued, once to find out

    @pytest.mark.parametrize("when", ["queued", "waited for"])
    async def test_a_device_that_dies(
        self, lanes: list[PuppetLane], when: str, logged_errors: list[str]
    ) -> None:
        """Everybody is told: those in flight, those who wait."""
        model = RecordingModel()
        async with serve(model, max_batch_size=1, min_batch_size=1) as server:
            (lane,) = lanes
            client = server.async_client()
            lane.hold()
            futures = [client.submit(row(value)) for value in range(5)]
            await until(lambda: len(model.batch_sizes) == 2)
            error = RuntimeError("CUDA error: an illegal memory access was encountered")
            if when == "waited for":
                lane.error = error
            else:
                model.fail_when(lambda td: True, lambda: error)
            lane.release()
            found = await outcomes(*futures)
            await until(lambda: not server.is_alive)
        died = [outcome for outcome in found if isinstance(outcome, BaseException)]
        assert [type(error) for error in died] == [ServerDiedError] * len(died)
        assert len(died) == 5 if when == "waited for" else len(died) >= 3
        assert all("illegal memory access" in str(error) for error in died)
        logged_errors.clear()

    async def test_a_device_that_dies_under_replies_that_stay(
        self, lanes: list[PuppetLane], logged_errors: list[str]
    ) -> None:
        """It is found out while they are waited for; nobody hangs."""

        def policy(td: TensorDictBase) -> TensorDictBase:
            return TensorDict({"deep": {"action": td["observation"]}}, td.batch_size)

        async with serve(policy, output_device=None) as server:
            client = server.async_client()
            await within(client(row(1)))
            lanes[0].error = RuntimeError("CUDA error: unspecified launch failure")
            found = await outcomes(*(client(row(value)) for value in range(3)))
            await until(lambda: not server.is_alive)
        assert {type(error) for error in found} <= {ServerDiedError, ServerClosedError}
        assert "unspecified launch failure" in str(found[0])
        logged_errors.clear()

    @pytest.mark.parametrize("warmed_up", [False, True])
    async def test_a_device_that_cannot_be_entered(
        self, lanes: list[PuppetLane], warmed_up: bool, logged_errors: list[str]
    ) -> None:
        """Everybody is told, or the server does not start; it can be started again."""
        server = serve(doubling(), example=row(0) if warmed_up else None)
        (lane,) = lanes
        lane.refuses = RuntimeError("CUDA error: all CUDA-capable devices are busy")
        if warmed_up:
            with pytest.raises(RuntimeError, match="devices are busy"):
                await within(server.__aenter__())
        else:
            async with server:
                found = await outcomes(*(server.async_client()(row(value)) for value in range(3)))
                assert [type(error) for error in found] == [ServerDiedError] * 3
                assert "devices are busy" in str(found[0])
        lane.refuses = None
        async with server:
            assert action(await within(server.async_client()(row(2)))) == 4
        assert len(lane.entered) >= 1
        logged_errors.clear()

    async def test_an_answer_that_is_none(self, lanes: list[PuppetLane]) -> None:
        """A policy that returns something else is an error that says so, as without a device."""
        async with serve(lambda td: td["observation"]) as server:
            (error,) = await outcomes(server.async_client()(row(1)))
        assert isinstance(error, ModelError)
        assert "returned Tensor" in str(error)


class TestLife:
    """Closing, with work in flight."""

    async def test_closing_waits(self, lanes: list[PuppetLane]) -> None:
        """Everything accepted is answered; nothing of the server is left."""
        async with serve(doubling(), max_batch_size=1, min_batch_size=1) as server:
            (lane,) = lanes
            client = server.async_client()
            lane.hold()
            futures = [client.submit(row(value)) for value in range(5)]
            await until(lambda: lane.blocked == 1)
            closing = asyncio.create_task(server.aclose())
            await until(lambda: lane.log.count("copy out") == 2)
            assert not closing.done()
            lane.release()
            await within(closing)
        assert [action(future.result()) for future in futures] == [2 * v for v in range(5)]

    async def test_closing_without_draining(self, lanes: list[PuppetLane]) -> None:
        """Nobody waits for the device."""
        async with serve(doubling(), max_batch_size=1, min_batch_size=1) as server:
            (lane,) = lanes
            client = server.async_client()
            lane.hold()
            futures = [client.submit(row(value)) for value in range(5)]
            await until(lambda: lane.blocked == 1)
            await within(server.aclose(drain=False))
            found = await outcomes(*futures)
            assert [type(error) for error in found] == [ServerClosedError] * 5
            lane.release()

    async def test_again(self, lanes: list[PuppetLane]) -> None:
        """A closed server starts again, with the lane it has."""
        server = serve(doubling())
        for _ in range(3):
            async with server:
                assert action(await within(server.async_client()(row(2)))) == 4
        assert len(lanes) == 1

    async def test_the_cpu_has_no_lane(self) -> None:
        """Nothing of all this is made where there is no device: one thread, as before."""
        before = set(threading.enumerate())
        async with serve(doubling()) as server:
            await within(server.async_client()(row(2)))
            names = [thread.name for thread in set(threading.enumerate()) - before]
            assert names == ["aioinfer-executor"]


def test_which_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number it is the caller's current one; for replies, that of their replica."""
    monkeypatch.setattr(arguments, "_count_of", lambda kind: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    both = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert arguments.device("device", "cuda") == both[1]
    assert arguments.device("device", "cuda:0") == both[0]
    assert assembly._targets("cuda", both) == both
    assert assembly._targets("cuda:0", both) == [both[0]] * 2
    assert assembly._targets(None, both) == [torch.device("cpu")] * 2


async def test_a_forward_costs_what_it_takes_itself(lanes: list[PuppetLane]) -> None:
    """What a batch waits for the one before it is not counted as its own."""
    spans: list[tuple[float, float]] = []
    model = RecordingModel()
    async with serve(model, max_batch_size=1, min_batch_size=1) as server:
        (lane,) = lanes
        ended = server._replicas.run

        def run(batch: Any) -> Callable[[], None]:
            rest = ended(batch)
            assert rest is not None

            def finish() -> None:
                rest()
                spans.append((batch.began_at, batch.answered_at))

            return finish

        assert server._serving is not None
        server._serving._run = run
        client = server.async_client()
        lane.hold()
        futures = [client.submit(row(value)) for value in range(2)]
        await until(lambda: len(model.batch_sizes) == 2)
        lane.release()
        await within(asyncio.gather(*futures))
    (_, first_ended), (second_began, _) = spans
    assert second_began == first_ended
