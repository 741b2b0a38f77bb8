"""The event loop behind ``start()``: one background thread, entered through a portal."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal

new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with contextlib.suppress(ImportError):  # it does not exist for every platform
    from uvloop import new_event_loop

T = TypeVar("T")


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


class BackgroundLoop:
    """An event loop (uvloop where installed) in a daemon thread.

    anyio's ``start_blocking_portal`` does the same in a thread that the interpreter joins on
    exit, so a forgotten ``shutdown()`` would hang the program at its end.
    """

    def __init__(self) -> None:
        started: Future[BlockingPortal] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="aioinfer-loop", daemon=True
        )
        self._thread.start()
        self._portal = started.result()
        self.loop = self.call(_running_loop)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run a coroutine function on the loop and wait for its result."""
        return self._portal.call(function, *args)

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop without waiting for anything; the loop may be stuck."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self) -> None:
        """End the loop and the thread, cancelling what still runs on it."""
        self._portal.start_task_soon(self._portal.stop, True)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def close_soon(self) -> None:
        """End the loop and the thread without waiting; for finalizers, on any thread."""
        stop = self._portal.stop(True)
        try:
            self.loop.call_soon_threadsafe(self.loop.create_task, stop)
        except RuntimeError:  # it has ended
            stop.close()

    @staticmethod
    def _run(started: Future[BlockingPortal]) -> None:
        async def main() -> None:
            async with BlockingPortal() as portal:
                started.set_result(portal)
                await portal.sleep_until_stopped()

        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(main())
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
                return
            raise


class OwnLoop:
    """A background loop that is started when it is first needed, and ends with its owner.

    Args:
        owner: the object that it ends with.
    """

    def __init__(self, owner: object) -> None:
        self.started: BackgroundLoop | None = None
        """The loop, if it was needed."""
        self._owner = weakref.ref(owner)
        self._lock = threading.Lock()

    def get(self) -> BackgroundLoop:
        """Return the loop; of the owner only."""
        with self._lock:
            if self.started is None:
                self.started = BackgroundLoop()
                self._end = weakref.finalize(self._owner(), self.started.close_soon)
                self._end.atexit = False  # its thread is a daemon
            return self.started

    def forget(self) -> None:
        """Leave the loop to the parent of this forked process."""
        if self.started is not None:
            self._end.detach()
