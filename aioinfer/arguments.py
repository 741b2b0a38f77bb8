"""Checks of what users pass: errors that name the argument, the value and what is allowed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import InteractionType

MAX_PRIORITY = 1_000_000
MAX_SECONDS = threading.TIMEOUT_MAX  # what a thread can wait; some 292 years


def duration(name: str, value: Any) -> float:
    """A number of seconds that a thread can wait."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {value!r}")
    if not 0 <= value <= MAX_SECONDS:
        raise ValueError(
            f"{name} must be a finite number of seconds >= 0 and <= {MAX_SECONDS:.0f}, "
            f"got {value!r}"
        )
    return float(value)


def count(name: str, value: Any) -> int:
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def sizes(name: str, value: Any, largest: int) -> tuple[int, ...]:
    """Ascending counts that end with ``largest``."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of int or None, got {value!r}")
    found = tuple(count(name, size) for size in value)
    if not found or list(found) != sorted(set(found)) or found[-1] != largest:
        raise ValueError(
            f"{name} must be ascending and end with max_batch_size={largest}, got {value!r}"
        )
    return found


def device(name: str, value: Any) -> torch.device | None:
    """A torch device that there is, with its number if there may be several, or ``None``."""
    if value is None:
        return None
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} must be a torch device or None, got {value!r}") from error
    count = _count_of(found.type)
    if (found.index or 0) >= count:
        raise ValueError(
            f"{name} must be a device of this machine, got {value!r}; it has "
            f"{count or 'no'} {found.type} device{'s' * (count != 1)}"
        )
    if str(found) == "cuda":
        # Here, as threads have current devices of their own.
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _count_of(kind: str) -> int:
    """How many devices of a kind there are, as far as torch can say."""
    if kind in ("cpu", "meta"):
        return 1
    try:
        backend = torch.get_device_module(kind)
        return int(backend.device_count()) if backend.is_available() else 0
    except (RuntimeError, AttributeError):  # a kind that is not built in
        return 0


def devices(name: str, value: Any) -> list[torch.device]:
    """Torch devices, at least one."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of torch devices or None, got {value!r}")
    found = [device(name, one) for one in value]
    if not found or None in found:
        raise ValueError(f"{name} must hold at least one device, and no None, got {value!r}")
    return [one for one in found if one is not None]


def key(name: str, value: Any) -> Any:
    """A key of a TensorDict, or ``None``."""
    parts = value if isinstance(value, tuple) and value else (value,)
    if value is not None and not all(isinstance(part, str) for part in parts):
        raise TypeError(f"{name} must be a str, a tuple of str, or None, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def priority(value: Any) -> None:
    """Check a priority."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"priority must be an int (larger is served sooner), got {value!r}")
    if abs(value) > MAX_PRIORITY:
        raise ValueError(
            f"priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}, got {value!r}"
        )


def mode(value: Any) -> InteractionType:
    """A sampling mode, by member or by name."""
    try:
        return InteractionType(value)
    except ValueError:
        allowed = ", ".join(repr(mode.value) for mode in InteractionType)
        raise ValueError(
            f"interaction_type must be one of {allowed} or None, got {value!r}"
        ) from None
