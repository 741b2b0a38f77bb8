"""The policy as it is served: a batch is computed by one slot, which is one whole version.

A slot is a copy of the policy together with the version of its weights and with what a forward
of it really calls. A forward takes the current slot once, and computes and stamps all its rows
with that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from aioinfer.shortcut import shortcut

T = TypeVar("T")

Policy = Callable[[Any], Any]


class Slot:
    """One copy of the policy.

    Attributes:
        model: the copy.
        version: of its weights.
        call: does what ``model`` does, perhaps for less.
    """

    __slots__ = ("call", "model", "version")

    def __init__(self, model: Policy, version: int, call: Policy) -> None:
        self.model = model
        self.version = version
        self.call = call


class Slots:
    """What serves, and how it changes.

    Args:
        model: the policy, which is used as it is.
        version: the version it starts with.
        prepare: makes a slot's ``call`` of its model.
    """

    def __init__(
        self, model: Policy, version: int, prepare: Callable[[Policy], Policy] = shortcut
    ) -> None:
        self.current = Slot(model, version, prepare(model))
        """The slot of the next batch."""

    def update(self, update_fn: Callable[[Any], T], *, mark: bool) -> T:
        """Change the policy in place; only while no forward runs.

        Args:
            update_fn: called with the policy, with gradients enabled.
            mark: whether this makes a new version.

        Returns:
            What ``update_fn`` returned.
        """
        with torch.enable_grad():
            result = update_fn(self.current.model)
        if mark:
            self.current.version += 1
        return result
