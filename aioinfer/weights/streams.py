"""In which order a device copies weights and computes with them, without anybody waiting here.

On the CPU a call has happened when it returns, and there is nothing to order. On CUDA a copy and
a forward are only queued when the call returns. Copies get a stream of their own, and events do
what locks do elsewhere: the copy into a slot waits, on the device, for the last forward that used
the slot, and the first forward that uses it waits for the copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Streams:
    """The CPU's: nothing to do. Also what the others look like."""

    def before_use(self, slot: Any) -> None:
        """A batch is about to use the slot; on the forward thread."""

    def after_use(self, slot: Any) -> None:
        """A batch has queued all its work; on the thread that queued it."""

    @contextlib.contextmanager
    def writing(self, slot: Any) -> Iterator[None]:
        """What is copied inside is ordered against what uses the slot; on any thread."""
        yield


class _Marks:
    """What is known about one slot."""

    __slots__ = ("used", "written")

    def __init__(self) -> None:
        self.used: Any = None
        """Recorded after the last forward that used it."""
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

    def before_use(self, slot: Any) -> None:
        """Let the forward's stream wait for the copy."""
        marks = slot.marks
        if marks is not None and marks.written is not None:
            self._cuda.current_stream(self._device).wait_event(marks.written)

    def after_use(self, slot: Any) -> None:
        """Remember how far the forward's stream has been filled."""
        marks = slot.marks
        if marks is None:
            marks = slot.marks = _Marks()
        if marks.used is None:
            marks.used = self._cuda.Event()
        marks.used.record(self._cuda.current_stream(self._device))

    @contextlib.contextmanager
    def writing(self, slot: Any) -> Iterator[None]:
        """Let what is copied inside wait for the slot's last use, and mark its end."""
        marks = slot.marks
        if marks is None:
            marks = slot.marks = _Marks()
        side, caller = self._side, self._cuda.current_stream(self._device)
        side.wait_stream(caller)
        if marks.used is not None:
            side.wait_event(marks.used)
        written = self._cuda.Event()
        with self._cuda.stream(side):
            yield
            written.record(side)
        marks.written = written
        caller.wait_event(written)
