"""A forward on a device that works asynchronously, overlapped with what comes before and after.

On the CPU a forward is over when it returns. On CUDA the thread only queues work, so while one
batch computes, the next can be gathered and copied. Here a batch is a fixed number of operations,
whatever the number of its requests: per leaf one gather into pinned memory that is used again and
one copy to the device, the forward, and per entry of the reply one copy back. The copies have
streams of their own and wait for each other by events, on the device. The thread that queues all
this goes on with the next batch; another one waits for the end and answers.

What a device has to be able to do is a :class:`Lane`, so that everything else can be tested
without one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from aioinfer.batch import Batch
from aioinfer.batching import fitting_size
from aioinfer.buffers import Buffers
from aioinfer.clock import Clock
from aioinfer.collation import Collator
from aioinfer.devices.faults import copy_of, device_died
from aioinfer.errors import ServerDiedError
from aioinfer.forward import ForwardPass
from aioinfer.replies import Columns
from aioinfer.request import Request
from aioinfer.sampling import sampling
from aioinfer.signature import Signature
from aioinfer.tensordicts import new_tensordict
from aioinfer.weights.slots import Slots

IN_FLIGHT = 2
"""Batches that a device has at a time: one computes while the next is staged."""
_HOST = "cpu"
_AS_IS = contextlib.nullcontext()


class Lane(Protocol):
    """The queues of one device: copies there, forwards, copies back.

    Each works through what it is given in order; between them, order is made by events. Callers of
    the same process have a queue of their own, the device's default.
    """

    def enter(self) -> None:
        """Let the calling thread queue forwards, unless told otherwise, from now on."""

    def follow(self) -> None:
        """Let the present queue wait for what callers have queued so far."""

    def lend(self, tensor: torch.Tensor) -> None:
        """Callers queue work on it, after whose end alone its memory may be used again."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return host memory (uint8) that copies need not wait for."""

    def copying_in(self) -> contextlib.AbstractContextManager[None]:
        """What is queued inside goes to the queue of copies to the device."""

    def copying_out(self) -> contextlib.AbstractContextManager[None]:
        """What is queued inside goes to the queue of copies back."""

    def mark(self) -> Any:
        """Return an event: all that was given to the present queue has been done."""

    def wait_for(self, event: Any) -> None:
        """Let the present queue wait; not the calling thread."""

    def block_on(self, event: Any) -> None:
        """Let the calling thread wait, without holding the interpreter."""


class CudaLane:
    """Three CUDA streams.

    Args:
        device: whose.
        cuda: ``torch.cuda``; another one in tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._streams: tuple[Any, Any, Any] | None = None

    def _queues(self) -> tuple[Any, Any, Any]:
        if self._streams is None:  # not before they are used, as they start CUDA
            make = partial(self._cuda.Stream, self._device)
            self._streams = make(), make(), make()
        return self._streams

    def enter(self) -> None:
        """Make the device and the stream of forwards the thread's own."""
        self._cuda.set_device(self._device)
        self._cuda.set_stream(self._queues()[1])
        self.follow()

    def follow(self) -> None:
        """Let the current stream wait for the default stream."""
        default = self._cuda.default_stream(self._device)
        self._cuda.current_stream(self._device).wait_stream(default)

    def lend(self, tensor: torch.Tensor) -> None:
        """Let the allocator know of the default stream."""
        if tensor.is_cuda:
            tensor.record_stream(self._cuda.default_stream(self._device))

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return page-locked memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    @contextlib.contextmanager
    def copying_in(self) -> Iterator[None]:
        """Use the first stream."""
        with self._cuda.stream(self._queues()[0]):
            yield

    @contextlib.contextmanager
    def copying_out(self) -> Iterator[None]:
        """Use the third stream."""
        with self._cuda.stream(self._queues()[2]):
            yield

    def mark(self) -> Any:
        """Record an event on the current stream."""
        event = self._cuda.Event(blocking=True)  # who waits for it sleeps
        event.record(self._cuda.current_stream(self._device))
        return event

    def wait_for(self, event: Any) -> None:
        """Let the current stream wait."""
        self._cuda.current_stream(self._device).wait_event(event)

    def block_on(self, event: Any) -> None:
        """Wait in the driver."""
        event.synchronize()


class _Staged(NamedTuple):
    """A batch of which everything is queued."""

    done: Any
    """The event of its last operation."""
    columns: dict[str, torch.Tensor]
    """Where its answers will be, in memory that is used again."""
    rows: int
    version: int
    stale: bool | None
    began_at: float
    alive: Any
    """What the device still reads and writes."""


