"""How tests wait for a fake, in threads and in coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

PATIENCE_S = 30.0
"""Seconds after which a fake that waits for the test gives up, so that no test hangs."""


class Bell:
    """Lets threads and coroutines wait for something about the object that owns it."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def ring(self) -> None:
        """Make everybody look again; the caller holds the lock."""
        self.lock.notify_all()
        sleepers, self._sleepers = self._sleepers, []
        for loop, future in sleepers:
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:
                if not loop.is_closed():
                    raise

    def wait(self, predicate: Callable[[], bool], timeout: float, otherwise: str) -> None:
        """Block this thread until the predicate is true; it is called with the lock held."""
        with self.lock:
            if not self.lock.wait_for(predicate, timeout):
                raise TimeoutError(f"{otherwise} within {timeout} s")

    async def wait_async(
        self, predicate: Callable[[], bool], timeout: float, otherwise: str
    ) -> None:
        """Wait until the predicate is true; it is called with the lock held."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    with self.lock:
                        if predicate():
                            return
                        future: asyncio.Future[None] = loop.create_future()
                        self._sleepers.append((loop, future))
                    await future
        except TimeoutError:
            raise TimeoutError(f"{otherwise} within {timeout} s") from None


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
