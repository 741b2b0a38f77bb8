"""TensorDicts as bytes: the payloads of requests and replies.

Dense tensors in a TensorDict travel as their bytes, one leaf after the other, each
from a multiple of 8 bytes on. What is where follows from the number of rows and the *layout*:
keys, dtypes, and shapes without the row dimension. Layouts are sent once, in a LAYOUT message
that gives them an id; ids are a ring of 1024 per direction, and since frames keep their order a
sender may give an old id a new meaning at any time.

Everything else (tensorclass, non-tensor data, lazy stacks) has the layout id ``OBJECT``: u64 size
of the payload, u64 size of the pickle, the pickle, then the tensors. A tensor's place in the
pickle holds only its number, dtype, shape and offset; tensors themselves are never pickled,
save for kinds that have no such bytes (sparse, quantized, foreign subclasses).
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import operator
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict

from aioinfer.errors import InvalidRequestError
from aioinfer.signature import Signature
from aioinfer.tensordicts import new_tensordict
from aioinfer.transports.wire import (
    Buffer,
    Cursor,
    Kind,
    WireError,
    frame,
)

Key = str | tuple[str, ...]
Field = tuple[Key, torch.Size, torch.dtype]

LAYOUT_IDS = 1024
OBJECT = 0xFFFF_FFFF
"""The layout id of a payload that describes itself."""
MAX_LEAVES = 4096
MAX_DIMS = 31  # and one for the rows: what every numpy can hold
MAX_ROW_NBYTES = 1 << 40

_REMEMBERED = 4096  # layouts; forgetting one costs sending it once more
_ROW = torch.Size([])
PADS = [bytes(size) for size in range(8)]


# -- layouts ------------------------------------------------------------------


class _Dtype(NamedTuple):
    """How elements are carried: NumPy has no word for some, there an int of their size is."""

    number: int
    torch: torch.dtype
    numpy: np.dtype[Any]
    carrier: torch.dtype | None


# A dtype's number on the wire is its place here: append only.
_NUMPY_HAS = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_NUMPY_LACKS = (
    *("bfloat16", "complex32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
)
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _known_dtypes() -> dict[int, _Dtype]:
    found = {}
    for number, name in enumerate(_NUMPY_HAS + _NUMPY_LACKS):
        dtype = getattr(torch, name, None)
        if dtype is None:  # younger than this torch
            continue
        carrier = None if name in _NUMPY_HAS else _CARRIERS[dtype.itemsize]
        carried = np.dtype(name if carrier is None else str(carrier).removeprefix("torch."))
        found[number] = _Dtype(number, dtype, carried, carrier)
    return found


_BY_NUMBER = _known_dtypes()
_BY_DTYPE = {known.torch: known for known in _BY_NUMBER.values()}

# What may be taken for its bytes alone. A subclass that we do not know may mean more.
_RAW = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, MemoryMappedTensor})


class NotDenseError(Exception):
    """A leaf has no plain bytes: sparse or the like."""


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
            (_BY_DTYPE[dtype], shape, shape.numel() * dtype.itemsize) for _, shape, dtype in fields
        )
        """For each leaf what carries it, and the shape and the bytes of a row."""
        self._one = self._places(1, False)  # most requests are one bare row
        self.pads = self._pads_of(1)
        """What follows each leaf of a row, up to the next multiple of 8."""
        self.row_nbytes = sum(aligned(nbytes) for *_, nbytes in self.row_sizes)
        self.strided = tuple([(*place, _strides(place[0], place[1])) for place in self._one])
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
                arrays.append(_array(leaf, known))
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
            return tuple([_tensor(known, shape, buffer, start + at) for known, shape, at in places])
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

    def _places(self, rows: int, batched: bool) -> tuple[tuple[_Dtype, tuple[int, ...], int], ...]:
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


def aligned(nbytes: int) -> int:
    """The next multiple of 8."""
    return -(-nbytes // 8) * 8


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
        if dtype not in _BY_DTYPE:
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
        parts.append(_LEAF.pack(_BY_DTYPE[dtype].number, len(path), len(shape)))
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
        if number not in _BY_NUMBER or dims > MAX_DIMS or names == 0:
            raise WireError(f"LAYOUT with dtype {number}, {names} names and {dims} dimensions")
        path = tuple([cursor.text(cursor.take(_NAME)[0]) for _ in range(names)])
        sizes = cursor.take(_SIZES[dims])
        if any([size > MAX_ROW_NBYTES for size in sizes]):  # more than torch.Size may hold
            raise WireError(f"LAYOUT with the shape {list(sizes)}")
        fields.append(
            (path[0] if names == 1 else path, torch.Size(sizes), _BY_NUMBER[number].torch)
        )
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


# -- tensors and their bytes --------------------------------------------------


def _array(tensor: torch.Tensor, known: _Dtype) -> np.ndarray[Any, Any]:
    """The elements of any dense tensor, as NumPy sees them."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise NotDenseError
    if tensor.device.type == "meta":
        raise InvalidRequestError("a tensor on device 'meta' holds no values to send")
    tensor = tensor.as_subclass(torch.Tensor).detach().cpu().resolve_conj().resolve_neg()
    array: np.ndarray[Any, Any]
    array = (tensor if known.carrier is None else tensor.view(known.carrier)).numpy()
    return array


