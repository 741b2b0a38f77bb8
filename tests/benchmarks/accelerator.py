"""Rows per second on an accelerator, beside the bare forward and beside TorchRL's server.

Runs on a CUDA device where there is one and, smaller, on the CPU everywhere. Everything is measured
in one run and in turns, and what counts is the median of the rounds. For an MLP, a Nature-CNN
(uint8 frames, normalised on the device) and a transformer of 10 million parameters:

-   the bare forward on a batch that lies on the device already, eager and, on CUDA, as a graph
    that is replayed: no server can beat it, for nothing is copied;
-   aioinfer with asyncio clients of the server's process;
-   aioinfer's ``MPTransport`` with client processes that ask for several rows at once, with the
    server in this process and in one of its own;
-   TorchRL's in-process transports with threads, and its ``ProcessSlotTransport`` with processes,
    with ``static_batch_size`` on CUDA, each with the best of some settings. TorchRL counts
    requests, not rows, so its processes ask for one row at a time.

On CUDA aioinfer runs with ``cuda_graphs=True``; with the Nature-CNN, other numbers of batches in
flight than two are measured, too. Then the time that one lone request takes, beside the bare
forward of one row with its copies. The last answer of every client is compared with what the
policy says about its observation; TF32 is off, for the others as well.

    python tests/benchmarks/accelerator.py --help
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import io
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import in_process
import torch
from in_process import (
    WARM_UP_S,
    Target,
    Workload,
    asyncio_rate,
    describe_machine,
    mlp,
    note,
    off_main_thread,
    on_loop,
    print_targets,
    ratio,
    thread_rate,
    torchrl,
    typical_us,
)
from processes import Actors, Run, Task, measure
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncioTransport, InferenceServer, MPTransport, ProcessInferenceServer
from aioinfer.devices import assembly

TRIAL_S = 0.4
"""Seconds per setting in the search for TorchRL's best."""


# -- what is served -----------------------------------------------------------


class Frames(nn.Module):
    """Bytes to numbers, on the device: a byte is a quarter of what has to be copied there."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.network(frames.float() / 255)


class Transformer(nn.Module):
    """A policy that looks at the last 16 observations; 10 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 384)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, 6)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(history))[:, -1])


@torch.no_grad()
def of_bytes(network: nn.Module) -> Workload:
    """Make the workload of the Nature-CNN with frames of bytes."""
    policy = TensorDictModule(Frames(network), in_keys=["observation"], out_keys=["action"])
    policy.requires_grad_(False)
    frames = torch.randint(256, (in_process.CLIENTS, 4, 84, 84), dtype=torch.uint8)
    expected = list(policy.module(frames).unbind(0))
    return Workload("Nature-CNN 4x84x84, uint8", policy, list(frames.unbind(0)), expected)


def cnn() -> Workload:
    """The policy of most work on Atari."""
    return of_bytes(in_process.cnn().policy.module)


@torch.no_grad()
def transformer() -> Workload:
    """A policy whose forward is all that matters."""
    return Workload.of("transformer, 10M", Transformer().eval(), (16, 32))


WORKLOADS: dict[str, Callable[[], Workload]] = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where it runs, and how many ask."""

    device: torch.device
    run: Run
    rows: int
    """Rows of one request of a process."""

    @property
    def cuda(self) -> bool:
        """Whether there are graphs, and queues to wait for."""
        return self.device.type == "cuda"

    @property
    def batch_rows(self) -> int:
        """Rows of a full batch."""
        return in_process.CLIENTS

    def options(self, workload: Workload, rows: int) -> dict[str, Any]:
        """What aioinfer's server is told."""
        example = TensorDict({"observation": workload.observations[0]})
        graphs = {"cuda_graphs": True, "example": example} if self.cuda else {}
        return {"device": self.device, "max_batch_size": rows, **graphs}


# -- contenders: seconds -> rows per second -----------------------------------

Contender = Callable[[Workload, float], float]


def bare(setup: Setup, graph: bool, workload: Workload, seconds: float) -> float:
    """The policy on a batch that is on the device, and nothing else."""

    @torch.no_grad()
    def forwards() -> float:
        torch.set_num_threads(1)  # OpenMP keeps it per thread
        policy = copy.deepcopy(workload.policy.module).to(setup.device)
        batch = torch.stack(workload.observations[: setup.batch_rows]).to(setup.device)
        run: Callable[[], Any] = lambda: policy(batch)  # noqa: E731
        if graph:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    run()
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            run = captured.replay
        rate = 0.0
        for length in (WARM_UP_S, seconds):
            done, began = 0, time.perf_counter()
            while time.perf_counter() < began + length or not done:
                for _ in range(8 if setup.cuda else 1):  # the device is never without work
                    run()
                    done += 1
                if setup.cuda and done % 64 == 0:
                    torch.cuda.synchronize()
            if setup.cuda:
                torch.cuda.synchronize()
            rate = done * setup.batch_rows / (time.perf_counter() - began)
        return rate

    return off_main_thread(forwards)


