"""Actors for the tests of Monarch; apart from them, so that other processes can import these."""

from __future__ import annotations

from typing import Any

from monarch.actor import Actor, endpoint


class Playing(Actor):
    """Does what somebody else does who is no actor."""

    def __init__(self, who: type) -> None:
        self._who = who()

    @endpoint
    def do(self, method: str, *args: Any) -> Any:
        """Call a method."""
        return getattr(self._who, method)(*args)
