"""Copying weights, on one core: the others are for the forward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

_LARGE_NBYTES = 1 << 16
"""From here on torch would divide a copy among its threads, as many as there are cores."""


def copy_tensors(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensor by tensor."""
    small_targets, small_sources = [], []
    for target, source in zip(targets, sources, strict=True):
        nbytes = source.nbytes
        if nbytes >= _LARGE_NBYTES and _are_bytes(target, source):
            ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
        else:
            small_targets.append(target)
            small_sources.append(source)
    if small_targets:
        with torch.no_grad():
            torch._foreach_copy_(small_targets, small_sources)


def _are_bytes(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the memory of one is to become that of the other, as it is."""
    return (
        target.device.type == source.device.type == "cpu"
        and target.dtype == source.dtype
        and target.is_contiguous()
        and source.is_contiguous()
        and not (source.is_conj() or source.is_neg() or target.is_conj() or target.is_neg())
    )
