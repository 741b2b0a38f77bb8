"""A policy captured as CUDA graphs: one launch per forward, whatever the number of its kernels.

A graph replays the same kernels on the same addresses. So there is one for each size a forward may
have and for each kind of batch, with inputs and outputs of its own; a batch is copied into the
inputs, and whoever takes the outputs copies them before the next replay. All graphs of a replica
share one memory pool, as one runs at a time. What records is behind :class:`Recorder`, so that
everything else here can be tested without a device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.devices.faults import device_died
from aioinfer.sampling import active_mode
from aioinfer.tensordicts import new_tensordict

_log = logging.getLogger("aioinfer")

_KINDS = 16
"""Kinds of batches that are captured; each takes memory, so those beyond run as they are."""


class Recorder(Protocol):
    """Records what is run on a device."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return what runs it again, with the same addresses, and what it returned."""


class CudaRecorder:
    """Records CUDA graphs, on the calling thread, into one memory pool.

    Args:
        device: where the policy is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Run it some times, to have made what is made once; then capture it."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(3):
                    run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile, a learner for one.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = run()
            current.wait_stream(self._stream)
        return graph.replay, outputs


Kind = tuple[Any, ...]


class Kinds:
    """The kinds of batches that were seen, each with a row, for all slots of a replica."""

    def __init__(self) -> None:
        self.rows: dict[Kind, dict[str, torch.Tensor]] = {}


class _Graph:
    __slots__ = ("inputs", "outputs", "replay")

    def __init__(
        self, replay: Callable[[], None], inputs: Sequence[torch.Tensor], outputs: Any
    ) -> None:
        self.replay = replay
        self.inputs = inputs
        self.outputs = outputs


class Graphs:
    """Calls a policy by its graphs; one object for each copy of the policy.

    When a kind of batch is seen first, graphs of all sizes are captured, while that batch waits;
    kinds that other copies have seen are captured at once. Where capturing fails, the policy is
    called as it is from then on, and one warning says why.

    Args:
        call: the policy.
        sizes: the sizes a forward may have.
        recorder: records.
        kinds: what is shared with the other copies of the policy.
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        sizes: Sequence[int],
        recorder: Recorder,
        kinds: Kinds,
    ) -> None:
        self._call = call
        self._sizes = sizes
        self._recorder = recorder
        self._kinds = kinds
        self._graphs: dict[tuple[Kind, int], _Graph] = {}
        self._works = True
        for kind in kinds.rows:
            if kind[0] is None:  # no sampling mode, which is set for single forwards only
                self._capture(kind)

    def __call__(self, batch: TensorDictBase) -> Any:
        """Run a forward; its outputs are overwritten by the next one."""
        kind = _kind(batch) if self._works else None
        if kind is None:
            return self._call(batch)
        graph = self._graphs.get((kind, batch.batch_size[0]))
        if graph is None:
            return self._first(kind, batch)
        for static, leaf in zip(graph.inputs, batch.values(), strict=True):
            static.copy_(leaf, non_blocking=True)
        graph.replay()
        return graph.outputs

    def _first(self, kind: Kind, batch: TensorDictBase) -> Any:
        row = {key: leaf[:1].clone() for key, leaf in batch.items()}
        size = batch.batch_size[0]
        answer = self._call(batch)  # an error of the policy, or of this request, is raised here
        rows = self._kinds.rows
        if size in self._sizes and (kind in rows or len(rows) < _KINDS):
            rows[kind] = row
            self._capture(kind)
        return answer

    def _capture(self, kind: Kind) -> None:
        row = self._kinds.rows[kind]
        try:
            with torch.no_grad():
                for size in reversed(self._sizes):  # the largest first: its memory holds the rest
                    self._graphs[kind, size] = self._captured(row, size)
        except Exception as error:
            if device_died(error) is not None:
                raise
            self._works = False
            self._graphs.clear()
            _log.warning(
                "the policy cannot be captured as a CUDA graph and runs as it is: %r", error
            )

    def _captured(self, row: dict[str, torch.Tensor], size: int) -> _Graph:
        leaves = {key: leaf.expand(size, *leaf.shape[1:]).clone() for key, leaf in row.items()}
        inputs = list(leaves.values())
        # A new TensorDict each time, for the policy may write into it.
        replay, outputs = self._recorder.record(
            lambda: self._call(new_tensordict(dict(leaves), torch.Size([size])))
        )
        return _Graph(replay, inputs, outputs)


def _kind(batch: Any) -> Kind | None:
    """What distinguishes batches besides their size; ``None`` for what is not captured."""
    if type(batch) is not TensorDict:
        return None
    leaves = []
    for key, leaf in batch.items():
        if type(leaf) is not torch.Tensor:
            return None
        leaves.append((key, leaf.shape[1:], leaf.dtype))
    return (active_mode(), *leaves)
