"""Threads that wait for weights, and that end before the interpreter does."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

_JOIN_S = 5.0
_running: dict[threading.Thread, Callable[[], None]] = {}


def start(run: Callable[[], None], stop: Callable[[], None]) -> threading.Thread:
    """Run a function in a thread that does not keep the process alive.

    Args:
        run: the function.
        stop: makes it return soon; called if it still runs when the interpreter exits.
    """

    def until_stopped() -> None:
        try:
            run()
        finally:
            del _running[thread]

    thread = threading.Thread(target=until_stopped, name="aioinfer-weights", daemon=True)
    _running[thread] = stop
    thread.start()
    return thread


@atexit.register
def _end() -> None:
    # A daemon thread that is inside of torch when the interpreter ends takes the process down.
    running = list(_running.items())
    for _, stop in running:
        stop()
    for thread, _ in running:
        thread.join(_JOIN_S)
