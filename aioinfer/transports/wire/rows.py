"""Whole batches as bytes: joined from the bodies of requests, and cut into replies.

Whatever the number of requests, a batch costs a fixed number of operations on arrays; what is left
per request is a slice of bytes. There is no I/O in here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from aioinfer.transports.wire.dtypes import PADS, aligned, of_array
from aioinfer.transports.wire.layouts import Layout, layout_of
from aioinfer.transports.wire.messages import reply_heads
from aioinfer.transports.wire.payload import Packed

if TYPE_CHECKING:
    from aioinfer.request import Take

_LARGE_ROW_NBYTES = 1 << 12
"""From here on copying rows one by one costs nothing beside the copying."""


class Bodies:
    """Rows of one layout as they came: bodies in which it begins at ``start``.

    This is an :class:`aioinfer.request.Encoding`; :meth:`of` finds the one there is.
    """

    def __init__(self, layout: Layout, start: int) -> None:
        self._layout = layout
        self._start = start

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, layout: Layout, start: int) -> Self:
        """The one for this layout and start."""
        return cls(layout, start)

    def join(self, data: Sequence[Any], take: Take) -> list[torch.Tensor]:
        layout, rows = self._layout, len(data)
        size = self._start + layout.row_nbytes
        if layout.row_nbytes > _LARGE_ROW_NBYTES:
            return self.join_rows(data, [1] * rows, 0, take)
        joined = bytearray().join(data)
        found = []
        for known, shape, at, strides in layout.strided:
            if 0 in shape:
                found.append(torch.empty((rows, *shape), dtype=known.torch))
                continue
            array: np.ndarray[Any, Any] = np.ndarray(
                (rows, *shape), known.numpy, joined, self._start + at, (size, *strides)
            )
            found.append(of_array(known, np.ascontiguousarray(array)))
        return found

    def join_rows(
        self, data: Sequence[Any], rows: Sequence[int], padding: int, take: Take
    ) -> list[torch.Tensor]:
        total = sum(rows) + padding
        ats = [self._start] * len(rows)
        found = []
        for known, shape, nbytes in self._layout.row_sizes:
            tensor = take((total, *shape), known.torch)
            if tensor is None:
                tensor = torch.empty((total, *shape), dtype=known.torch)
            if nbytes:
                array = (tensor if known.carrier is None else tensor.view(known.carrier)).numpy()
                end = 0
                for body, count, at in zip(data, rows, ats, strict=True):
                    part: np.ndarray[Any, Any] = np.ndarray((count, *shape), known.numpy, body, at)
                    array[end : end + count] = part
                    end += count
                array[end:] = array[end - 1]
                ats = [at + aligned(nbytes * count) for at, count in zip(ats, rows, strict=True)]
            found.append(tensor)
        return found

    def leaves(self, data: Any, rows: int, batched: bool) -> tuple[torch.Tensor, ...]:
        return self._layout.read(data, rows, batched, self._start)


class PackedColumns:
    """The answers to a batch, made bytes once; what everybody gets is cut from them.

    Args:
        layout: of the columns.
        arrays: the columns, as :meth:`Layout.arrays` gives them.
    """

    def __init__(self, layout: Layout, arrays: list[np.ndarray[Any, Any]]) -> None:
        self.layout = layout
        self._arrays = arrays

    @classmethod
    def of(cls, columns: Mapping[str, torch.Tensor]) -> PackedColumns | None:
        """Pack columns; ``None`` if their rows must travel as objects."""
        fields = tuple([(name, leaf.shape, leaf.dtype) for name, leaf in columns.items()])
        layout = layout_of(fields, True)
        if layout is None:
            return None
        try:
            return cls(layout, layout.arrays(columns.values()))
        except Exception:  # whoever packs them one by one learns whose fault it is
            return None

    def replies(
        self,
        request_ids: Sequence[int],
        layout_ids: Sequence[int],
        *,
        room: int = 0,
        load: int = 0,
    ) -> list[bytes]:
        """The REPLY frames to bare rows."""
        count, layout = len(request_ids), self.layout
        parts: list[Sequence[bytes]] = [
            reply_heads(request_ids, layout_ids, layout.row_nbytes, room, load)
        ]
        for array, (_, _, nbytes), pad in zip(
            self._arrays, layout.row_sizes, layout.pads, strict=True
        ):
            if nbytes:
                column = array.tobytes()
                parts.append([column[at : at + nbytes] for at in range(0, count * nbytes, nbytes)])
            if pad:
                parts.append([pad] * count)
        return list(map(b"".join, zip(*parts, strict=True)))

    def rows(self, start: int, rows: int) -> Packed:
        """The payload of one request."""
        buffers: list[Any] = []
        for array, (_, _, nbytes) in zip(self._arrays, self.layout.row_sizes, strict=True):
            buffers += (
                np.ascontiguousarray(array[start : start + rows]),
                PADS[-nbytes * rows % 8],
            )
        return Packed(self.layout, self.layout.nbytes(rows), buffers)
