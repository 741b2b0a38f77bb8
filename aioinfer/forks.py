"""What a forked child forgets: that which belongs to its parent."""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Protocol


class Forgetful(Protocol):
    """Has connections, threads or processes that a child must not use."""

    def _after_fork(self) -> None:
        """Let go of them; called in the child. What it raises is of no consequence."""


_things: weakref.WeakSet[Forgetful] = weakref.WeakSet()


def forgets(thing: Forgetful) -> None:
    """Call the thing's ``_after_fork`` in every child that is forked while it lives."""
    _things.add(thing)


def _forget() -> None:
    for thing in list(_things):
        with contextlib.suppress(Exception):
            thing._after_fork()


os.register_at_fork(after_in_child=_forget)
