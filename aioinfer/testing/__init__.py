"""Fakes for tests of code that uses this library, and of the library itself.

They take what makes such tests slow and flaky out of them: real time, real threads, and
forwards that begin and end whenever they like. A test with pytest-asyncio that decides all
three::

    async def test_a_lonely_request_leaves_after_the_timeout():
        clock, model = ManualClock(), RecordingModel()
        puppet = PuppetExecutor()
        async with InferenceServer(
            model, timeout=0.5, min_batch_size=8, clock=clock, executor=puppet
        ) as server:
            with puppet:
                td = TensorDict({"observation": torch.ones(3)})
                answer = server.async_client().submit(td)
                clock.advance(0.4)
                await settle()
                assert not puppet.waiting  # nothing has left yet
                clock.advance(0.1)
                await settle()
                puppet.run_next()
                assert (await answer)["action"].tolist() == [2.0, 2.0, 2.0]

With the real executor thread instead of a :class:`PuppetExecutor`, hold the forward itself::

    async def test_what_arrives_during_a_forward_joins_the_next_batch():
        model = RecordingModel()
        async with InferenceServer(model) as server:
            client = server.async_client()
            with model.held():
                first = client.submit(td)
                await model.entered()
                rest = [client.submit(td) for _ in range(3)]
            await asyncio.gather(first, *rest)
            assert model.batch_sizes == [1, 3]
"""

from __future__ import annotations

import asyncio

from aioinfer.testing.clock import ManualClock
from aioinfer.testing.executor import PuppetExecutor
from aioinfer.testing.model import RecordingModel

__all__ = ["ManualClock", "PuppetExecutor", "RecordingModel", "settle"]


async def settle(rounds: int = 50) -> None:
    """Let the running event loop do all it can do now, without any time passing.

    What is due on the loop runs, and what that makes due, and so on for ``rounds`` rounds. It
    does not wait for other threads; see :meth:`RecordingModel.entered` for that.

    Args:
        rounds: how many times the loop goes round. A request needs fewer than ten from its
            submission to a :class:`PuppetExecutor`.
    """
    for _ in range(rounds):
        await asyncio.sleep(0)
