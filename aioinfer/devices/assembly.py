"""What a server's arguments about its policy come to: replicas, each made of parts that fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import aioinfer.arguments as arguments
from aioinfer.clock import Clock
from aioinfer.collation import Collator
from aioinfer.devices.compiling import Compiled
from aioinfer.devices.graphs import CudaRecorder, Graphs, Kinds, Recorder
from aioinfer.devices.replicas import Replicas, replicate
from aioinfer.devices.staging import IN_FLIGHT, CudaLane, Lane, StagedForward, pinned
from aioinfer.executor import Executor, ThreadExecutor
from aioinfer.forward import ForwardPass
from aioinfer.near import NearExecutor
from aioinfer.request import Request, Source
from aioinfer.seeding import Seeded
from aioinfer.shortcut import shortcut
from aioinfer.signature import describe
from aioinfer.weights.slots import Policy, Slots
from aioinfer.weights.streams import CudaStreams

_CPU = torch.device("cpu")
_VECTOR = 16
"""Rows by which no CPU kernel ends in a remainder, which may be rounded in another way."""


def forward_sizes(
    batch_sizes: Any, fixed_batch: Any, cuda_graphs: Any, largest: int
) -> tuple[int, ...] | None:
    """The sizes that a forward may have; ``None`` for any."""
    if not arguments.flag("fixed_batch", fixed_batch):
        if batch_sizes is None:
            doubled = [1 << i for i in range(largest.bit_length()) if 1 << i < largest]
            return (*doubled, largest) if arguments.flag("cuda_graphs", cuda_graphs) else None
        return arguments.sizes("batch_sizes", batch_sizes, largest)
    if batch_sizes is not None:
        raise ValueError(f"fixed_batch=True leaves no choice of batch_sizes, got {batch_sizes!r}")
    return (-(-largest // _VECTOR) * _VECTOR,)


def example_request(example: Any) -> Request:
    """A request that nobody waits for."""
    data, rows, batched, signature = describe(example, None)
    if batched:
        raise ValueError(f"example must be one row, with batch_size [], got {rows} rows")
    return Request(data, rows, batched, signature, None, 0, Source(), None)


def assemble(
    model: Policy,
    version: int,
    *,
    device: Any,
    devices: Any,
    output_device: Any,
    fixed_batch: bool,
    compile: Any,
    cuda_graphs: bool,
    sizes: Sequence[int] | None,
    executor: Executor | None,
    clock: Clock,
    **collation: Any,
) -> Replicas:
    """Make the replicas of a server.

    Args:
        model: the policy.
        version: the version it starts with.
        device: as of the server, like those that follow.
        devices: see there.
        output_device: see there.
        fixed_batch: see there.
        compile: see there.
        cuda_graphs: see there.
        sizes: the sizes a forward may have; ``None`` for any.
        executor: runs the batches of the one replica; ``None`` for threads.
        clock: measures forwards.
        collation: what each :class:`~aioinfer.collation.Collator` is told besides.
    """
    places = _places(device, devices)
    if executor is not None and len(places) > 1:
        raise ValueError(f"executor runs one replica, but there are {len(places)} devices")
    targets = _targets(output_device, places)
    if fixed_batch and _on_cpu(places) and torch.get_num_threads() > 1:
        warnings.warn(_THREADS, RuntimeWarning, stacklevel=3)
    options = _compile_options(compile)
    if cuda_graphs and not all(_records(place) for place in places):
        raise ValueError(f"cuda_graphs=True needs CUDA devices, got {[str(p) for p in places]}")
    slots: list[Slots] = []
    forwards: list[ForwardPass] = []
    executors: list[Executor] = []
    for place, target, copy in zip(places, targets, _placed(model, places), strict=True):
        lane = None if executor is not None else _lane(place)
        # Where replies go to yet another device, that is one step more than is staged.
        staged = lane is not None and collation["collate_fn"] is None
        staged = staged and target in (None, _CPU, place)
        near = lane is None and place in (None, _CPU) and len(places) == 1
        # A loop that computes keeps other replicas waiting, and a device has a thread that uses it.
        run_by = NearExecutor() if near else ThreadExecutor(IN_FLIGHT if staged else 1)
        executors.append(executor or run_by)
        on_cuda = place is not None and place.type == "cuda"
        recorder = CudaRecorder(place) if cuda_graphs and place is not None else None
        slots.append(
            Slots(
                copy,
                version,
                preparation(options, recorder, sizes),
                executors[-1].call,
                CudaStreams(place) if place is not None and on_cuda else None,
            )
        )
        collator = partial(Collator, **collation)
        if lane is None or place is None:
            plain = collator(device=place, output_device=target)
            forwards.append(ForwardPass(slots[-1], plain, clock, sizes))
        else:
            forwards.append(
                _queued_forward(slots[-1], collator, clock, sizes, lane, place, target, staged)
            )
    return Replicas(slots, forwards, executors)


def _queued_forward(
    slots: Slots,
    collator: Callable[..., Collator],
    clock: Clock,
    sizes: Sequence[int] | None,
    lane: Lane,
    place: torch.device,
    target: torch.device | None,
    staged: bool,
) -> StagedForward:
    brings_back = target == _CPU
    lend = lane.lend if not brings_back and target in (None, place) else None
    there = collator(device=place, output_device=target, lend=lend)
    here = collator(device=None, output_device=None, buffers=pinned(lane), lend=lend)
    return StagedForward(
        slots,
        there,
        clock,
        sizes,
        here if staged else None,
        lane,
        place,
        brings_back=brings_back,
    )


def _lane(place: torch.device | None) -> Lane | None:
    """The queues of a device that has some."""
    return CudaLane(place) if place is not None and place.type == "cuda" else None


_THREADS = (
    "fixed_batch=True: some of torch's CPU kernels divide a batch among threads at places that "
    "change how a row is rounded; call torch.set_num_threads(1) for results that are the same to "
    "the last bit"
)


def _places(device: Any, devices: Any) -> list[torch.device | None]:
    """Where the replicas are; ``[None]`` for one that stays where it is."""
    if devices is None:
        return [arguments.device("device", device)]
    if device is not None:
        raise ValueError(f"give either device or devices, got {device!r} and {devices!r}")
    return list(arguments.devices("devices", devices))


def _targets(
    output_device: Any, places: Sequence[torch.device | None]
) -> list[torch.device | None]:
    """Where the replies of each replica go; ``None`` for where the policy leaves them."""
    found = arguments.device("output_device", output_device)
    if found is None:
        return [None if _on_cpu(places) else _CPU] * len(places)
    # "cuda", without a number, is the device that the replica is on.
    unnumbered = torch.device(output_device).index is None
    return [
        place if unnumbered and place is not None and place.type == found.type else found
        for place in places
    ]


def _on_cpu(places: Sequence[torch.device | None]) -> bool:
    # "meta" holds no values that could be brought back.
    return all(place is None or place.type in ("cpu", "meta") for place in places)


def _records(place: torch.device | None) -> bool:
    return place is not None and place.type == "cuda"


def _placed(model: Policy, places: Sequence[torch.device | None]) -> list[Policy]:
    """One policy per place."""
    found = [place for place in places if place is not None]
    if len(found) > 1:
        return list(replicate(model, found))
    if found and isinstance(model, torch.nn.Module):
        model.to(found[0])
    return [model]


def _compile_options(compile: Any) -> Mapping[str, Any] | None:
    """The arguments of ``torch.compile``; ``None`` for not compiling."""
    if isinstance(compile, Mapping):
        return compile
    if not isinstance(compile, bool):
        raise TypeError(
            f"compile must be a bool, or a dict of torch.compile's arguments, got {compile!r}"
        )
    return {} if compile else None


def preparation(
    compile: Mapping[str, Any] | None, recorder: Recorder | None, sizes: Sequence[int] | None
) -> Callable[[Policy], Policy]:
    """Return what makes a slot's ``call`` of its copy of the policy.

    Args:
        compile: arguments of :func:`torch.compile`; ``None`` for not compiling.
        recorder: records graphs; ``None`` for none.
        sizes: the sizes a forward may have.
    """
    kinds = Kinds()

    def prepare(model: Policy) -> Policy:
        eager = shortcut(model)
        call = eager if compile is None else Compiled(model, eager, compile)
        call = Seeded(call, eager)
        return call if recorder is None else Graphs(call, sizes or (), recorder, kinds)

    return prepare
