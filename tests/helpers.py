"""What the tests share: requests, policies, and ways to wait that cannot hang."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)

from aioinfer.transports import wire
from aioinfer.transports.wire.payload import Packed

PATIENCE_S = 10.0
"""Seconds after which what should have happened counts as never happening."""


# -- requests and answers ---------------------------------------------------


def encode_request(
    request_id: int,
    source: int,
    layout_id: int,
    payload: Packed,
    rows: int = 1,
    batched: bool = False,
    *,
    submitted_at: float,
    in_slot: bool = False,
    **options: Any,
) -> bytes:
    """A REQUEST in one go; the options are those of ``wire.encode_looks``."""
    looks = wire.encode_looks(
        source, layout_id, payload.nbytes, rows, batched, in_slot=in_slot, **options
    )
    return wire.complete_request(
        looks, request_id, submitted_at, () if in_slot else payload.buffers
    )


def row(value: float, width: int = 3) -> TensorDict:
    """A request of one row whose observation says who asks."""
    return TensorDict({"observation": torch.full((width,), float(value))})


def rows(values: Iterable[float], width: int = 3) -> TensorDict:
    """A request of several rows, one for each value."""
    column = torch.tensor([float(value) for value in values])
    return TensorDict(
        {"observation": column.unsqueeze(1).expand(-1, width).clone()}, batch_size=[len(column)]
    )


def action(reply: TensorDictBase) -> Any:
    """The first element of the action: a number, or one per row of the reply."""
    return reply["action"][..., 0].tolist()


def seen(model: Any) -> list[list[float]]:
    """For each batch of a RecordingModel, the values of its rows."""
    return [batch["observation"][:, 0].tolist() for batch in model.batches]


# -- policies ---------------------------------------------------------------


def doubling() -> TensorDictModule:
    """A policy with in_keys and out_keys: action = 2 * observation."""
    return TensorDictModule(lambda x: x * 2, in_keys=["observation"], out_keys=["action"])


def sampling(default: InteractionType = InteractionType.RANDOM) -> Any:
    """A policy that samples its action from Normal(observation, 1)."""
    network = TensorDictModule(
        lambda x: (x, torch.ones_like(x)), in_keys=["observation"], out_keys=["loc", "scale"]
    )
    head = ProbabilisticTensorDictModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=torch.distributions.Normal,
        default_interaction_type=default,
    )
    return ProbabilisticTensorDictSequential(network, head)


# -- waiting ----------------------------------------------------------------


async def within(awaitable: Awaitable[Any], seconds: float = PATIENCE_S) -> Any:
    """Await what must not hang. If it does, fail; a TimeoutError of its own comes through."""
    task = asyncio.ensure_future(awaitable)
    done, _ = await asyncio.wait([task], timeout=seconds)
    if not done:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise AssertionError(f"still waiting after {seconds} s")
    return task.result()


async def outcomes(*awaitables: Awaitable[Any]) -> list[Any]:
    """Wait for all of them; for each its result or, if it raised, its exception."""
    return await within(asyncio.gather(*awaitables, return_exceptions=True))


async def all_well(*awaitables: Awaitable[Any]) -> None:
    """Wait for all of them; raise what the first one that failed raised."""
    for outcome in await outcomes(*awaitables):
        if isinstance(outcome, BaseException):
            raise outcome


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Wait on the event loop until ``condition()`` is true."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > give_up_at:
            raise AssertionError(f"{what} did not come true within {PATIENCE_S} s")
        await asyncio.sleep(0.001)


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Block this thread until ``condition()`` is true."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > give_up_at:
            raise AssertionError(f"{what} did not come true within {PATIENCE_S} s")
        time.sleep(0.001)


def threads_end() -> Iterator[None]:
    """Fail a test after which a thread of the library is left; the inside of a fixture."""
    threads = set(threading.enumerate())
    yield

    def left() -> list[str]:
        gc.collect()
        return [
            thread.name
            for thread in threading.enumerate()
            if thread not in threads and thread.name.startswith("aioinfer-")
        ]

    wait_until(lambda: not left(), "the end of the threads")


class InThread:
    """Runs a function in a thread of its own; a daemon, so that one that hangs fails its test
    and not the whole run.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._over = threading.Event()

        def run() -> None:
            try:
                self._result = function(*args, **kwargs)
            except BaseException as error:
                self._error = error
            finally:
                self._over.set()

        self.thread = threading.Thread(target=run, name="test-actor", daemon=True)
        self.thread.start()

    @property
    def done(self) -> bool:
        """Whether the function has returned or raised."""
        return self._over.is_set()

    def result(self) -> Any:
        """Block this thread for what the function returned or raised."""
        if not self._over.wait(PATIENCE_S):
            raise AssertionError(f"the thread still runs after {PATIENCE_S} s")
        self.thread.join()
        return self._outcome()

    async def wait(self) -> Any:
        """Wait, on the event loop, for what the function returned or raised."""
        await until(lambda: not self.thread.is_alive(), "the end of the thread")
        return self._outcome()

    def __await__(self) -> Any:
        return self.wait().__await__()

    def _outcome(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result

    async def blocked(self) -> None:
        """Wait until the thread waits for something: it has not moved for 20 ms."""
        still = 0
        before = None
        give_up_at = time.monotonic() + PATIENCE_S
        while still < 4:
            if self.done or time.monotonic() > give_up_at:
                raise AssertionError("the thread did not block")
            await asyncio.sleep(0.005)
            frame = sys._current_frames().get(self.thread.ident or 0)
            where = None if frame is None else (id(frame), frame.f_lasti)
            still = still + 1 if where == before else 0
            before = where


def stop(pid: int) -> None:
    """Let a process do nothing more, for now.

    The signal itself only reaches one thread, which stops the others once it gets a core; until
    then they go on, and may answer.
    """
    os.kill(pid, signal.SIGSTOP)

    def state(thread: str) -> str:
        with open(f"/proc/{pid}/task/{thread}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]

    def is_stopped() -> bool:
        return {state(thread) for thread in os.listdir(f"/proc/{pid}/task")} == {"T"}

    wait_until(is_stopped, "every thread to be stopped")
