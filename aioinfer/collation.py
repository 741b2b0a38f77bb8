"""Requests to one batch, and the policy's answer back to one result per request.

Plain requests (one level of tensors, see :mod:`aioinfer.signature`) are handled leaf by
leaf: one ``stack`` and one ``unbind`` per leaf whatever the number of requests. Building a
TensorDict per row first would cost ten times that. Where requests come from another process,
not even a tensor per row is made: their bytes are joined, and the answers stay whole columns.
Everything else (nested, tensorclass, lazy stack, non-tensor data, a ``collate_fn``) goes
through TensorDict's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection

from aioinfer.buffers import Buffers
from aioinfer.errors import ModelError
from aioinfer.replies import Columns
from aioinfer.request import Request
from aioinfer.signature import Signature, entries
from aioinfer.tensordicts import new_tensordict

CollateFn = Callable[[list[TensorDictBase]], TensorDictBase]

STALE_KEY = "policy_stale"
"""Where a reply says whether the weights were older than they should be."""

_ROW = torch.Size([])


class Collator:
    """Builds batches and takes results apart.

    Args:
        collate_fn: makes a batch of a list of single rows; ``None`` stacks them.
        device: where the batch goes; ``None`` leaves it where the requests are.
        output_device: where the results go; ``None`` leaves them where the policy put them.
        out_keys: what a result holds; ``None`` means all that the policy returned.
        version_key: under which the policy version is added, ``None`` for not at all.
        return_inputs: whether a result holds the request's own entries too.
        buffers: memory for batches; ``None`` for ordinary memory.
        lend: told of each tensor of a result; ``None`` where nobody needs to know.
    """

    def __init__(
        self,
        *,
        collate_fn: CollateFn | None,
        device: torch.device | None,
        output_device: torch.device | None,
        out_keys: Sequence[Any] | None,
        version_key: Any,
        return_inputs: bool,
        buffers: Buffers | None = None,
        lend: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._collate_fn = collate_fn
        self._device = device
        self._output_device = output_device
        self._out_keys = None if out_keys is None else [key for key in out_keys if key != "_"]
        self._plain_out_keys = all(isinstance(key, str) for key in self._out_keys or ())
        self._version_key = version_key
        self._return_inputs = return_inputs
        self._buffers = Buffers() if buffers is None else buffers
        self._lend = lend

    # -- requests to a batch ------------------------------------------------

    def collate(self, requests: Sequence[Request], rows: int, size: int) -> TensorDictBase:
        """Concatenate the rows of requests of one signature, in order.

        The last row is repeated until there are ``size``, where that is more than ``rows``.

        Raises:
            ModelError: the ``collate_fn`` made something else than ``size`` rows.
        """
        signature: Signature = requests[0].signature  # type: ignore[assignment]
        if signature.plain and self._collate_fn is None:
            batch: TensorDictBase = new_tensordict(
                self.gather(requests, rows, size), torch.Size([size])
            )
        else:
            singles = [row for request in requests for row in _rows_of(request)]
            singles += singles[-1:] * (size - rows)
            if self._collate_fn is None:
                batch = torch.stack(singles)
            else:
                batch = self._collate_fn(singles)
                _check_rows(batch, size, "collate_fn")
        return batch if self._device is None else batch.to(self._device)

    def gather(self, requests: Sequence[Request], rows: int, size: int) -> dict[str, torch.Tensor]:
        """The leaves of :meth:`collate` for plain requests, where the requests are."""
        signature: Signature = requests[0].signature  # type: ignore[assignment]
        padding = size - rows
        encoding = requests[0].encoding
        if encoding is not None:
            data = [request.data for request in requests if request.encoding is encoding]
            if len(data) == len(requests):
                if rows == len(data) and not any([request.batched for request in requests]):
                    data += data[-1:] * padding
                    joined = encoding.join(data, self._buffers.take)
                else:
                    counts = [request.rows for request in requests]
                    joined = encoding.join_rows(data, counts, padding, self._buffers.take)
                return dict(zip(signature.keys, joined, strict=True))
        bare = not any([request.batched for request in requests])
        batch = {}
        apart = [leaves_of(request) for request in requests]
        for i, key in enumerate(signature.keys):
            shape, dtype, device = signature.leaves[i]  # type: ignore[misc]  # plain: not None
            out = self._buffers.take((size, *shape), dtype) if device.type == "cpu" else None
            leaves = [leaves[i] for leaves in apart]
            if bare:
                batch[key] = torch.stack(leaves + leaves[-1:] * padding, out=out)
            else:
                leaves = [
                    leaf if request.batched else leaf.unsqueeze(0)
                    for request, leaf in zip(requests, leaves, strict=True)
                ]
                batch[key] = torch.cat(leaves + [leaves[-1][-1:]] * padding, out=out)
        return batch

    # -- the answer to results ----------------------------------------------

    def split(
        self,
        answer: Any,
        requests: Sequence[Request],
        rows: int,
        size: int,
        version: int,
        stale: bool | None = None,
    ) -> Columns | list[TensorDictBase]:
        """Take the policy's answer apart, in the order of the requests; drop padded rows.

        ``stale`` says whether the weights are older than they should be; ``None`` adds nothing
        to the results.

        Returns:
            One result per request or, where a request has simply its rows of plain tensors,
            the columns that hold them.

        Raises:
            ModelError: the answer is not a TensorDict of ``size`` rows with all out_keys.
        """
        columns = self.columns(answer, size)
        if columns is not None:
            if size > rows:
                columns = {key: column[:rows] for key, column in columns.items()}
            return self.answers(columns, requests, rows, version, stale)
        results = self._split_any(answer, requests, version, stale)
        if self._return_inputs:
            results = [_with_inputs(r, result) for r, result in zip(requests, results, strict=True)]
        return results

    def columns(self, answer: Any, size: int) -> dict[str, torch.Tensor] | None:
        """The answer as one tensor of ``size`` rows per name; ``None`` where it is not that simple.

        The tensors are where ``output_device`` says, and nobody else's.

        Raises:
            ModelError: as :meth:`split`.
        """
        _check_rows(answer, size, "the policy")
        return self._columns(answer)

    def answers(
        self,
        columns: dict[str, torch.Tensor],
        requests: Sequence[Request],
        rows: int,
        version: int,
        stale: bool | None = None,
    ) -> Columns | list[TensorDictBase]:
        """Of columns without padding what :meth:`split` returns."""
        if self._version_key is not None:
            columns[self._version_key] = torch.full((rows,), version)
        if stale is not None:
            columns[STALE_KEY] = torch.full((rows,), stale)
        answers = Columns.of(columns, requests, rows)
        if not self._return_inputs:
            return answers
        results = answers.results()
        return [_with_inputs(r, result) for r, result in zip(requests, results, strict=True)]

    def _columns(self, answer: TensorDictBase) -> dict[str, torch.Tensor] | None:
        """The leaves of the answer by name, if they are all plain tensors of one level."""
        if not self._plain_out_keys or not isinstance(self._version_key, str | None):
            return None
        if self._out_keys is None:
            if type(answer) is not TensorDict:  # a tensorclass stays one
                return None
            leaves = dict(answer.items())
        elif type(answer) is TensorDict:
            found = entries(answer)
            leaves = {key: found.get(key) for key in self._out_keys}
        else:
            leaves = {key: answer.get(key, None) for key in self._out_keys}
        columns = {}
        for key, leaf in leaves.items():
            if type(leaf) is not torch.Tensor:
                return None
            columns[key] = self._outbound(leaf)
        return columns

    def _outbound(self, leaf: torch.Tensor) -> torch.Tensor:
        moved = leaf if self._output_device is None else leaf.to(self._output_device)
        if moved is leaf:
            # It may belong to the policy, which writes its next answer there (`out=`, a graph),
            # and its rows may share memory (`expand`): a reply belongs to its caller alone.
            moved = leaf.clone(memory_format=torch.contiguous_format)
        if self._lend is not None:
            self._lend(moved)
        return moved

    def handed_over(self, result: TensorDictBase) -> TensorDictBase:
        """Return a result of memory of its own, which is its caller's from now on."""
        if self._lend is not None:
            for leaf in result.values(include_nested=True, leaves_only=True):
                if isinstance(leaf, torch.Tensor):
                    self._lend(leaf)
        return result

    def _split_any(
        self,
        answer: TensorDictBase,
        requests: Sequence[Request],
        version: int,
        stale: bool | None,
    ) -> list[TensorDictBase]:
        if self._out_keys is not None:
            missing = [key for key in self._out_keys if answer.get(key, None) is None]
            if missing:
                raise ModelError(
                    f"the policy did not write {missing!r} of its out_keys {self._out_keys!r}"
                )
            selected = TensorDict({}, batch_size=answer.batch_size[:1])
            for key in self._out_keys:
                selected.set(key, answer.get(key))
            answer = selected
        else:
            answer = answer.copy()
        if self._output_device is not None:
            answer = answer.to(self._output_device)
        if self._version_key is not None:
            answer.set(self._version_key, torch.full(answer.batch_size, version))
        if stale is not None:
            answer.set(STALE_KEY, torch.full(answer.batch_size, stale))
        results = []
        start = 0
        for request in requests:
            piece = answer[start : start + request.rows] if request.batched else answer[start]
            results.append(self.handed_over(piece.clone()))
            start += request.rows
        return results


