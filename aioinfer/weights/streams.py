"""In which order a device copies weights and computes with them, without anybody waiting here.

On the CPU a call has happened when it returns, and there is nothing to order. On CUDA a copy and
a forward are only queued when the call returns. Copies get a stream of their own, and events do
what locks do elsewhere: the copy into a slot waits, on the device, for the last forward that used
the slot, and the first forward that uses it waits for the copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Streams:
    """The CPU's: nothing to do. Also what the others look like."""

    def filled(self, slot: Any) -> None:
        """The calling thread has queued what makes the slot what it is."""

    def before_use(self, slot: Any) -> None:
        """A batch is about to use the slot; on the forward thread."""

    def after_use(self, slot: Any) -> None:
        """A batch has queued all its work; on the thread that queued it."""

    @contextlib.contextmanager
    def writing(self, slot: Any) -> Iterator[None]:
        """What is copied inside is ordered against what uses the slot; on any thread."""
        yield

    def after_caller(self, function: Callable[[], T]) -> Callable[[], T]:
        """Return ``function`` for another thread, as if the calling one ran it itself."""
        return function


class _Marks:
    """What is known about one slot."""

    __slots__ = ("used", "written")

    def __init__(self) -> None:
        self.used: dict[Any, Any] = {}
        """By stream, recorded after the last work there that used it."""
        self.written: Any = None
        """Recorded after the last copy into it."""


class CudaStreams(Streams):
    """Copies on a stream of their own.

    The copy also waits for what the caller's current stream has queued, as the optimiser's step
    may still be on its way there; and that stream then waits for the copy, so that the next step
    does not change what is being copied.

    Args:
        device: where the slots are.
        cuda: ``torch.cuda``; another one in tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._side = cuda.Stream(device=device)

    def filled(self, slot: Any) -> None:
        """Let whoever uses or overwrites the slot wait for what the current stream does."""
        self.after_use(slot)
        slot.marks.written = self._cuda.Event()
        slot.marks.written.record(self._cuda.current_stream(self._device))

    def before_use(self, slot: Any) -> None:
        """Let the forward's stream wait for the copy."""
        marks = slot.marks
        if marks is not None and marks.written is not None:
            self._cuda.current_stream(self._device).wait_event(marks.written)

    def after_use(self, slot: Any) -> None:
        """Remember how far the current stream has been filled."""
        marks = slot.marks = slot.marks or _Marks()
        stream = self._cuda.current_stream(self._device)
        if stream not in marks.used:
            marks.used[stream] = self._cuda.Event()
        marks.used[stream].record(stream)

    @contextlib.contextmanager
    def writing(self, slot: Any) -> Iterator[None]:
        """Let what is copied inside wait for the slot's last uses, and mark its end."""
        marks = slot.marks = slot.marks or _Marks()
        side, caller = self._side, self._cuda.current_stream(self._device)
        side.wait_stream(caller)
        for used in list(marks.used.values()):
            side.wait_event(used)
        written = self._cuda.Event()
        with self._cuda.stream(side):
            yield
            written.record(side)
        marks.written = written
        caller.wait_event(written)

    def after_caller(self, function: Callable[[], T]) -> Callable[[], T]:
        """Let it wait for what the caller has queued; when it returns, the device is done too.

        Or the weights that an optimiser's step is about to write would be read too early, and
        those that the next step writes too late.
        """
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))

        def run() -> T:
            stream = self._cuda.current_stream(self._device)
            stream.wait_event(event)
            try:
                return function()
            finally:
                stream.synchronize()

        return run
