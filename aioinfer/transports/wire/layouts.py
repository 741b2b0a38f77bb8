"""How TensorDicts of dense tensors lie in bytes, and how two processes agree on it.

Leaves lie one after the other, each from a multiple of 8 bytes on. What is where follows from the
number of rows and the *layout*: keys, dtypes, and shapes without the row dimension. Layouts are
sent once, in a LAYOUT message that gives them an id; ids are a ring of 1024 per direction, and
since frames keep their order a sender may give an old id a new meaning at any time.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from aioinfer.signature import Signature
from aioinfer.tensordicts import new_tensordict
from aioinfer.transports.wire.dtypes import (
    BY_DTYPE,
    BY_NUMBER,
    MAX_DIMS,
    PADS,
    Dtype,
    aligned,
    array_of,
    strides_of,
    tensor_in,
)
from aioinfer.transports.wire.frames import Buffer, Cursor, Kind, WireError, frame

Key = str | tuple[str, ...]
Field = tuple[Key, torch.Size, torch.dtype]

LAYOUT_IDS = 1024
OBJECT = 0xFFFF_FFFF
"""The layout id of a payload that describes itself."""
MAX_LEAVES = 4096
MAX_ROW_NBYTES = 1 << 40

_REMEMBERED = 4096  # layouts; forgetting one costs sending it once more
_ROW = torch.Size([])


class Layout:
    """How a TensorDict of dense tensors lies in bytes, whatever its number of rows.

    Layouts that are alike are one object, as far back as the cache remembers.
    """

    __slots__ = (
        *("_flat", "_one"),
        *("fields", "keys", "pads", "row_nbytes", "row_sizes", "strided"),
    )

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self.fields = fields
        """For each leaf its key, shape without the row dimension, and dtype."""
        self.keys = tuple(field[0] for field in fields)
        self._flat = all(isinstance(key, str) for key in self.keys)
        self.row_sizes = tuple(
            (BY_DTYPE[dtype], shape, shape.numel() * dtype.itemsize) for _, shape, dtype in fields
        )
        """For each leaf what carries it, and the shape and the bytes of a row."""
        self._one = self._places(1, False)  # most requests are one bare row
        self.pads = self._pads_of(1)
        """What follows each leaf of a row, up to the next multiple of 8."""
        self.row_nbytes = sum(aligned(nbytes) for *_, nbytes in self.row_sizes)
        self.strided = tuple([(*place, strides_of(place[0], place[1])) for place in self._one])
        """For each leaf what carries it, the shape, place and strides of a row."""

    @staticmethod
    @functools.lru_cache(maxsize=_REMEMBERED)
    def of_fields(fields: tuple[Field, ...]) -> Layout | None:
        """The layout of these leaves; ``None`` if they must travel as an object."""
        return Layout(fields) if _problem(fields) is None else None

    @staticmethod
    @functools.lru_cache(maxsize=_REMEMBERED)
    def of_signature(signature: Signature) -> Layout | None:
        """The layout of requests that look like this; ``None`` if they are not plain."""
        if not signature.plain:
            return None
        fields: list[Field] = []
        for key, leaf in zip(signature.keys, signature.leaves, strict=True):
            if leaf is None:
                return None
            fields.append((key, leaf[0], leaf[1]))
        return Layout.of_fields(tuple(fields))

    def nbytes(self, rows: int = 1) -> int:
        """The size of a payload of so many rows."""
        if rows == 1:
            return self.row_nbytes
        return sum([aligned(nbytes * rows) for *_, nbytes in self.row_sizes])

    def buffers(self, leaves: Iterable[torch.Tensor], rows: int = 1) -> list[Any]:
        """The payload, in pieces to be joined. They are not copies of the leaves."""
        pads = self.pads if rows == 1 else self._pads_of(rows)
        buffers: list[Any] = []
        for array, pad in zip(self.arrays(leaves), pads, strict=True):
            buffers.append(array if array.flags.c_contiguous else np.ascontiguousarray(array))
            if pad:
                buffers.append(pad)
        return buffers

    def arrays(self, leaves: Iterable[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
        """The leaves as NumPy sees what carries them."""
        arrays = []
        for leaf, (known, _, _) in zip(leaves, self.row_sizes, strict=True):
            try:
                arrays.append((leaf if known.carrier is None else leaf.view(known.carrier)).numpy())
            except (RuntimeError, TypeError):  # not on the CPU, requires grad, conj, sparse ...
                arrays.append(array_of(leaf, known))
        return arrays

    def read(
        self,
        buffer: Any,
        rows: int = 1,
        batched: bool = False,
        start: int = 0,
        *,
        exact: bool = True,
    ) -> tuple[torch.Tensor, ...]:
        """Tensors that lie in a writable ``buffer`` from ``start`` on, without a copy.

        With ``exact`` the payload must end where the buffer does. The tensors keep the memory
        alive: an ``mmap`` under them cannot be closed.

        Raises:
            WireError: the buffer has another size.
        """
        room, nbytes = len(buffer) - start, self.nbytes(rows)
        if room < nbytes or (exact and room != nbytes):
            raise WireError(f"a payload of {rows} rows has {room} bytes, it must have {nbytes}")
        places = self._places(rows, True) if batched else self._one
        try:
            return tuple(
                [tensor_in(known, shape, buffer, start + at) for known, shape, at in places]
            )
        except (RuntimeError, TypeError, ValueError) as error:  # rows of no bytes, but too many
            raise WireError(f"a payload of {rows} rows cannot be read: {error}") from error

    def row(self, buffer: Any, start: int) -> TensorDict:
        """One bare row as a TensorDict, otherwise as :meth:`read`; the buffer is large enough."""
        if not self._flat:
            return self.tensordict(self.read(buffer, start=start, exact=False))
        leaves = {}
        for key, (known, shape, at) in zip(self.keys, self._one, strict=True):
            tensor = torch.from_numpy(np.ndarray(shape, known.numpy, buffer, start + at))
            leaves[key] = tensor if known.carrier is None else tensor.view(known.torch)
        return new_tensordict(leaves, _ROW)

    def tensordict(
        self, leaves: Iterable[torch.Tensor], rows: int = 1, batched: bool = False
    ) -> TensorDict:
        """The TensorDict with these leaves."""
        size = torch.Size([rows]) if batched else _ROW
        if self._flat:
            return new_tensordict(dict(zip(self.keys, leaves, strict=True)), size)
        tree: dict[str, Any] = {}
        for key, leaf in zip(self.keys, leaves, strict=True):
            *parents, name = _path(key)
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf
        return _tree(tree, size)

    def _places(self, rows: int, batched: bool) -> tuple[tuple[Dtype, tuple[int, ...], int], ...]:
        places, at = [], 0
        for known, shape, nbytes in self.row_sizes:
            whole = (rows, *shape) if batched else tuple(shape)
            places.append((known, whole, at if nbytes * rows else 0))
            at += aligned(nbytes * rows)
        return tuple(places)

    def _pads_of(self, rows: int) -> tuple[bytes, ...]:
        return tuple([PADS[-nbytes * rows % 8] for *_, nbytes in self.row_sizes])


@functools.lru_cache(maxsize=_REMEMBERED)
def layout_of(fields: tuple[Field, ...], batched: bool) -> Layout | None:
    """The layout of leaves whose shapes, if ``batched``, begin with the rows."""
    if batched:
        fields = tuple((key, shape[1:], dtype) for key, shape, dtype in fields)
    return Layout.of_fields(fields)


def _path(key: Key) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _tree(node: dict[str, Any], size: torch.Size) -> TensorDict:
    below = {name: _tree(x, size) if isinstance(x, dict) else x for name, x in node.items()}
    return new_tensordict(below, size)


def _problem(fields: Sequence[Field]) -> str | None:
    """Why these leaves are no layout. Asked by who sends a layout and by who receives it."""
    if len(fields) > MAX_LEAVES:
        return f"{len(fields)} leaves, allowed are {MAX_LEAVES}"
    total = 0
    paths = set()
    for key, shape, dtype in fields:
        path = _path(key)
        if not 0 < len(path) < 256 or any([len(_utf8(part)) > 0xFFFF for part in path]):
            return f"the key {str(key)[:80]!r}, which is too long or empty"
        if path in paths:
            return f"two leaves with the key {key!r}"
        paths.add(path)
        if dtype not in BY_DTYPE:
            return f"the dtype {dtype}"
        if len(shape) > MAX_DIMS or math.prod([size or 1 for size in shape]) > MAX_ROW_NBYTES:
            return f"{key!r} with the shape {list(shape)[:80]}"
        total += math.prod(shape) * dtype.itemsize
    for path in paths:
        for length in range(1, len(path)):
            if path[:length] in paths:
                return f"the key {path[:length]}, both a leaf and a parent of one"
    return f"rows of {total} bytes" if total > MAX_ROW_NBYTES else None


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # what a str can hold, a key may be


_LAYOUT = struct.Struct("<II")  # id, number of leaves
_LEAF = struct.Struct("<BBBx")  # dtype, names in the key, dimensions
_NAME = struct.Struct("<H")  # bytes; the text follows
_SIZES = [struct.Struct(f"<{dims}Q") for dims in range(MAX_DIMS + 1)]


def encode_layout(layout_id: int, layout: Layout) -> bytes:
    """A LAYOUT: from here on ``layout_id`` means ``layout``."""
    parts = [_LAYOUT.pack(layout_id, len(layout.fields))]
    for key, shape, dtype in layout.fields:
        path = _path(key)
        parts.append(_LEAF.pack(BY_DTYPE[dtype].number, len(path), len(shape)))
        for text in map(_utf8, path):
            parts += (_NAME.pack(len(text)), text)
        parts.append(_SIZES[len(shape)].pack(*shape))
    return frame(Kind.LAYOUT, *parts)


def decode_layout(body: Buffer) -> tuple[int, Layout]:
    """Layout id and layout."""
    cursor = Cursor(body)
    layout_id, count = cursor.take(_LAYOUT)
    if layout_id >= LAYOUT_IDS or count > MAX_LEAVES:
        raise WireError(f"LAYOUT with id {layout_id} and {count} leaves")
    fields: list[Field] = []
    for _ in range(count):
        number, names, dims = cursor.take(_LEAF)
        if number not in BY_NUMBER or dims > MAX_DIMS or names == 0:
            raise WireError(f"LAYOUT with dtype {number}, {names} names and {dims} dimensions")
        path = tuple([cursor.text(cursor.take(_NAME)[0]) for _ in range(names)])
        sizes = cursor.take(_SIZES[dims])
        if any([size > MAX_ROW_NBYTES for size in sizes]):  # more than torch.Size may hold
            raise WireError(f"LAYOUT with the shape {list(sizes)}")
        fields.append((path[0] if names == 1 else path, torch.Size(sizes), BY_NUMBER[number].torch))
    cursor.end()
    layout = Layout.of_fields(tuple(fields))
    if layout is None:
        raise WireError(f"LAYOUT with {_problem(fields)}")
    return layout_id, layout


class LayoutSender:
    """The ids that this side gave to layouts on one connection."""

    def __init__(self) -> None:
        self._ids: dict[Layout, int] = {}
        self._ring: list[Layout | None] = [None] * LAYOUT_IDS
        self._next = 0

    def id_of(self, layout: Layout | None) -> tuple[int, bytes | None]:
        """The id, and the frame that must be sent before it is used, if it is new.

        Frames that use an id must be sent in the order in which it was asked for.
        """
        if layout is None:
            return OBJECT, None
        known = self._ids.get(layout)
        if known is not None:
            return known, None
        new = self._next
        self._next = (new + 1) % LAYOUT_IDS
        forgotten = self._ring[new]
        if forgotten is not None:
            del self._ids[forgotten]
        self._ring[new] = layout
        self._ids[layout] = new
        return new, encode_layout(new, layout)


class LayoutReceiver:
    """What the peer's layout ids mean on one connection, right now."""

    def __init__(self) -> None:
        self._layouts: dict[int, Layout | None] = {OBJECT: None}

    def define(self, layout_id: int, layout: Layout) -> None:
        """Take note of a LAYOUT."""
        self._layouts[layout_id] = layout

    def get(self, layout_id: int) -> Layout | None:
        """The layout, ``None`` for an object.

        Raises:
            WireError: the peer has not said what this id means.
        """
        try:
            return self._layouts[layout_id]
        except KeyError:
            raise WireError(f"the layout id {layout_id} was never defined") from None