def _tensor(known: _Dtype, shape: tuple[int, ...], buffer: Any, at: int) -> torch.Tensor:
    """A tensor that lies in the buffer."""
    # By way of NumPy: any shape in one step, and it holds the memory (torch.frombuffer lets go).
    return of_array(known, np.ndarray(shape, known.numpy, buffer, at))


def of_array(known: _Dtype, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor that lies in the memory of what carries it."""
    tensor = torch.from_numpy(array)
    return tensor if known.carrier is None else tensor.view(known.torch)


def _strides(known: _Dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in bytes, of a dense array."""
    sizes = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=known.torch.itemsize)
    return tuple(sizes)[::-1][: len(shape)] if shape else ()


class Packed:
    """A payload on its way out: its layout (``None`` for an object), its size, its pieces."""

    __slots__ = ("buffers", "layout", "nbytes")

    def __init__(self, layout: Layout | None, nbytes: int, buffers: list[Any]) -> None:
        self.layout = layout
        self.nbytes = nbytes
        self.buffers = buffers

    def write(self, view: memoryview) -> None:
        """Copy it into a slot."""
        # NumPy copies in this thread. torch may use a pool of threads, which a forked child lacks.
        at = 0
        for buffer in self.buffers:
            array = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)
            if array.nbytes:
                np.ndarray(array.shape, array.dtype, view, at)[...] = array
                at += array.nbytes


def pack_described(data: Any, rows: int, batched: bool, signature: Signature) -> Packed:
    """What :func:`aioinfer.signature.describe` returned, as a payload.

    Raises:
        InvalidRequestError: it cannot leave the process.
    """
    layout = Layout.of_signature(signature)
    if layout is not None:
        try:
            return Packed(layout, layout.nbytes(rows), layout.buffers(data, rows))
        except NotDenseError:
            pass
    if signature.plain:
        size = torch.Size([rows]) if batched else _ROW
        return _pack_object(new_tensordict(dict(zip(signature.keys, data, strict=True)), size))
    return pack(data)


def pack(td: Any) -> Packed:
    """Any TensorDict or tensorclass with batch size ``[]`` or ``[K]``, as a payload.

    Raises:
        InvalidRequestError: it cannot leave the process.
    """
    fields: list[Field] = []
    leaves: list[torch.Tensor] = []
    if type(td) is TensorDict and _flatten(td, td.batch_size, (), fields, leaves):
        rows = td.batch_size.numel()
        layout = layout_of(tuple(fields), len(td.batch_size) == 1)
        if layout is not None:
            return Packed(layout, layout.nbytes(rows), layout.buffers(leaves, rows))
    return _pack_object(td)


