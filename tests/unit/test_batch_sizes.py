"""Bucket sizes: what a policy sees, and what its callers get."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from tensordict import TensorDict

from aioinfer import InferenceServer, ModelError
from aioinfer.batching import Batcher, Dispatch
from aioinfer.request import Request, Source
from aioinfer.testing import RecordingModel


async def test_a_policy_sees_allowed_sizes_only_and_callers_their_own_rows():
    """Batches are padded to 1, 4 or 16 rows; every caller gets its own row, none a padded one."""
    model = RecordingModel()
    async with InferenceServer(model, max_batch_size=16, batch_sizes=[1, 4, 16]) as server:
        client = server.async_client()

        async def ask(value: int, rows: int) -> Any:
            size = [rows] if rows else []
            td = TensorDict({"observation": torch.full((*size, 2), float(value))}, size)
            return (await client(td))["action"]

        for crowd in (1, 2, 3, 5, 11, 16):
            answers = await asyncio.gather(*(ask(i, i % 3) for i in range(crowd)))
            for i, answer in enumerate(answers):
                assert answer.shape == (*([i % 3] if i % 3 else []), 2)
                assert (answer == 2 * i).all()
    assert set(model.batch_sizes) <= {1, 4, 16}
    assert server.stats().rows == sum(
        sum(max(1, i % 3) for i in range(crowd)) for crowd in (1, 2, 3, 5, 11, 16)
    )


async def test_a_culprit_is_found_with_allowed_sizes_too():
    """Halving a batch that failed keeps to the allowed sizes, and only the culprit fails."""
    sizes: list[int] = []

    def policy(td: TensorDict) -> TensorDict:
        sizes.append(td.batch_size[0])
        if (td["observation"] == 3).any():
            raise ZeroDivisionError("three")
        return TensorDict({"action": td["observation"] * 2}, td.batch_size)

    async with InferenceServer(
        policy, max_batch_size=8, batch_sizes=[2, 8], min_batch_size=6
    ) as server:
        client = server.async_client()
        answers = await asyncio.gather(
            *(client(TensorDict({"observation": torch.tensor([float(i)])})) for i in range(6)),
            return_exceptions=True,
        )
    assert set(sizes) <= {2, 8}
    assert isinstance(answers.pop(3), ModelError)
    assert [int(answer["action"]) for answer in answers] == [0, 2, 4, 8, 10]


def _batcher(**costs: float) -> tuple[Batcher, Source]:
    """A batcher with sizes 1, 4 and 16 that has learnt what they cost."""
    batcher = Batcher(
        max_batch_size=16,
        min_batch_size=1,
        timeout=1.0,
        max_queue_size=1000,
        batch_sizes=(1, 4, 16),
    )
    source = Source()
    now = 0.0
    for rows, cost in ((1, costs["one"]), (4, costs["four"]), (16, costs["sixteen"])) * 12:
        for _ in range(rows):
            _push(batcher, source, now)
        action = batcher.next_action(now)
        assert isinstance(action, Dispatch)
        now += cost
        batcher.forward_ended(action.requests, now)
    return batcher, source


def _push(batcher: Batcher, source: Source, now: float, rows: int = 1) -> None:
    request = Request(None, rows, rows > 1, "kind", None, 0, source, None)
    request.submitted_at = now
    batcher.push(request)


def test_pads_where_the_larger_size_costs_hardly_more():
    """Fifteen rows, sixteen cost twice what four cost: one padded batch."""
    batcher, source = _batcher(one=0.001, four=0.001, sixteen=0.002)
    for _ in range(15):
        _push(batcher, source, 0.0)
    action = batcher.next_action(0.3)
    assert isinstance(action, Dispatch)
    assert (action.rows, action.size) == (15, 16)


def test_leaves_some_where_the_larger_size_costs_much_more():
    """Five rows, sixteen cost sixteen times what one costs: four now, one later."""
    batcher, source = _batcher(one=0.001, four=0.004, sixteen=0.016)
    for _ in range(5):
        _push(batcher, source, 0.0)
    action = batcher.next_action(0.5)
    assert isinstance(action, Dispatch)
    assert (action.rows, action.size) == (4, 4)
    assert batcher.rows == 1


def test_a_request_larger_than_the_cheaper_size_is_not_left_for_ever():
    """Three rows in one request fit no batch of one: it is padded to four, whatever that costs."""
    batcher, source = _batcher(one=0.001, four=0.1, sixteen=0.5)
    _push(batcher, source, 0.0, rows=3)
    action = batcher.next_action(30.0)
    assert isinstance(action, Dispatch)
    assert (action.rows, action.size) == (3, 4)
