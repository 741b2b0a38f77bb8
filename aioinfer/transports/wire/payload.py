"""TensorDicts as bytes: the payloads of requests and replies.

Dense tensors in a TensorDict travel as their bytes; how, says :mod:`.layouts`.
Everything else (tensorclass, non-tensor data, lazy stacks) has the layout id ``OBJECT``: u64 size
of the payload, u64 size of the pickle, the pickle, then the tensors. A tensor's place in the
pickle holds only its number, dtype, shape and offset; tensors themselves are never pickled,
save for kinds that have no such bytes (sparse, quantized, foreign subclasses).
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from aioinfer.errors import InvalidRequestError
from aioinfer.signature import Signature
from aioinfer.tensordicts import new_tensordict
from aioinfer.transports.wire.dtypes import (
    BY_DTYPE,
    BY_NUMBER,
    MAX_DIMS,
    PADS,
    RAW,
    NotDenseError,
    aligned,
    array_of,
    tensor_in,
)
from aioinfer.transports.wire.frames import WireError
from aioinfer.transports.wire.layouts import Field, Layout, layout_of

_ROW = torch.Size([])


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
        if type(leaf) in RAW:
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
        if type(obj) not in RAW:
            return None
        seen = self._seen.get(id(obj))
        if seen is not None:
            return seen[1]
        known = BY_DTYPE.get(obj.dtype)
        if known is None or obj.layout is not torch.strided or obj.is_nested:
            return None
        if obj.dim() > MAX_DIMS:
            return None
        array = np.ascontiguousarray(array_of(obj, known))
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
            known = BY_NUMBER.get(number)
            if known is None or at < 0 or at % 8:
                raise WireError(f"an object with a tensor of dtype {number} at byte {at}")
            # NumPy refuses what does not fit into the buffer.
            self._seen[index] = tensor_in(known, shape, self._tensors, at)
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
