"""A policy captured as CUDA graphs: one launch per forward, whatever the number of its kernels.

A graph replays the same kernels on the same addresses. So there is one for each size a forward may
have and for each kind of batch, with inputs and outputs of its own; a batch is copied into the
inputs, and whoever takes the outputs copies them before the next replay. All graphs of a replica
share one memory pool, as one runs at a time. What records is behind :class:`Recorder`, so that
everything else here can be tested without a device.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.devices.faults import device_died, is_out_of_memory
from aioinfer.sampling import active_mode
from aioinfer.tensordicts import new_tensordict

_log = logging.getLogger("aioinfer")

_KINDS = 16
"""Kinds of batches that are captured; each takes memory, so those beyond run as they are."""


class Recorder(Protocol):
    """Records what is run on a device."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return what runs it again, with the same addresses, and what it returned."""


_one_at_a_time = threading.Lock()
"""Held for a capture: torch can make one at a time in a process, whatever the device."""


class CudaRecorder:
    """Records CUDA graphs, on the calling thread, into one memory pool.

    Args:
        device: where the policy is.
        cuda: ``torch.cuda``; another one in tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._pool: Any = None
        self._stream: Any = None

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Run it some times, to have made what is made once; then capture it."""
        cuda = self._cuda
        with _one_at_a_time, cuda.device(self._device):
            if self._pool is None:
                self._pool = cuda.graph_pool_handle()
                self._stream = cuda.Stream()
            current = cuda.current_stream()
            self._stream.wait_stream(current)
            # Where a capture fails, torch stays on its stream; leaving this block does not.
            with cuda.stream(self._stream):
                for _ in range(3):
                    run()
                graph = cuda.CUDAGraph()
                try:
                    # Other threads may use the device meanwhile, a learner for one.
                    with cuda.graph(
                        graph,
                        pool=self._pool,
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ):
                        outputs = run()
                except BaseException as error:
                    self._recover(graph)
                    # To end a capture that has failed fails too: the reason is what came first.
                    raise (error.__context__ or error) from None
            current.wait_stream(self._stream)
        return graph.replay, outputs

    def _recover(self, graph: Any) -> None:
        """Put right what torch leaves as it was during the capture, where that fails."""
        with contextlib.suppress(Exception):
            graph.reset()
        with contextlib.suppress(Exception):  # raised where torch has done this
            where = self._device.index, self._pool
            torch._C._cuda_endAllocateToPool(*where)  # or no memory is given back from now on
            torch._C._cuda_releasePool(*where)
        with contextlib.suppress(Exception):
            generator = self._cuda.default_generators[self._device.index]
            try:
                torch.empty(1, device=self._device).uniform_()
            except RuntimeError:  # before torch 2.10 or so: it takes the capture to be going on
                fresh = torch.Generator(self._device)
                fresh.set_state(generator.get_state())
                generator.graphsafe_set_state(fresh)


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
        self._graphs: dict[tuple[Kind, int], _Graph | None] = {}
        """``None`` for a size that there was no memory for."""
        self._works = True
        for kind in kinds.rows:
            if kind[0] is None:  # no sampling mode, which is set for single forwards only
                self._capture(kind)

    def __call__(self, batch: TensorDictBase) -> Any:
        """Run a forward; its outputs are overwritten by the next one."""
        kind = _kind(batch) if self._works else None
        if kind is None:
            return self._call(batch)
        key = kind, batch.batch_size[0]
        graph = self._graphs.get(key)
        if graph is None:
            return self._call(batch) if key in self._graphs else self._first(kind, batch)
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
                "the policy cannot be captured as a CUDA graph and runs as it is: %r%s",
                error,
                _place_of(error),
            )

    def _captured(self, row: dict[str, torch.Tensor], size: int) -> _Graph | None:
        try:
            leaves = {key: leaf.expand(size, *leaf.shape[1:]).clone() for key, leaf in row.items()}
            # A new TensorDict each time, for the policy may write into it.
            replay, outputs = self._recorder.record(
                lambda: self._call(new_tensordict(dict(leaves), torch.Size([size])))
            )
            _check_on_device(outputs, list(leaves.values()))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("there is no memory to capture %d rows, which run as they are", size)
            return None
        return _Graph(replay, list(leaves.values()), outputs)


def _check_on_device(outputs: Any, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse what a replay would not write again."""
    if not isinstance(outputs, TensorDictBase):
        return
    for key, leaf in outputs.items(include_nested=True, leaves_only=True):
        if any([leaf.device.type != there.device.type for there in inputs]):
            raise RuntimeError(f"it answers {key!r} from {leaf.device}, which no graph repeats")


def _place_of(error: BaseException) -> str:
    """Where in a policy's code it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if frame.filename == __file__]
    if not ours or ours[-1] == len(frames) - 1:  # not by the policy
        return ""
    last = frames[-1]
    return f", at {last.filename}:{last.lineno}: {last.line}"


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