class StagedForward(ForwardPass):
    """A :class:`ForwardPass` on a device with queues; where the batch is plain, it only queues.

    Everything else, and a batch whose forward raises, takes the way of a plain forward pass, which
    also finds out who is to blame.

    Args:
        slots: as of a :class:`ForwardPass`, like the next three.
        collator: see there.
        clock: see there.
        sizes: see there.
        staging: gathers on the host, into memory that is :func:`pinned`, and leaves answers where
            they are; ``None`` for not queueing any batch.
        lane: queues work on the device.
        device: where the policy is.
        brings_back: whether replies go to the host; else they stay on the device.
    """

    def __init__(
        self,
        slots: Slots,
        collator: Collator,
        clock: Clock,
        sizes: Sequence[int] | None,
        staging: Collator | None,
        lane: Lane,
        device: torch.device,
        *,
        brings_back: bool,
    ) -> None:
        super().__init__(slots, collator, clock, sizes)
        self._staging = staging
        self._lane = lane
        self._device = device
        self._brings_back = brings_back
        self._replies = pinned(lane)
        self._unfit: set[Signature] = set()
        """Requests whose answers are not plain."""
        self._last_done_at = 0.0
        self._thread: threading.Thread | None = None

    def warm_up(self, request: Request) -> None:
        """Do so in the queue of forwards."""
        self._enter()
        super().warm_up(request)

    def __call__(self, batch: Batch) -> Callable[[], None] | None:
        """Queue a batch; return what waits for its end and sets its outcomes, if it was queued."""
        signature: Signature = batch.requests[0].signature  # type: ignore[assignment]
        staging = self._staging
        on_host = all([leaf is None or leaf[2].type == _HOST for leaf in signature.leaves])
        fits = signature.plain and signature not in self._unfit and batch.rows <= self._room.rows
        if staging is not None and on_host and fits:
            with contextlib.suppress(BaseException):  # it comes again, below, if it was no accident
                self._enter()
                staged = self._stage(batch, signature, staging)
                if staged is not None:
                    return partial(self._finish, batch, staged, staging)
                if len(self._unfit) > 256:  # shapes that keep changing must not fill memory
                    self._unfit.clear()
                self._unfit.add(signature)
        self._run_plainly(batch, on_host)
        return None

    def _enter(self) -> None:
        """Make the calling thread the device's, if it is not yet: each start brings a new one."""
        thread = threading.current_thread()
        if thread is not self._thread:
            self._lane.enter()
            self._thread = thread

    def _run_plainly(self, batch: Batch, on_host: bool) -> None:
        asked = [request.data for request in batch.requests]  # the device may read it till the end
        try:
            self._enter()
            if not on_host:
                self._lane.follow()
            super().__call__(batch)
            if not self._brings_back and batch.fatal is None:
                self._lane.block_on(self._lane.mark())
        except BaseException as error:
            self._give_up(batch, error)
            batch.answered_at = self._clock()
        del asked

    def _stage(self, batch: Batch, signature: Signature, staging: Collator) -> _Staged | None:
        """Queue a batch; ``None`` where the answers are not plain."""
        lane, rows = self._lane, batch.rows
        size = fitting_size(self._sizes, rows)
        began_at = self._clock()
        slot = self._slots.take()
        mode = _AS_IS if signature.mode is None else sampling(slot.model, signature.mode)
        version, stale = slot.version, self._is_stale()
        alive: list[Any] = []
        try:
            with torch.no_grad(), mode:
                host = staging.gather(batch.requests, rows, size)
                alive.append(host)
                with lane.copying_in():
                    inputs = {k: v.to(self._device, non_blocking=True) for k, v in host.items()}
                    copied = lane.mark()
                alive.append(inputs)
                lane.wait_for(copied)
                # A TensorDict of its own, for the policy may write into it.
                answer = slot.call(new_tensordict(dict(inputs), torch.Size([size])))
                columns = staging.columns(answer, size)
                if columns is None:
                    lane.block_on(lane.mark())
                    return None
                alive += answer, columns
                done = lane.mark()
                found = {key: column[:rows] for key, column in columns.items()}
                if self._brings_back:
                    with lane.copying_out():
                        lane.wait_for(done)
                        found = {key: self._fetch(column) for key, column in found.items()}
                        done = lane.mark()
        except BaseException:
            # Its memory must not be used again while the device may still read it.
            lane.block_on(lane.mark())
            raise
        finally:
            self._slots.give_back(slot)
        self._note_success(signature, size)
        return _Staged(done, found, rows, version, stale, began_at, alive)

    def _fetch(self, column: torch.Tensor) -> torch.Tensor:
        target = self._replies.take(tuple(column.shape), column.dtype)
        if target is None:
            return column.to("cpu")  # which waits
        return target.copy_(column, non_blocking=True)

    def _finish(self, batch: Batch, staged: _Staged, staging: Collator) -> None:
        """Wait for a batch, and set its outcomes and times. Never raises."""
        requests = batch.requests
        try:
            self._lane.block_on(staged.done)
            columns = staged.columns
            if self._brings_back:
                columns = {key: column.clone() for key, column in columns.items()}
            answers = staging.answers(columns, requests, staged.rows, staged.version, staged.stale)
            if not isinstance(answers, Columns):
                answers = list(zip(requests, answers, strict=True))
            self._set_answers(batch, answers)
        except BaseException as error:
            # What the device reports this late it reports to everybody from now on.
            self._give_up(batch, error)
        now = self._clock()
        batch.began_at = max(staged.began_at, self._last_done_at)
        batch.forward_s = now - batch.began_at
        batch.answered_at = self._last_done_at = now
        for request in requests:
            request.data = None

    @staticmethod
    def _give_up(batch: Batch, error: BaseException) -> None:
        died = device_died(error) or ServerDiedError(f"the device failed: {error}")
        died.__cause__ = error
        batch.columns, batch.fatal, batch.failed = None, died, True
        batch.outcomes = [(request, copy_of(died)) for request in batch.requests]


def pinned(lane: Lane) -> Buffers:
    """Memory for copies, as much as batches in flight need: each gives it back when it is done."""
    return Buffers(lane.pinned, per_size=None)
