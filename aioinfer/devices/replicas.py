"""Several replicas of one policy in one process, each with an executor of its own.

The batcher counts how many executors are free, and whichever is free takes the next batch. All
replicas follow the first one: what an update makes of it is copied to the others, each between
two of its batches, and a reply names the version of the replica that computed it.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from aioinfer.batch import Batch
from aioinfer.executor import Executor, Report, Run
from aioinfer.forward import ForwardPass
from aioinfer.request import Request
from aioinfer.weights.receiving import Freshness
from aioinfer.weights.slots import Policy, Slots

T = TypeVar("T")


def replicate(model: Policy, devices: Sequence[torch.device]) -> list[nn.Module]:
    """Return one policy per device: the model itself, moved to the first one, and copies.

    Raises:
        TypeError: the model is not an ``nn.Module``, which could be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"devices needs a model that is an nn.Module, to copy it, got {model!r}")
    copies = [copy.deepcopy(model) for _ in devices[1:]]
    return [one.to(device) for one, device in zip([model, *copies], devices, strict=True)]


class ExecutorPool:
    """Several executors as one that can run as many batches at a time.

    A batch that is submitted goes to one that is free; the batcher sees to it that there is one.
    Functions run on the first.
    """

    def __init__(self, executors: Sequence[Executor]) -> None:
        self._executors = executors
        self._free: deque[int] = deque()

    def start(self, run: Run, finished: Report, free: Report | None = None) -> None:
        """Get all of them ready."""
        self._free = deque(range(len(self._executors)))
        for executor in self._executors:
            executor.start(
                run,
                partial(_report_finished, self._free, finished),
                None if free is None else partial(_report_free, self._free, free),
            )

    def submit(self, batch: Batch) -> None:
        """Run a batch where nothing runs."""
        batch.replica = self._free.popleft()
        self._executors[batch.replica].submit(batch)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function between two batches of the first replica."""
        return self._executors[0].call(function)

    def is_here(self) -> bool:
        """Whether the calling thread runs batches."""
        return any(executor.is_here() for executor in self._executors)

    def stop(self) -> Future[None]:
        """Finish what was submitted, then end."""
        return _all_done([executor.stop() for executor in self._executors])


# Both on a free one before anybody hears of it, and submits the next batch.


def _report_free(free: deque[int], report: Report, batch: Batch) -> None:
    batch.early = True
    free.append(batch.replica)
    report(batch)


def _report_finished(free: deque[int], report: Report, batch: Batch) -> None:
    if not batch.early:
        free.append(batch.replica)
    report(batch)


class Replicas:
    """The policies that serve, and how they change together.

    Args:
        slots: one for each replica.
        forwards: run a batch, one for each replica.
        executors: one for each replica.
    """

    def __init__(
        self,
        slots: Sequence[Slots],
        forwards: Sequence[ForwardPass],
        executors: Sequence[Executor],
    ) -> None:
        self._slots = slots
        self._forwards = forwards
        self._executors = executors
        self._lock = threading.Lock()  # the first replica changes, or is copied
        alone = len(slots) == 1
        self.executor = executors[0] if alone else ExecutorPool(executors)
        """Runs the batches of all of them."""
        self.run: Run = forwards[0] if alone else self._run
        """Runs one batch, on its executor."""

    def __len__(self) -> int:
        """How many there are."""
        return len(self._slots)

    @property
    def first(self) -> Slots:
        """The one that the others follow."""
        return self._slots[0]

    @property
    def version(self) -> int:
        """The version that all of them have reached."""
        return min([slots.current.version for slots in self._slots])

    def _run(self, batch: Batch) -> Callable[[], None] | None:
        return self._forwards[batch.replica](batch)

    def warm_up(self, request: Request) -> Future[None]:
        """Run forwards of each size on all of them; only once the executor was started."""
        pairs = zip(self._executors, self._forwards, strict=True)
        return _all_done([e.call(partial(forward.warm_up, request)) for e, forward in pairs])

    def update(self, function: Callable[[], T]) -> Future[T]:
        """Change the first replica, then the others.

        Args:
            function: changes the first replica; runs between two of its batches.

        Returns:
            What the function returned, once all of them have followed. If it raises, they follow
            it as far as it came.

        Raises:
            RuntimeError: there are several, and this is a forward of one of them.
        """
        if len(self) == 1:
            return self._executors[0].call(function)
        if self.executor.is_here():
            raise RuntimeError("a forward of one replica cannot update all of them: it is in one")

        def locked() -> T:
            with self._lock:
                return function()

        done: Future[T] = Future()
        done.set_running_or_notify_cancel()
        changed: Future[T] = self._executors[0].call(locked)
        changed.add_done_callback(partial(self._spread, done))
        return done

    def tag(self, freshness: Freshness) -> None:
        """Let replies say whether the weights are too old."""
        for forward in self._forwards:
            forward.tag(freshness)

    def follow(self) -> Future[None]:
        """Let the others take over what the first one serves now; for weights that came to it."""
        others = range(1, len(self))
        return _all_done(
            [self._executors[i].call(partial(self._follow, self._slots[i])) for i in others]
        )

    def _spread(self, done: Future[T], changed: Future[T]) -> None:
        def followed(following: Future[None]) -> None:
            error = changed.exception() or following.exception()
            if error is None:
                done.set_result(changed.result())
            else:
                done.set_exception(error)

        self.follow().add_done_callback(followed)

    def _follow(self, slots: Slots) -> None:
        with self._lock:
            leader = self._slots[0].take()  # it is not written to until it is given back
            try:
                slots.update(partial(_copy_weights, leader.model), mark=False)
                slots.current.version = leader.version
            finally:
                self._slots[0].give_back(leader)


def _copy_weights(source: Any, target: Any) -> None:
    """Make every parameter and buffer of ``target`` what it is in ``source``."""
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    ours = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    if theirs.keys() != ours.keys():
        different = sorted(theirs.keys() ^ ours.keys())
        raise RuntimeError(
            f"an update gave one replica other parameters than the others have: {different}; with "
            "several devices, an update may change their values only"
        )
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def _all_done(futures: Sequence[Future[Any]]) -> Future[None]:
    """A future of the end of all of them, and of the first of their errors."""
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()  # so that nobody can cancel it
    left = list(futures)
    lock = threading.Lock()

    def one_is_done(future: Future[Any]) -> None:
        with lock:
            left.remove(future)
            if left:
                return
        error = next((error for future in futures if (error := future.exception())), None)
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    for future in futures:
        future.add_done_callback(one_is_done)
    if not futures:
        done.set_result(None)
    return done
