"""How the two ends of a connection make a Gloo group of the two of them.

Gloo leaves it to a store how its ends learn each other's addresses. Here, that store is the
doorbell which both have already: it has proved who they are, and it ends when either of them does.
No third party is needed that could be slow, or gone, or talked to by others.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed

from aioinfer.clock import duration_of
from aioinfer.weights.doorbell import Doorbell

dist: Any = torch.distributed  # its stubs leave out what it exports

_CONNECT_TIMEOUT = duration_of(1.0)
"""For Gloo to connect, once both ends have told each other where. It tries five times, also if the
other end has died meanwhile."""
_Store: Any = dist.Store if dist.is_available() else object


class _DoorbellStore(_Store):  # type: ignore[misc]
    """What either end sets, the other one can get.

    As much of a store as ``ProcessGroupGloo`` uses while it is made, on the thread that makes it.
    """

    def __init__(self, doorbell: Doorbell) -> None:
        super().__init__()
        self._doorbell = doorbell
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        """Know it here and there."""
        self._known[key] = value
        self._doorbell.send((key, value))

    def get(self, key: str) -> bytes:
        """Block until it is known."""
        while key not in self._known:
            other, value = self._receive()
            if other is None:
                raise ConnectionError(f"the other end has met this one without {key!r}")
            self._known[other] = value
        return self._known[key]

    def wait(self, keys: Sequence[str], timeout: Any = None) -> None:
        """Block until all are known, or the other end is gone."""
        for key in keys:
            self.get(key)

    def met(self) -> None:
        """Block until the other end has met this one, too; nothing is set any more."""
        self._doorbell.send((None, b""))
        while self._receive()[0] is not None:
            pass

    def _receive(self) -> tuple[str | None, bytes]:
        (key, value), _ = self._doorbell.receive()
        return key, value


def meet(doorbell: Doorbell, rank: int) -> Any:
    """Make a group with the other end, which does the same; block until both have.

    Gloo connects the addresses between which the doorbell is: the other end can reach this one
    there, and nobody is listened to elsewhere.

    Args:
        doorbell: the connection between the two. Nobody else may read from it meanwhile.
        rank: 0 for one end, 1 for the other.

    Returns:
        A ``ProcessGroupGloo`` of size 2.

    Raises:
        OSError: the other end is gone, or Gloo could not connect the two.
    """
    store = _DoorbellStore(doorbell)
    try:
        # No variable holds the options: an error would, and with them what Gloo has opened.
        group = dist.ProcessGroupGloo(store, rank, 2, _options(doorbell.host))
    except RuntimeError as error:
        raise ConnectionError(f"Gloo could not connect: {error}") from None
    with _groups_lock:
        _groups.add(group)
    store.met()
    return group


def _options(host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = _CONNECT_TIMEOUT
    return options


# A forked child must never end a group of its parent. The group's threads are not there; its end
# would wait for them, and then take the process down.

_groups: weakref.WeakSet[Any] = weakref.WeakSet()
_groups_lock = threading.Lock()
_kept: list[Any] = []


def _before_fork() -> None:
    _groups_lock.acquire()
    _kept.extend(_groups)


def _after_fork_in_parent() -> None:
    _kept.clear()
    _groups_lock.release()


def _after_fork_in_child() -> None:
    for group in _kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    _after_fork_in_parent()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