def ours_asyncio(setup: Setup, workload: Workload, seconds: float) -> float:
    """This library with coroutines of the same process."""

    async def main() -> float:
        transport = AsyncioTransport()
        options = setup.options(workload, setup.batch_rows)
        policy = copy.deepcopy(workload.policy)
        async with InferenceServer(policy, transport, **options):
            clients = [transport.async_client() for _ in range(setup.batch_rows)]
            return await asyncio_rate(workload, clients, seconds)

    return on_loop(main())


def task_of(setup: Setup, workload: Workload, rows: int) -> Task:
    """What the client processes ask, each beginning with another observation."""
    count = setup.run.clients
    pairs = list(zip(workload.observations, workload.expected, strict=True))
    questions = []
    for client in range(count):
        start = client * len(pairs) // count
        own = (pairs[start:] + pairs[:start])[:rows]
        observations, actions = (torch.stack(leaf) for leaf in zip(*own, strict=True))
        one = observations[0], actions[0]
        questions.append((observations, actions) if rows > 1 else one)
    return Task(workload.name, copy.deepcopy(workload.policy), rows, questions)


def ours_processes(setup: Setup, apart: bool, workload: Workload, seconds: float) -> float:
    """This library with client processes of several rows each."""
    task = task_of(setup, workload, setup.rows)

    def contender(task: Task, seconds: float) -> Any:
        transport = MPTransport(setup.run.context)
        clients = [transport.sync_client() for _ in range(setup.run.clients)]
        options = setup.options(workload, setup.run.clients * setup.rows)
        if apart:
            make = functools.partial(served, task.policy)
            server: Any = ProcessInferenceServer(make, transport, **options)
        else:
            server = InferenceServer(task.policy, transport, **options)
        with Actors(setup.run.context, task, clients) as actors, server:
            return actors.measure(seconds)

    return measure(contender, task, seconds).rate * setup.rows


def ours_in_flight(setup: Setup, batches: int, workload: Workload, seconds: float) -> float:
    """The same, with another number of batches that a device has at a time."""
    with mock.patch.object(assembly, "IN_FLIGHT", batches):
        return ours_processes(setup, False, workload, seconds)


def served(policy: TensorDictModule) -> TensorDictModule:
    """Set up torch in a server's own process."""
    exact()
    return policy


def theirs_threads(
    setup: Setup, slots: bool, settings: dict[str, Any], workload: Workload, seconds: float
) -> float:
    """TorchRL's server with threads of the same process."""
    count = setup.batch_rows
    transport = torchrl.SlotTransport(count) if slots else torchrl.ThreadingTransport()
    options = torchrl_options(setup, workload, count) | settings
    server = torchrl.InferenceServer(copy.deepcopy(workload.policy), transport, **options).start()
    try:
        clients = [transport.client() for _ in range(count)]
        return thread_rate(workload, clients, seconds)
    finally:
        server.shutdown()


def theirs_processes(
    setup: Setup, settings: dict[str, Any], workload: Workload, seconds: float
) -> float:
    """TorchRL's server with processes that ask for one row."""
    count = setup.run.clients

    def contender(task: Task, seconds: float) -> Any:
        observation, action = (leaf.clone() for leaf in task.questions[0])
        version = torch.zeros((), dtype=torch.long)
        transport = torchrl.ProcessSlotTransport(
            TensorDict({"observation": observation}),
            TensorDict({"action": action, "policy_version": version}),
            num_slots=count,
            ctx=setup.run.context,
        )
        clients = [transport.client() for _ in range(count)]
        options = torchrl_options(setup, workload, count) | settings
        server = torchrl.InferenceServer(task.policy, transport, **options)
        with Actors(setup.run.context, task, clients) as actors, server:
            return actors.measure(seconds)

    return measure(contender, task_of(setup, workload, 1), seconds).rate


def torchrl_options(setup: Setup, workload: Workload, count: int) -> dict[str, Any]:
    """What TorchRL's server is told."""
    options: dict[str, Any] = {"max_batch_size": count}
    if setup.cuda:
        options |= {
            "policy_device": setup.device,
            "output_device": "cpu",
            "static_batch_size": count,
            "request_spec": TensorDict({"observation": workload.observations[0]}),
        }
    return options


def torchrl_settings(count: int) -> list[dict[str, Any]]:
    """What is tried: its default, and to wait for everybody, for long or not so long."""
    return [
        {"min_batch_size": 1},  # the default has a timeout of 0.01
        {"min_batch_size": count, "timeout": 0.01},
        {"min_batch_size": count, "timeout": 0.002},
    ]


