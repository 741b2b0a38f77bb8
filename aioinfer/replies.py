"""The answers to a batch, and how they reach the callers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any, Protocol, Self, cast

import torch
from tensordict import TensorDictBase

from aioinfer.request import ReplyPort, Request
from aioinfer.tensordicts import new_tensordict

_log = logging.getLogger("aioinfer")

_ROW = torch.Size([])

Outcome = tuple[Request, Any]
"""A request and its result or, if it is one, its exception."""


class Columns:
    """The answers to a batch, or to some of its requests, as one tensor per name.

    Args:
        by_name: the tensors; their first dimension is the rows of the whole batch.
        requests: who is answered.
        starts: for each of them, its first row.
        bare: whether they are bare rows, one after the other, and all there are.
    """

    __slots__ = ("bare", "by_name", "requests", "starts")

    def __init__(
        self,
        by_name: dict[str, torch.Tensor],
        requests: Sequence[Request],
        starts: Sequence[int],
        bare: bool,
    ) -> None:
        self.by_name = by_name
        self.requests = requests
        self.starts = starts
        self.bare = bare

    @classmethod
    def of(cls, by_name: dict[str, torch.Tensor], requests: Sequence[Request], rows: int) -> Self:
        """The answers to all requests of a batch."""
        if rows == len(requests) and not any([request.batched for request in requests]):
            return cls(by_name, requests, range(rows), True)
        starts = [0, *itertools.accumulate([request.rows for request in requests])]
        return cls(by_name, requests, starts[:-1], False)

    def of_port(self, port: ReplyPort) -> Columns:
        """Those that go through ``port``."""
        pairs = zip(self.requests, self.starts, strict=True)
        mine = [(request, start) for request, start in pairs if request.port is port]
        return Columns(self.by_name, [r for r, _ in mine], [start for _, start in mine], False)

    def results(self) -> list[TensorDictBase]:
        """One TensorDict per request."""
        names = tuple(self.by_name)
        if self.bare:
            pieces = [column.unbind(0) for column in self.by_name.values()]
            if len(names) == 2:  # an action and the version: a literal is twice as fast as a zip
                one, two = names
                return [
                    new_tensordict({one: x, two: y}, _ROW) for x, y in zip(*pieces, strict=True)
                ]
            return [
                new_tensordict(dict(zip(names, row, strict=True)), _ROW)
                for row in zip(*pieces, strict=True)
            ]
        results: list[TensorDictBase] = []
        for request, start in zip(self.requests, self.starts, strict=True):
            where: Any = slice(start, start + request.rows) if request.batched else start
            size = torch.Size([request.rows]) if request.batched else _ROW
            leaves = {name: column[where] for name, column in self.by_name.items()}
            results.append(new_tensordict(leaves, size))
        return results


class ColumnPort(ReplyPort, Protocol):
    """A port that has no use for a TensorDict per request."""

    def deliver_columns(self, columns: Columns) -> None:
        """Answer every request of ``columns`` with its rows; otherwise as :meth:`deliver`."""


Delivery = tuple[ReplyPort, Columns | Sequence[Outcome]]
"""Where answers go, and the answers."""


def deliver(port: ReplyPort, answers: Columns | Sequence[Outcome]) -> None:
    """Hand answers to a port; what goes wrong there is logged, and goes no further."""
    try:
        if isinstance(answers, Columns):
            cast("ColumnPort", port).deliver_columns(answers)
        else:
            port.deliver(answers)
    except Exception:  # a broken link must not take the others with it
        _log.exception("%r could not deliver its answers", port)