def _flatten(
    td: TensorDict,
    size: torch.Size,
    above: tuple[str, ...],
    fields: list[Field],
    leaves: list[torch.Tensor],
) -> bool:
    """Gather the leaves; false if a layout cannot say all there is."""
    if len(size) > 1 or (size and any([name is not None for name in td.names])):
        return False
    for name, leaf in td.items():
        if type(leaf) in _RAW:
            if leaf.layout is not torch.strided or leaf.is_nested:
                return False
            fields.append(((*above, name) if above else name, leaf.shape, leaf.dtype))
            leaves.append(leaf)
        elif (
            type(leaf) is not TensorDict
            or leaf.batch_size != size
            or leaf.is_empty()
            or not _flatten(leaf, size, (*above, name), fields, leaves)
        ):
            return False
    return True


# -- objects ------------------------------------------------------------------

_OBJECT = struct.Struct("<QQ")  # bytes of the payload, bytes of the pickle


class _Pickler(pickle.Pickler):
    """Pickles a structure and leaves the tensors out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.buffers: list[Any] = []
        self.nbytes = 0
        # The tensor is kept, too: while it lives no other object can have its id.
        self._seen: dict[int, tuple[torch.Tensor, tuple[Any, ...]]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) not in _RAW:
            return None
        seen = self._seen.get(id(obj))
        if seen is not None:
            return seen[1]
        known = _BY_DTYPE.get(obj.dtype)
        if known is None or obj.layout is not torch.strided or obj.is_nested:
            return None
        if obj.dim() > MAX_DIMS:
            return None
        array = np.ascontiguousarray(_array(obj, known))
        place = (len(self._seen), known.number, tuple(obj.shape), self.nbytes)
        self.buffers += (array, PADS[-array.nbytes % 8])
        self.nbytes += aligned(array.nbytes)
        self._seen[id(obj)] = (obj, place)
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: memoryview) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._seen: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        index, number, shape, at = pid
        if index not in self._seen:
            known = _BY_NUMBER.get(number)
            if known is None or at < 0 or at % 8:
                raise WireError(f"an object with a tensor of dtype {number} at byte {at}")
            # NumPy refuses what does not fit into the buffer.
            self._seen[index] = _tensor(known, shape, self._tensors, at)
        return self._seen[index]


def _pack_object(td: Any) -> Packed:
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(td)
    except Exception as error:
        raise InvalidRequestError(
            f"this {type(td).__name__} cannot be sent to another process, because it cannot be "
            f"pickled: {type(error).__name__}: {error}"
        ) from error
    pickled = file.getbuffer()
    pad = PADS[-len(pickled) % 8]
    nbytes = _OBJECT.size + len(pickled) + len(pad) + pickler.nbytes
    head = _OBJECT.pack(nbytes, len(pickled))
    return Packed(None, nbytes, [head, pickled, pad, *pickler.buffers])


def unpack_object(buffer: Any, start: int = 0, *, exact: bool = True) -> Any:
    """What was packed without a layout; its tensors lie in ``buffer``, which is writable.

    Unpickling runs code that the sender chose. Give it nothing but what came from a peer that
    showed the token in its HELLO.

    Raises:
        WireError: the sizes do not fit.
        InvalidRequestError: it cannot be rebuilt here, for instance because its class cannot be
            imported in this process. The connection is none the worse for it.
    """
    room = len(buffer) - start
    if room < _OBJECT.size:
        raise WireError(f"an object has {room} bytes, it must have {_OBJECT.size} or more")
    nbytes, pickled = _OBJECT.unpack_from(buffer, start)
    tensors = _OBJECT.size + aligned(pickled)
    if nbytes > room or (exact and nbytes != room) or tensors > nbytes:
        raise WireError(f"an object of {nbytes} bytes, {pickled} of them pickled, has {room} bytes")
    view = memoryview(buffer)[start : start + nbytes]
    file = io.BytesIO(view[_OBJECT.size : _OBJECT.size + pickled])
    try:
        try:
            return _Unpickler(file, view[tensors:]).load()
        finally:
            _validate_sparse_tensors()
    except WireError:
        raise
    except Exception as error:
        raise InvalidRequestError(
            f"an object from another process cannot be rebuilt here: "
            f"{type(error).__name__}: {error}"
        ) from error


# torch keeps every sparse tensor that is unpickled, to check it at the end of a torch.load.
_validate_sparse_tensors: Callable[[], object] = getattr(
    torch._utils, "_validate_loaded_sparse_tensors", lambda: None
)