def lone_request_us(setup: Setup, workload: Workload, seconds: float) -> float:
    """What one asyncio client waits for its answer, when it is the only one."""

    async def main() -> float:
        options = setup.options(workload, setup.batch_rows)
        policy = copy.deepcopy(workload.policy)
        async with InferenceServer(policy, AsyncioTransport(), **options) as server:
            client = server.async_client()
            td = TensorDict({"observation": workload.observations[0]})
            return await typical_us(lambda: client(td), seconds)

    return on_loop(main())


def bare_request_us(setup: Setup, workload: Workload, seconds: float) -> float:
    """The bare forward of one row, with its copies."""

    @torch.no_grad()
    def forwards() -> float:
        torch.set_num_threads(1)  # OpenMP keeps it per thread
        policy = copy.deepcopy(workload.policy.module).to(setup.device)
        row = workload.observations[0].unsqueeze(0)
        row = row.pin_memory() if setup.cuda else row
        durations: list[float] = []
        until = time.perf_counter() + WARM_UP_S + seconds
        while (began := time.perf_counter()) < until or not durations:
            policy(row.to(setup.device, non_blocking=True)).cpu()
            durations.append(time.perf_counter() - began)
        return statistics.median(durations[len(durations) // 5 :]) * 1e6

    return off_main_thread(forwards)


# -- the rounds ---------------------------------------------------------------

EAGER = "bare forward, eager"
REPLAY = "bare forward, graph replay"
ASYNCIO = "aioinfer, asyncio clients"
HERE = "aioinfer, processes, server here"
APART = "aioinfer, processes, server in a process"
FLIGHTS = "the server here with {} in flight"
LONE = "aioinfer, one request"
BARE_LONE = "bare forward of one row, with copies"
IN_PROCESS = "TorchRL, threads"
PROCESSES = "TorchRL, processes of one row, ProcessSlotTransport"


@dataclasses.dataclass
class Group:
    """The contenders on one policy, and their rounds."""

    workload: Workload
    contenders: dict[str, Contender]
    unit: str
    rounds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """The median of a contender's rounds, if it was measured."""
        return statistics.median(self.rounds[name]) if self.rounds.get(name) else None

    def best(self, prefix: str) -> float | None:
        """The best median of those whose names begin so."""
        names = [name for name in self.rounds if name.startswith(prefix)]
        return max((found for n in names if (found := self.median(n)) is not None), default=None)

    def measure(self, name: str, seconds: float) -> None:
        """Run one contender once."""
        try:
            figure = self.contenders[name](self.workload, seconds)
        except Exception as error:
            note(f"{self.workload.name}, {name}: {error!r}")
            return
        self.rounds.setdefault(name, []).append(figure)


def rates(setup: Setup, workload: Workload, apart: bool) -> Group:
    """Put the contenders for rows per second together; try TorchRL's settings."""
    contenders: dict[str, Contender] = {EAGER: functools.partial(bare, setup, False)}
    if setup.cuda:
        contenders[REPLAY] = functools.partial(bare, setup, True)
    contenders[ASYNCIO] = functools.partial(ours_asyncio, setup)
    contenders[HERE] = functools.partial(ours_processes, setup, False)
    if apart:
        contenders[APART] = functools.partial(ours_processes, setup, True)
    if setup.cuda and "CNN" in workload.name:
        for batches in (1, 3, 4):
            contenders[FLIGHTS.format(batches)] = functools.partial(ours_in_flight, setup, batches)
    group = Group(workload, contenders, "rows/s")
    if torchrl is not None:
        kinds: dict[str, tuple[Callable[..., float], int]] = {
            f"{IN_PROCESS}, ThreadingTransport": (
                functools.partial(theirs_threads, setup, False),
                setup.batch_rows,
            ),
            f"{IN_PROCESS}, SlotTransport": (
                functools.partial(theirs_threads, setup, True),
                setup.batch_rows,
            ),
            PROCESSES: (functools.partial(theirs_processes, setup), setup.run.clients),
        }
        for name, (make, count) in kinds.items():
            trials = Group(workload, {}, "rows/s")
            for settings in torchrl_settings(count):
                trials.contenders[str(settings)] = functools.partial(make, settings)
                trials.measure(str(settings), TRIAL_S)
            tried = {label: round(rates[0]) for label, rates in trials.rounds.items()}
            note(f"{workload.name}, {name}: tried {tried}")
            if tried:
                best = max(tried, key=lambda label: tried[label])
                contenders[f"{name}, {best}"] = trials.contenders[best]
    return group


def run_rounds(groups: Sequence[Group], rounds: int, seconds: float) -> None:
    """Measure everybody in turns; each round begins with another contender."""
    turns = [(group, name) for group in groups for name in group.contenders]
    for index in range(rounds):
        note(f"round {index + 1} of {rounds}")
        start = index % len(turns)
        for group, name in turns[start:] + turns[:start]:
            group.measure(name, seconds)


def targets(setup: Setup, groups: dict[str, Group], lone: Group) -> list[Target]:
    """What the project wants; on the CPU there are no targets, only figures."""
    found = []
    if (group := groups.get("cnn")) is not None and setup.cuda:
        ours = group.best("aioinfer, processes")
        share = None if ours is None else ratio(ours, group.median(REPLAY))
        found.append(Target("processes, CNN: of the bare replay", share, 0.85, None))
        idle = None if share is None else 100 * (1 - share)
        found.append(Target("the same: % of the time without a forward", idle, 15, None, False))
        asyncio_rate = group.median(ASYNCIO)
        times = None if asyncio_rate is None else ratio(asyncio_rate, group.best(IN_PROCESS))
        found.append(Target("asyncio, CNN: times TorchRL in process", times, 5, None))
    one, alone = lone.median(LONE), lone.median(BARE_LONE)
    if setup.cuda:
        added = None if one is None or alone is None else one - alone
        found.append(Target("one request: µs added", added, 150, None, False))
    return found


def exact() -> None:
    """Let forwards of other sizes, and on other devices, give the same to some digits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    there = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Measure aioinfer on an accelerator.")
    parser.add_argument("--device", default="cuda" if there else "cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument(
        "--clients", type=int, default=256 if there else 16, help="in process; default: %(default)s"
    )
    parser.add_argument("--processes", type=int, default=16 if there else 2)
    parser.add_argument("--rows", type=int, default=16 if there else 8, help="of a process")
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=list(WORKLOADS),
        default=list(WORKLOADS) if there else ["mlp", "cnn"],
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line there too")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="on CUDA, write what is printed there too"
    )
    args, others = parser.parse_known_args(argv)
    if others:  # `make bench ARGS=...` gives every benchmark the same options
        note(f"not an option of this benchmark: {' '.join(others)}")
    for name in ("rounds", "clients", "processes", "rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.rows > args.clients:
        parser.error(f"--rows must be at most --clients={args.clients}, got {args.rows}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, report; return the exit status."""
    args = parse(argv)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compare(args)
    print(printed.getvalue())
    if args.report is not None and args.device != "cpu":
        args.report.write_text(printed.getvalue(), encoding="utf-8")
    return 0


def compare(args: argparse.Namespace) -> None:
    """Measure, and print what was found."""
    torch.set_num_threads(1)
    exact()
    torch.manual_seed(0)
    in_process.CLIENTS = args.clients
    # Once CUDA runs in this process it cannot be forked.
    method = "spawn" if args.device != "cpu" else "fork"
    run = Run(multiprocessing.get_context(method), args.processes)
    setup = Setup(torch.device(args.device), run, args.rows)
    machine = describe_machine()
    device = torch.cuda.get_device_name(setup.device) if setup.cuda else "CPU"
    print(datetime.date.today().isoformat())
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(f"{device}; {args.clients} clients in process; {args.processes} processes x {args.rows}")
    workloads = {name: off_main_thread(WORKLOADS[name]) for name in args.policies}
    groups = {name: rates(setup, w, apart=True) for name, w in workloads.items()}
    first = next(iter(workloads.values()))
    contenders: dict[str, Contender] = {
        LONE: functools.partial(lone_request_us, setup),
        BARE_LONE: functools.partial(bare_request_us, setup),
    }
    lone = Group(first, contenders, "µs")
    run_rounds([*groups.values(), lone], args.rounds, args.seconds)
    for group in (*groups.values(), lone):
        print(f"\n{group.workload.name:84}{group.unit:>12}{'min':>12}{'max':>12}{'of bare':>9}")
        base = group.median(REPLAY) or group.median(EAGER)
        for name, figures in group.rounds.items():
            share = "" if base is None else f"{statistics.median(figures) / base:9.2f}"
            line = f"  {name:82}{statistics.median(figures):12,.0f}"
            print(f"{line}{min(figures):12,.0f}{max(figures):12,.0f}{share}")
    wanted = targets(setup, groups, lone)
    if wanted:
        print_targets(wanted)
    paths = ("json", "report")
    options = {key: value for key, value in vars(args).items() if key not in paths}
    figures = {group.workload.name: group.rounds for group in groups.values()}
    report = {"benchmark": "accelerator", "device": device, **machine, "options": options}
    line = json.dumps({**report, "rounds": figures, "lone": lone.rounds})
    print("\n" + line)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
