"""Tensors as bytes, and bytes as tensors: which dtypes there are, and what NumPy sees of them."""

from __future__ import annotations

import itertools
import operator
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import MemoryMappedTensor

from aioinfer.errors import InvalidRequestError

MAX_DIMS = 31  # and one for the rows: what every numpy can hold
PADS = [bytes(size) for size in range(8)]


class Dtype(NamedTuple):
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


def _known_dtypes() -> dict[int, Dtype]:
    found = {}
    for number, name in enumerate(_NUMPY_HAS + _NUMPY_LACKS):
        dtype = getattr(torch, name, None)
        if dtype is None:  # younger than this torch
            continue
        carrier = None if name in _NUMPY_HAS else _CARRIERS[dtype.itemsize]
        carried = np.dtype(name if carrier is None else str(carrier).removeprefix("torch."))
        found[number] = Dtype(number, dtype, carried, carrier)
    return found


BY_NUMBER = _known_dtypes()
BY_DTYPE = {known.torch: known for known in BY_NUMBER.values()}

# What may be taken for its bytes alone. A subclass that we do not know may mean more.
RAW = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, MemoryMappedTensor})


class NotDenseError(Exception):
    """A leaf has no plain bytes: sparse or the like."""


def aligned(nbytes: int) -> int:
    """The next multiple of 8."""
    return -(-nbytes // 8) * 8


def array_of(tensor: torch.Tensor, known: Dtype) -> np.ndarray[Any, Any]:
    """The elements of any dense tensor, as NumPy sees them."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise NotDenseError
    if tensor.device.type == "meta":
        raise InvalidRequestError("a tensor on device 'meta' holds no values to send")
    tensor = tensor.as_subclass(torch.Tensor).detach().cpu().resolve_conj().resolve_neg()
    array: np.ndarray[Any, Any]
    array = (tensor if known.carrier is None else tensor.view(known.carrier)).numpy()
    return array


def tensor_in(known: Dtype, shape: tuple[int, ...], buffer: Any, at: int) -> torch.Tensor:
    """A tensor that lies in the buffer."""
    # By way of NumPy: any shape in one step, and it holds the memory (torch.frombuffer lets go).
    return of_array(known, np.ndarray(shape, known.numpy, buffer, at))


def of_array(known: Dtype, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor that lies in the memory of what carries it."""
    tensor = torch.from_numpy(array)
    return tensor if known.carrier is None else tensor.view(known.torch)


def strides_of(known: Dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in bytes, of a dense array."""
    sizes = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=known.torch.itemsize)
    return tuple(sizes)[::-1][: len(shape)] if shape else ()
