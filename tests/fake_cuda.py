"""As much of ``torch.cuda`` as has streams; what is asked of them is written down."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any


class FakeCuda:
    """Streams that wait for each other and do nothing; there is a current one.

    Args:
        current: the name of the one that is current at first.
        names: those of the streams that are made, in turns.
    """

    def __init__(self, current: str, *names: str) -> None:
        self.calls: list[str] = []
        self._names = itertools.cycle(names)
        self.now = self.named(current)

    def Stream(self, device: Any = None) -> Any:
        return self.named(next(self._names))

    def named(self, name: str) -> Any:
        """Another stream."""
        cuda = self

        class Stream:
            def __str__(self) -> str:
                return name

            def wait_event(self, event: Any) -> None:
                cuda.calls.append(f"{name} waits for {event.of}")

            def wait_stream(self, other: Any) -> None:
                cuda.calls.append(f"{name} waits for {other}")

            def synchronize(self) -> None:
                cuda.calls.append(f"the thread waits for {name}")

        return Stream()

    def current_stream(self, device: Any = None) -> Any:
        return self.now

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before
