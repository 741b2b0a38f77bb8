"""Shared memory between a client's process and the server: written once, read once.

The client owns it. It is memory without a name (``memfd``), known to the two processes that
hold its descriptor and to nobody else, so whoever is killed, the kernel takes it back and
nothing is left in ``/dev/shm``. The client cuts it into slots; a slot holds one request and then,
if it fits, the reply. It is free again at the server's last word about the request.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile

from aioinfer.transports.wire import Slot, WireError

_FIRST_ARENA_NBYTES = 1 << 20
MAX_ARENAS = 64
"""Arenas of one connection; each is at least twice as large as the one before."""


class Slots:
    """The client's side: arenas, and which of their slots are free.

    Slots have the sizes of powers of two, and those that were used are used again.
    """

    def __init__(self) -> None:
        self._arenas: list[mmap.mmap] = []
        self._free: dict[int, list[Slot]] = {}
        self._used = 0
        self._size = 0

    def take(self, nbytes: int) -> tuple[Slot, tuple[int, int] | None]:
        """Return a free slot of at least ``nbytes``.

        Returns:
            The slot; and, if the server must be told of a new arena first, its size and its
            descriptor, which the caller closes.
        """
        capacity = max(4096, 1 << (nbytes - 1).bit_length())
        free = self._free.setdefault(capacity, [])
        if free:
            return free.pop(), None
        new = None
        if not self._arenas or self._used + capacity > self._size:
            self._size = max(_FIRST_ARENA_NBYTES, 2 * self._size, 2 * capacity)
            descriptor = memory(self._size)
            self._arenas.append(mmap.mmap(descriptor, self._size))
            self._used = 0
            new = self._size, descriptor
        slot = Slot(len(self._arenas) - 1, self._used, capacity)
        self._used += capacity
        return slot, new

    @property
    def exhausted(self) -> bool:
        """Whether there are as many arenas as a server takes."""
        return len(self._arenas) >= MAX_ARENAS

    def give_back(self, slot: Slot) -> None:
        """The slot is free again."""
        self._free[slot.capacity].append(slot)

    def view(self, slot: Slot) -> memoryview:
        """The memory of a slot."""
        return memoryview(self._arenas[slot.arena])[slot.offset : slot.offset + slot.capacity]


class Arenas:
    """The server's side: the arenas of one client process."""

    def __init__(self) -> None:
        self._arenas: dict[int, mmap.mmap] = {}

    def add(self, arena: int, nbytes: int, descriptor: int) -> None:
        """Map an arena, and close its descriptor.

        Raises:
            WireError: it is not what the client says it is, or there are too many.
        """
        try:
            if arena in self._arenas or len(self._arenas) >= MAX_ARENAS or nbytes < 1:
                raise WireError(f"arena {arena} of {nbytes} bytes; {len(self._arenas)} are known")
            # Memory that shrinks under a reader kills the reader.
            if os.fstat(descriptor).st_size < nbytes or not cannot_shrink(descriptor):
                raise WireError(f"arena {arena} is smaller than {nbytes} bytes, or may become so")
            self._arenas[arena] = mmap.mmap(descriptor, nbytes)
        finally:
            os.close(descriptor)

    def view(self, slot: Slot) -> memoryview:
        """The memory of a slot.

        Raises:
            WireError: there is no such memory.
        """
        arena = self._arenas.get(slot.arena)
        if arena is None or slot.offset + slot.capacity > len(arena):
            raise WireError(f"{slot} is outside of its arena")
        return memoryview(arena)[slot.offset : slot.offset + slot.capacity]


if hasattr(os, "memfd_create"):

    def memory(nbytes: int) -> int:
        """A descriptor of memory without a name, which cannot shrink."""
        descriptor = os.memfd_create("aioinfer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        return descriptor

    def cannot_shrink(descriptor: int) -> bool:
        """Whether it is of such memory."""
        try:
            return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        except OSError:  # a file of another kind
            return False

else:

    def memory(nbytes: int) -> int:
        """A descriptor of memory without a name."""
        with tempfile.TemporaryFile() as file:
            file.truncate(nbytes)
            return os.dup(file.fileno())

    def cannot_shrink(descriptor: int) -> bool:
        """Whether it is of memory that can be used safely, as far as can be known."""
        return True  # these systems have no seals
