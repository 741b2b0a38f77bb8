"""Weights in memory that two processes share.

A buffer holds one whole set of weights, leaf after leaf, behind a sequence number, which is odd
while the buffer is being written. It is written and read in pieces, so that a reader can follow a
writer. Both divide the weights alike.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aioinfer.transports.slots import cannot_shrink, memory
from aioinfer.weights.copying import copy_tensors
from aioinfer.weights.manifest import Manifest
from aioinfer.weights.native import populate

PIECE_NBYTES = 1 << 23
"""Bytes in a piece, about: enough for a copy to be much longer than a message about it."""
_ALIGNMENT = 64
_HEADER_NBYTES = 64


class Part(NamedTuple):
    """Some elements of a leaf."""

    leaf: int
    start: int
    stop: int
    whole: bool
    """Whether these are all of them."""


class Pieces:
    """How the weights of a manifest are laid out and divided."""

    def __init__(self, manifest: Manifest, piece_nbytes: int = PIECE_NBYTES) -> None:
        self.manifest = manifest
        self.offsets: list[int] = []
        self.parts: list[list[Part]] = []
        """The parts of each piece."""
        offset = _HEADER_NBYTES
        room = 0
        for index, leaf in enumerate(manifest.leaves):
            self.offsets.append(offset)
            offset += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
            itemsize = leaf.dtype.itemsize
            count = leaf.nbytes // itemsize
            start = 0
            while start < count:
                if room < itemsize:
                    self.parts.append([])
                    room = max(piece_nbytes, itemsize)
                stop = min(count, start + room // itemsize)
                self.parts[-1].append(Part(index, start, stop, stop - start == count))
                room -= (stop - start) * itemsize
                start = stop
        self.nbytes = offset


class Buffer:
    """One set of weights in shared memory.

    Args:
        pieces: how it is laid out.
        descriptor: of memory that somebody else has made; closed here. ``None`` makes it.

    Raises:
        ValueError: that memory is too small, or might become so.
    """

    _numbers = itertools.count(1)

    def __init__(self, pieces: Pieces, descriptor: int | None = None) -> None:
        self.number = next(self._numbers)
        """What the writer calls it."""
        self._pieces = pieces
        own = descriptor is None
        self._descriptor = memory(pieces.nbytes) if descriptor is None else descriptor
        try:
            size = os.fstat(self._descriptor).st_size
            if size < pieces.nbytes or not cannot_shrink(self._descriptor):
                raise ValueError(f"memory of {size} bytes, or less later, for {pieces.nbytes}")
            self._memory = mmap.mmap(self._descriptor, pieces.nbytes)
        finally:
            if not own:
                self.close()
        # All pages at once: one by one, they would cost more than the first copy. Not by mmap, for
        # which every other thread of the process would wait.
        populate(torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr(), pieces.nbytes)
        self._sequence = memoryview(self._memory)[:8].cast("Q")
        self.tensors = [
            self._tensor(leaf.shape, leaf.dtype, leaf.nbytes, offset)
            for leaf, offset in zip(pieces.manifest.leaves, pieces.offsets, strict=True)
        ]
        """One for each leaf; they are in the buffer."""

    def _tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int, offset: int
    ) -> torch.Tensor:
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        count = nbytes // dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)

    @property
    def descriptor(self) -> int:
        """For who is to share it."""
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor. The memory is given back once nothing refers to it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_still(self, sequence: int) -> bool:
        """Whether what was read until now was whole, and written under this number."""
        _fence()
        return self._sequence[0] == sequence

    def begin(self) -> int:
        """Say that the buffer is being written; return the (even) number it will have then."""
        self._sequence[0] |= 1
        _fence()
        return self._sequence[0] + 1

    def end(self) -> None:
        """Say that it is whole."""
        _fence()
        self._sequence[0] += 1

    def write(self, piece: int, sources: Sequence[torch.Tensor]) -> None:
        """Copy a piece of the weights into the buffer."""
        targets, taken = [], []
        for leaf, start, stop, whole in self._pieces.parts[piece]:
            target, source = self.tensors[leaf], sources[leaf]
            if whole or not source.is_contiguous():
                if start:  # the first part has copied all of it
                    continue
                targets.append(target)
                taken.append(source)
            else:
                targets.append(target.view(-1)[start:stop])
                taken.append(source.view(-1)[start:stop])
        copy_tensors(targets, taken)

    def read(self, piece: int, targets: Sequence[torch.Tensor | None]) -> None:
        """Copy a piece of the weights out of the buffer."""
        given, sources = [], []
        for leaf, start, stop, whole in self._pieces.parts[piece]:
            target, source = targets[leaf], self.tensors[leaf]
            if target is None:
                continue
            if whole or not target.is_contiguous():
                if stop < source.numel():  # the last part copies all of it
                    continue
                given.append(target)
                sources.append(source)
            else:
                given.append(target.view(-1)[start:stop])
                sources.append(source.view(-1)[start:stop])
        copy_tensors(given, sources)


def _fence() -> None:
    """What was written before this is seen before what is written after it.

    Python has no memory barrier. Taking and releasing a lock lets nothing out of its middle, in
    either direction; doing so twice lets nothing across.
    """
    for _ in range(2):
        with _fencing:
            pass


_fencing = threading.Lock()


class Announcement:
    """The newest version that there is or will be, for whoever shares this memory."""

    NBYTES = mmap.PAGESIZE

    def __init__(self, descriptor: int | None = None) -> None:
        own = descriptor is None
        self.descriptor = memory(self.NBYTES) if descriptor is None else descriptor
        try:
            if os.fstat(self.descriptor).st_size < self.NBYTES:
                raise ValueError("too little memory")
            self._memory = mmap.mmap(self.descriptor, self.NBYTES)
        finally:
            if not own:
                self.close()
        self._version = memoryview(self._memory)[:8].cast("q")

    @property
    def version(self) -> int:
        """The version."""
        return self._version[0]

    @version.setter
    def version(self, version: int) -> None:
        self._version[0] = version

    def close(self) -> None:
        """Close the descriptor. The memory is given back once nothing refers to it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
