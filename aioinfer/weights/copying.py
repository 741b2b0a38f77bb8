"""Copying weights, on one core: the others are for the forward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from aioinfer.weights.native import give_way

_LARGE_NBYTES = 1 << 16
"""From here on torch would divide a copy among its threads, as many as there are cores."""

_STRETCH_NBYTES = 1 << 23
"""Bytes that are copied before another thread may have this one's core: about a millisecond."""


def copy_tensors(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensor by tensor."""
    small_targets, small_sources = [], []
    for target, source in zip(targets, sources, strict=True):
        nbytes = source.nbytes
        if nbytes >= _LARGE_NBYTES and _are_bytes(target, source):
            _move(target.data_ptr(), source.data_ptr(), nbytes)
        else:
            small_targets.append(target)
            small_sources.append(source)
    if small_targets:
        with torch.no_grad():
            torch._foreach_copy_(small_targets, small_sources)


def _move(target: int, source: int, nbytes: int) -> None:
    for at in range(0, nbytes, _STRETCH_NBYTES):
        ctypes.memmove(target + at, source + at, min(_STRETCH_NBYTES, nbytes - at))
        give_way()


def _are_bytes(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the memory of one is to become that of the other, as it is."""
    return (
        target.device.type == source.device.type == "cpu"
        and target.dtype == source.dtype
        and target.is_contiguous()
        and source.is_contiguous()
        and not (source.is_conj() or source.is_neg() or target.is_conj() or target.is_neg())
    )
