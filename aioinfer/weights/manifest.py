"""What weights consist of, and whether they fit: names, shapes, dtypes, ties, extra state.

Leaves are parameters and buffers, persistent or not. A tensor that has several names is one
leaf, under the first of them; the others are ties. What :func:`torch.compile` adds to names is
left out, so a compiled model and a plain one have the same leaves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aioinfer.errors import WeightSyncError

EXTRA_STATE = "_extra_state"
"""The last part of the name of a module's extra state, as in a state dict."""
_SHOWN = 6
"""Faults that a message names, at most."""


class Leaf(NamedTuple):
    """One tensor of the weights."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool = True
    """Whether a state dict holds it."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name!r} ({dtype}{list(self.shape)})"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a set of weights consists of.

    Attributes:
        leaves: the tensors, in an order of their own.
        ties: pairs of a further name of a tensor and the name under which it is a leaf.
        extra: the names of extra states (``get_extra_state`` of a module).
    """

    leaves: tuple[Leaf, ...]
    ties: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The size of all leaves together."""
        return sum(leaf.nbytes for leaf in self.leaves)


Plan = Sequence[int | None]
"""For each leaf that is served, which leaf of those offered it becomes; ``None``: it stays."""


def plan(served: Manifest, offered: Manifest, *, cast: bool, partial: bool) -> Plan:
    """Find for each leaf of ``served`` the one of ``offered`` that goes there.

    A buffer that is not persistent may be missing: state dicts do not hold them.

    Args:
        served: what there is.
        offered: what comes.
        cast: whether other dtypes are converted.
        partial: whether leaves may be missing.

    Raises:
        WeightSyncError: it does not fit; the message names what is missing, unexpected, of
            another shape or dtype.
    """
    if offered == served:
        return range(len(served.leaves))
    known = {leaf.name: index for index, leaf in enumerate(offered.leaves)}
    found: list[int | None] = []
    faults = []
    for leaf in served.leaves:
        index = known.pop(leaf.name, None)
        found.append(index)
        if index is None:
            if leaf.persistent and not partial:
                faults.append(f"{leaf} is missing")
        else:
            faults += _differences(leaf, offered.leaves[index], cast=cast)
    faults += [f"{offered.leaves[index]} is not known here" for index in known.values()]
    faults += _other_ties(served, offered, partial=partial)
    faults += [
        f"extra state {name!r} is missing"
        for name in served.extra
        if not partial and name not in offered.extra
    ]
    faults += [
        f"extra state {name!r} is not known here"
        for name in offered.extra
        if name not in served.extra
    ]
    if faults:
        raise WeightSyncError(f"the weights do not fit: {shortened(faults)}")
    return found


def shortened(faults: Sequence[str]) -> str:
    """Name the first faults, and how many more there are."""
    more = len(faults) - _SHOWN
    return "; ".join(faults[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _differences(served: Leaf, offered: Leaf, *, cast: bool) -> list[str]:
    if offered.shape != served.shape:
        return [f"{served} was offered with shape {list(offered.shape)}"]
    if offered.dtype != served.dtype and not cast:
        dtype = str(offered.dtype).removeprefix("torch.")
        return [f"{served} was offered as {dtype}; cast=True would convert it"]
    return []


def _other_ties(served: Manifest, offered: Manifest, *, partial: bool) -> list[str]:
    """Names that are one tensor on one side and two on the other are never one by chance."""
    here, there = set(served.ties), set(offered.ties)
    faults = [f"{a!r} and {b!r} are one tensor there, and two here" for a, b in there - here]
    if not partial:
        faults += [f"{a!r} and {b!r} are one tensor here, and two there" for a, b in here - there]
    return sorted(faults)
