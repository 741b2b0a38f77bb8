"""What a request looks like: the part of it that decides who may share its batch.

Two requests can be concatenated along rows exactly when their leaves have the same names,
trailing shapes, dtypes and devices; and one forward can serve both only if they ask for the
same sampling mode. That is their *signature*. Signatures are interned, so comparing and
hashing them, done several times per request, is comparing object identities.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import (
    TensorDict,
    TensorDictBase,
    is_leaf_nontensor,
    is_non_tensor,
    is_tensor_collection,
    is_tensorclass,
)
from tensordict.nn import InteractionType

from aioinfer.errors import InvalidRequestError

_ROW = torch.Size([])


def entries(td: TensorDict) -> Mapping[str, Any]:
    """The entries of one level; the dictionary itself, which is half the price of items()."""
    entries: Mapping[str, Any] = getattr(td, "_tensordict", td)
    return entries


# Signatures remembered at a time. Forgetting one is harmless: the next request that looks
# like it gets a new object, and for a moment two queues hold what could have been one.
_REMEMBERED = 4096


class Signature:
    """The looks of one row.

    Attributes:
        keys: the leaf names, sorted; a nested leaf is a tuple of names.
        leaves: for each key the (trailing shape, dtype, device) of one row's tensor, or
            ``None`` for non-tensor data.
        mode: the sampling mode the forward must run under, or ``None`` for the policy's own.
        kind: the tensorclass, or ``None`` for any other collection.
        plain: whether it is one level of plain tensors in a TensorDict: the fast path.
    """

    __slots__ = ("keys", "kind", "leaves", "mode", "plain")

    def __init__(
        self,
        keys: tuple[Any, ...],
        leaves: tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...],
        mode: InteractionType | None,
        plain: bool,
        kind: type | None,
    ) -> None:
        self.keys = keys
        self.leaves = leaves
        self.mode = mode
        self.plain = plain
        self.kind = kind

    def __str__(self) -> str:
        """Describe it for a person, e.g. ``observation: float32[4]``."""
        described = [
            f"{_name(key)}: {'non-tensor' if leaf is None else _leaf(leaf)}"
            for key, leaf in zip(self.keys, self.leaves, strict=True)
        ]
        if self.mode is not None:
            described.append(f"interaction_type={self.mode.value}")
        return ", ".join(described) or "no entries"


def describe(td: Any, mode: InteractionType | None) -> tuple[Any, int, bool, Signature]:
    """Look at a request once.

    Args:
        td: TensorDict, tensorclass or lazy stack with batch size ``[]`` or ``[K]``, K >= 1.
        mode: the sampling mode its caller asks for.

    Returns:
        The data to keep (a tuple of leaves, in the order of the signature's keys, where the
        signature is plain), the number of rows, whether it has a batch dimension, and the
        signature.

    Raises:
        TypeError: ``td`` is not a TensorDict or tensorclass.
        InvalidRequestError: more than one batch dimension, zero rows, an unusable device, or
            a lazy stack whose rows differ in shape.
    """
    if type(td) is not TensorDict:
        return _describe_other(td, mode)
    batch_size = td.batch_size
    fields = []
    leaves = []
    key: Any = None
    try:
        for key, leaf in entries(td).items():
            if type(leaf) is not torch.Tensor:
                return _describe_other(td, mode)
            fields.append((key, leaf.shape, leaf.dtype, leaf.device))
            leaves.append(leaf)
    except RuntimeError as error:  # a nested tensor
        raise InvalidRequestError(
            f"{key!r} has no shape ({error}); allowed are tensors with a fixed shape"
        ) from error
    batched = batch_size != _ROW
    rows = _rows(batch_size) if batched else 1
    signature, order = _plain_signature(tuple(fields), batched, mode)
    if order is not None:
        leaves = [leaves[i] for i in order]
    return tuple(leaves), rows, batched, signature


@functools.lru_cache(maxsize=_REMEMBERED)
def _plain_signature(
    fields: tuple[tuple[str, torch.Size, torch.dtype, torch.device], ...],
    batched: bool,
    mode: InteractionType | None,
) -> tuple[Signature, tuple[int, ...] | None]:
    """Intern a plain signature; also say how to reorder leaves to it, or ``None``."""
    order = tuple(sorted(range(len(fields)), key=lambda i: fields[i][0]))
    leaves = tuple(
        (shape[1:] if batched else shape, dtype, _usable(key, device))
        for key, shape, dtype, device in (fields[i] for i in order)
    )
    signature = _intern(tuple(fields[i][0] for i in order), leaves, mode, True, None)
    return signature, None if order == tuple(range(len(fields))) else order


@functools.lru_cache(maxsize=_REMEMBERED)
def _intern(
    keys: tuple[Any, ...],
    leaves: tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...],
    mode: InteractionType | None,
    plain: bool,
    kind: type | None,
) -> Signature:
    return Signature(keys, leaves, mode, plain, kind)


def _describe_other(
    td: Any, mode: InteractionType | None
) -> tuple[TensorDictBase, int, bool, Signature]:
    """Nested, lazy, tensorclass and non-tensor requests: correct rather than fast."""
    if not is_tensor_collection(td) or is_non_tensor(td):
        raise TypeError(f"a request must be a TensorDict or a tensorclass, got {type(td).__name__}")
    batch_size = td.batch_size
    batched = len(batch_size) > 0
    rows = _rows(batch_size) if batched else 1
    try:
        items = list(td.items(include_nested=True, leaves_only=True, is_leaf=is_leaf_nontensor))
    except RuntimeError as error:
        raise InvalidRequestError(
            "the rows of a request must be alike, but this lazy stack cannot be stacked: "
            f"{error}; send its rows one by one"
        ) from error
    fields: list[tuple[Any, tuple[torch.Size, torch.dtype, torch.device] | None]] = []
    for key, leaf in sorted(items, key=lambda item: _name(item[0])):
        if isinstance(leaf, torch.Tensor):
            shape = leaf.shape[1:] if batched else leaf.shape
            fields.append((key, (shape, leaf.dtype, _usable(key, leaf.device))))
        else:
            fields.append((key, None))
    kind: Any = type(td) if is_tensorclass(td) else None
    signature = _intern(
        tuple(key for key, _ in fields), tuple(leaf for _, leaf in fields), mode, False, kind
    )
    return td, rows, batched, signature


def _rows(batch_size: torch.Size) -> int:
    if len(batch_size) > 1:
        raise InvalidRequestError(
            f"batch_size is {list(batch_size)}, allowed are [] (one row) and [K] (K rows); "
            "flatten the leading dimensions with td.reshape(-1)"
        )
    if batch_size[0] == 0:
        raise InvalidRequestError("batch_size is [0]; a request needs at least one row")
    return batch_size[0]


def _usable(key: Any, device: torch.device) -> torch.device:
    if device.type == "meta":
        raise InvalidRequestError(
            f"{_name(key)} is on device 'meta', which holds no values; "
            "allowed are tensors on a real device"
        )
    return device


def _name(key: Any) -> str:
    return ".".join(key) if isinstance(key, tuple) else str(key)


def _leaf(leaf: tuple[torch.Size, torch.dtype, torch.device]) -> str:
    shape, dtype, device = leaf
    where = "" if device.type == "cpu" else f" on {device}"
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}{where}"
