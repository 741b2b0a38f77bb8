"""Calls of the C library during which other threads of this process can go on.

Python has these, too, but keeps the interpreter's lock during them.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_MADV_POPULATE_WRITE = 23
_library: Any = ctypes.CDLL(None) if sys.platform != "win32" else None


def give_way() -> None:
    """Let a thread run that waits for this one's core, if there is one.

    The system lets a thread go on for milliseconds before it gives its core to another one. Who
    copies, and is waited for by nobody, would keep a batch waiting for as long.
    """
    if _library is not None:
        _library.sched_yield()


def populate(address: int, nbytes: int) -> None:
    """Let memory that was mapped have its pages now, where the system can do that at once."""
    if sys.platform == "linux":
        advice = ctypes.c_int(_MADV_POPULATE_WRITE)
        _library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice)
