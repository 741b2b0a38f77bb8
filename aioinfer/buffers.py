"""Memory of large batches, used again as soon as nobody looks at it.

An allocator gives large blocks back to the system, so a new batch of frames means new pages, and
the kernel clears each of them when it is first written: for 3.6 MB of frames that costs ten times
what copying the frames does. The memory of an earlier batch has its pages. But the policy may
have kept that batch, or a view of it, and must not see it change. So each batch gets a view of the
memory that is an object of its own and is held by every tensor that lies in it: when the view is
gone, so are they all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

MIN_NBYTES = 1 << 17
"""Batches smaller than this are better left to the allocator, which keeps such blocks."""


class _Buffer:
    __slots__ = ("memory", "user")

    def __init__(self, memory: torch.Tensor) -> None:
        # By way of torch, whose memory is aligned as its kernels like it best.
        self.memory: np.ndarray[Any, Any] = memory.numpy()
        self.user: weakref.ref[np.ndarray[Any, Any]] | None = None

    def take(self, nbytes: int) -> torch.Tensor:
        view = self.memory[:nbytes]
        self.user = weakref.ref(view)
        return torch.from_numpy(view)

    @property
    def is_free(self) -> bool:
        return self.user is None or self.user() is None


def _ordinary(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class Buffers:
    """Gives out memory, and takes it back by itself. For one thread.

    Sizes are rounded up to powers of two. With two buffers of each, it holds at most eight times
    the largest batch.

    Args:
        allocate: makes memory of so many bytes; ``None`` for ordinary memory, where small tensors
            are left to the allocator.
        per_size: how many buffers of each size; ``None`` for as many as are in use at a time.
    """

    def __init__(
        self, allocate: Callable[[int], torch.Tensor] | None = None, per_size: int | None = 2
    ) -> None:
        self._allocate = allocate or _ordinary
        self._least_nbytes = MIN_NBYTES if allocate is None else 0
        self._per_size = per_size
        self._buffers: dict[int, list[_Buffer]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Return an uninitialised CPU tensor; ``None`` where a new one is as good."""
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        if nbytes < self._least_nbytes:
            return None
        capacity = 1 << max(nbytes - 1, 0).bit_length()
        buffers = self._buffers.setdefault(capacity, [])
        for buffer in buffers:
            if buffer.is_free:
                break
        else:
            if self._per_size is not None and len(buffers) >= self._per_size:
                return None  # the policy keeps its batches
            buffer = _Buffer(self._allocate(capacity))
            buffers.append(buffer)
        return buffer.take(nbytes).view(dtype).view(shape)