def leaves_of(request: Request) -> tuple[torch.Tensor, ...]:
    """The leaves of a plain request, in the order of its signature's keys."""
    encoding = request.encoding
    if encoding is None:
        leaves: tuple[torch.Tensor, ...] = request.data
        return leaves
    return encoding.leaves(request.data, request.rows, request.batched)


def tensordict_of(request: Request) -> TensorDictBase:
    """The request's rows as the TensorDict its caller sent."""
    signature: Signature = request.signature  # type: ignore[assignment]
    if not signature.plain:
        return request.data
    size = torch.Size([request.rows]) if request.batched else _ROW
    return new_tensordict(dict(zip(signature.keys, leaves_of(request), strict=True)), size)


def _rows_of(request: Request) -> list[TensorDictBase]:
    td = tensordict_of(request)
    return list(td.unbind(0)) if request.batched else [td]


def _with_inputs(request: Request, result: TensorDictBase) -> TensorDictBase:
    both = tensordict_of(request).copy()
    both.update(result)
    return both


def _check_rows(answer: Any, rows: int, who: str) -> None:
    if not is_tensor_collection(answer):
        raise ModelError(
            f"{who} returned {type(answer).__name__}, expected a TensorDict of {rows} rows"
        )
    batch_size = answer.batch_size
    if not batch_size or batch_size[0] != rows:
        raise ModelError(f"{who} returned batch_size {list(batch_size)} for a batch of {rows} rows")
