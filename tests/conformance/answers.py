"""The right rows to the right caller."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from helpers import InThread, action, all_well, doubling, outcomes, row, rows, seen, within
from tensordict import TensorDict

from aioinfer import ModelError
from aioinfer.testing import RecordingModel

from .hooks import Hooks


class Answers(Hooks):
    """Who gets what."""

    async def test_each_coroutine_gets_its_own_answers(self):
        """32 coroutines, each with a client of its own, get their own rows, step after step."""
        async with self.serve(doubling(), max_batch_size=16) as link:

            async def actor(number: int) -> None:
                client = link.client()
                for step in range(10):
                    value = 100 * number + step
                    assert action(await client(row(value))) == 2 * value

            await within(asyncio.gather(*(actor(number) for number in range(32))))

    async def test_each_thread_gets_its_own_answers(self):
        """8 threads, each with a client of its own, get their own rows, step after step."""
        async with self.serve(doubling(), max_batch_size=4) as link:

            def actor(number: int) -> None:
                client = link.sync_client()
                for step in range(20):
                    value = 100 * number + step
                    assert action(client(row(value))) == 2 * value

            await all_well(*(InThread(actor, number) for number in range(8)))

    async def test_one_client_may_be_shared(self):
        """One client serves many coroutines at once, and one sync client many threads."""
        async with self.serve(doubling()) as link:
            client, sync_client = link.client(), link.sync_client()

            async def coroutine(number: int) -> None:
                for step in range(5):
                    value = 100 * number + step
                    assert action(await client(row(value))) == 2 * value

            def thread(number: int) -> None:
                for step in range(5):
                    value = 100 * number + step
                    assert action(sync_client(row(value))) == 2 * value

            await all_well(
                *(coroutine(number) for number in range(16)),
                *(InThread(thread, number) for number in range(16, 20)),
            )

    async def test_several_requests_in_flight(self):
        """``submit`` returns at once; the futures come true with their own rows."""
        async with self.serve(doubling(), max_batch_size=8) as link:
            client, sync_client = link.client(), link.sync_client()
            futures = [client.submit(row(value)) for value in range(50)]
            assert [action(reply) for reply in await outcomes(*futures)] == [
                2 * value for value in range(50)
            ]

            def thread() -> list[float]:
                futures = [sync_client.submit(row(value)) for value in range(50)]
                return [action(future.result(10)) for future in futures]

            assert await InThread(thread) == [2 * value for value in range(50)]

    @pytest.mark.parametrize("count", [1, 2, 7])
    async def test_a_request_of_several_rows(self, count: int):
        """A request with batch size [K] gets K rows in its order, [K] even where K is 1."""
        async with self.serve(doubling()) as link:
            for reply in (
                await link.client()(rows(range(count))),
                await InThread(link.sync_client(), rows(range(count))),
            ):
                assert reply.batch_size == torch.Size([count])
                assert reply["action"].shape == (count, 3)
                assert action(reply) == [2 * value for value in range(count)]

    async def test_bare_rows_and_batches_share_a_forward(self):
        """Requests with batch size [] and [K] are rows of one batch, and keep their shapes."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(td) for td in (row(1), rows([2, 3, 4]), rows([5]), row(6))]
                await link.queued(6)
            replies = await outcomes(first, *rest)
        assert [action(reply) for reply in replies] == [0, 2, [4, 6, 8], [10], 12]
        assert [list(reply.batch_size) for reply in replies] == [[], [], [3], [1], []]
        assert seen(model) == [[0], [1, 2, 3, 4, 5, 6]]

    async def test_a_request_larger_than_a_batch_is_split_and_joined(self):
        """A request of more rows than ``max_batch_size`` gets one reply, in its order."""
        model = RecordingModel()
        async with self.serve(model, max_batch_size=4) as link:
            for reply in (
                await within(link.client()(rows(range(10)))),
                await InThread(link.sync_client(), rows(range(10))),
            ):
                assert reply.batch_size == torch.Size([10])
                assert action(reply) == [2 * value for value in range(10)]
                assert reply["policy_version"].shape == (10,)
        assert max(model.batch_sizes) <= 4
        assert model.rows == 20

    async def test_large_and_small_requests_together(self):
        """Split requests and others, at once, get their own rows only."""
        async with self.serve(doubling(), max_batch_size=4) as link:
            client = link.client()
            sizes = [9, 0, 4, 0, 0, 5, 17, 1, 0, 3]  # 0: a bare row
            requests, expected = [], []
            for number, size in enumerate(sizes):
                values = [100.0 * number + i for i in range(max(size, 1))]
                requests.append(rows(values) if size else row(values[0]))
                expected.append([2 * v for v in values] if size else 2 * values[0])
            replies = await outcomes(*(client(td) for td in requests))
            assert [action(reply) for reply in replies] == expected

    async def test_max_batch_size_counts_rows(self):
        """Requests of many rows do not add up to a batch of more than ``max_batch_size``."""
        model = RecordingModel()
        async with self.serve(model, max_batch_size=32) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(rows(range(20))) for _ in range(3)]
                await link.queued(60)
            await outcomes(first, *rest)
        assert model.batch_sizes == [1, 20, 20, 20]

    async def test_requests_that_look_different_never_share_a_batch(self):
        """Other shapes, types or keys wait in a queue of their own; all are served rightly."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client = link.client()
            extra = row(5)
            extra["more"] = torch.zeros(2)
            wholes = TensorDict({"observation": torch.tensor([6, 6, 6])})
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [
                    client.submit(td)
                    for td in (row(1), row(2, width=5), extra, wholes, row(3), row(4, width=5))
                ]
                await link.queued(6)
            replies = await outcomes(first, *rest)
        assert [action(reply) for reply in replies] == [0, 2, 4, 10, 12, 6, 8]
        assert [reply["action"].shape[-1] for reply in replies] == [3, 3, 5, 3, 3, 3, 5]
        assert replies[4]["action"].dtype == torch.int64
        assert sorted(model.batch_sizes) == [1, 1, 1, 2, 2]

    async def test_the_order_of_keys_does_not_matter(self):
        """Requests with the same entries, written in another order, are one kind."""
        model = RecordingModel(
            lambda td: TensorDict({"action": td["observation"] - td["more"]}, td.batch_size)
        )
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(TensorDict({"observation": torch.ones(1), "more": ones(0)}))
                await model.entered()
                rest = [
                    client.submit(TensorDict({"observation": ones(5), "more": ones(2)})),
                    client.submit(TensorDict({"more": ones(1), "observation": ones(7)})),
                ]
                await link.queued(2)
            replies = await outcomes(first, *rest)
        assert [action(reply) for reply in replies] == [1, 3, 6]
        assert model.batch_sizes == [1, 2]

    async def test_thousands_of_requests(self):
        """5,000 requests at once all get their own answer, and every one is counted."""
        count = 5000
        async with self.serve(doubling(), max_batch_size=64) as link:
            client = link.client()
            replies = await within(asyncio.gather(*(client(row(v)) for v in range(count))), 25)
            assert [action(reply) for reply in replies] == [2 * value for value in range(count)]
            assert link.server.stats().requests == count

    @pytest.mark.parametrize("seed", [1, 2])
    async def test_a_storm_resolves_everything_exactly_once(self, seed: int):
        """Whatever callers do at random, each gets its own rows or one error that fits."""
        dice = random.Random(seed)
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        async with self.serve(model, max_batch_size=8, timeout=0.001, max_queue_size=32) as link:
            clients = [link.client() for _ in range(4)]
            sync_client = link.sync_client()

            def request(value: float, size: int) -> TensorDict:
                return rows([value] * size) if size else row(value)

            def check(value: float, size: int, outcome: object) -> None:
                if value < 0:
                    assert isinstance(outcome, ModelError | asyncio.CancelledError | TimeoutError)
                elif isinstance(outcome, BaseException):
                    assert isinstance(outcome, asyncio.CancelledError | TimeoutError)
                else:
                    assert action(outcome) == ([2 * value] * size if size else 2 * value)

            async def coroutine(number: int) -> None:
                client = clients[number % 4]
                value = float(-number if dice.random() < 0.1 else number)
                size = dice.choice([0, 0, 0, 1, 3, 20])
                timeout = dice.choice([None, None, 30.0, 0.001])
                future = client.submit(
                    request(value, size), timeout=timeout, priority=dice.choice([0, 0, 1])
                )
                for _ in range(dice.choice([0, 0, 0, 1, 5])):
                    await asyncio.sleep(0)
                if dice.random() < 0.2:
                    future.cancel()
                (outcome,) = await asyncio.gather(future, return_exceptions=True)
                check(value, size, outcome)

            def thread(number: int) -> None:
                mine = random.Random(number)
                for step in range(20):
                    value = float(1000 * number + step)
                    size = mine.choice([0, 0, 2, 9])
                    timeout = mine.choice([None, None, 0.0005])
                    try:
                        outcome: object = sync_client(request(value, size), timeout=timeout)
                    except TimeoutError as error:
                        outcome = error
                    check(value, size, outcome)

            await all_well(
                *(coroutine(number) for number in range(1, 300)),
                *(InThread(thread, number) for number in range(1, 4)),
            )
            assert action(await within(clients[0](row(7)))) == 14
            assert link.server.stats().queue_depth == 0


def ones(value: float) -> torch.Tensor:
    return torch.full((1,), float(value))
