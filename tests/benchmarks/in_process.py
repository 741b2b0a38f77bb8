"""Requests per second and latency, beside TorchRL's server and beside the bare forward.

Everything is measured in one run and in turns, several rounds each, because only ratios within
one run mean anything; what counts is the median of the rounds. Contenders, with 32 clients:

-   aioinfer with asyncio clients (uvloop where installed), without and with ``own_loop=True``, by
    which short forwards run on the clients' loop, and with threads;
-   TorchRL's server with ``ThreadingTransport`` and with ``SlotTransport(32)``, each with the
    settings that turned out best in a short trial of several (see ``TORCHRL_SETTINGS``);
-   the bare forward: the same policy on a batch of 32 rows that is already stacked, under
    ``no_grad`` and with nothing else running. No server can beat it.

All clients do the same: a loop that asks, and asks again once the answer is here. A client asks
with a TensorDict made beforehand, for what is measured is the server; with ``--fresh`` it wraps
its observation in a new one for every request, as an actor does, which adds the cost of
TensorDict's constructor to both sides. An answer counts if it arrives within the measured time.
The last answer of every client is compared with what the policy says about its observation. The
policy's parameters do not require gradients, for TorchRL's server runs the policy without
``no_grad`` and would record a graph; both count their own statistics.

Torch computes with one thread unless ``--torch-threads`` says otherwise, for everybody. With
more, its OpenMP helpers spin on the cores that the clients need, and how they spin depends on
which thread of the process computed first, not on the contender: the bare forward alone then
varies threefold with the order, and a hundredfold where anything else runs. For the same reason
every forward is on a thread that ends with its measurement, never on the main thread.

Then one asyncio client on its own, beside one ``run_in_executor`` round trip with the bare
forward of one row in it; and the CPU time of idle servers.

    python tests/benchmarks/in_process.py --help
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncioTransport, InferenceServer, ThreadingTransport

try:
    from uvloop import new_event_loop

    LOOP = "uvloop"
except ImportError:  # uvloop does not exist for every platform
    from asyncio import new_event_loop

    LOOP = "asyncio"

try:
    from torchrl.modules import inference_server as torchrl
except ImportError:
    torchrl = None

T = TypeVar("T")
SyncClient = Callable[[TensorDictBase], TensorDictBase]

CLIENTS = 32
FRESH = False
"""Whether every request is a new TensorDict; set by ``--fresh``."""
WARM_UP_S = 0.2
TRIAL_S = 0.4
"""Seconds per setting in the search for TorchRL's best."""
BUSY = 0.05
"""Share of the machine's CPU that others may use before a warning is printed."""
IDLE_LIMIT = 0.001
"""Share of one core that counts as no measurable CPU."""

TORCHRL_SETTINGS: list[dict[str, Any]] = [
    {"min_batch_size": 1},  # its default, with a timeout of 0.01
    {"min_batch_size": CLIENTS, "timeout": 0.01},
    {"min_batch_size": CLIENTS, "timeout": 0.002},
    {"min_batch_size": CLIENTS // 2, "timeout": 0.002},
]


# -- what is served -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Workload:
    """A policy, and for every client the observation it asks about."""

    name: str
    policy: TensorDictModule
    observations: list[torch.Tensor]
    expected: list[torch.Tensor]

    @classmethod
    def of(cls, name: str, network: nn.Module, shape: tuple[int, ...]) -> Workload:
        """Make a policy of `network` and random observations of `shape`."""
        network.requires_grad_(False)
        policy = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
        observations = list(torch.randn(CLIENTS, *shape).unbind(0))
        return cls(name, policy, observations, list(network(torch.stack(observations)).unbind(0)))

    def batch(self, rows: int) -> TensorDict:
        """Return the first observations, stacked."""
        stacked = torch.stack(self.observations[:rows])
        return TensorDict({"observation": stacked}, batch_size=[rows])

    def check(self, answers: Sequence[TensorDictBase]) -> None:
        """Fail if a client did not get its own rows."""
        for answer, expected in zip(answers, self.expected, strict=True):
            torch.testing.assert_close(answer["action"], expected, rtol=1e-3, atol=1e-4)


def mlp() -> Workload:
    """The small policy: the server's own costs show."""
    network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    return Workload.of("MLP 8-64-4", network, (8,))


def cnn() -> Workload:
    """The large policy: the forward's costs dominate."""
    network = nn.Sequential(
        *(nn.Conv2d(4, 32, 8, stride=4), nn.ReLU()),
        *(nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 6)),
    )
    return Workload.of("Nature-CNN 4x84x84", network, (4, 84, 84))


WORKLOADS = {"mlp": mlp, "cnn": cnn}


# -- clients ------------------------------------------------------------------


def requests(observation: torch.Tensor) -> Iterator[TensorDict]:
    """What a client of any library asks with, one request after the other; see ``--fresh``."""
    request = TensorDict({"observation": observation})
    while True:
        yield request
        if FRESH:
            request = TensorDict({"observation": observation})


def ask(client: SyncClient, observation: torch.Tensor, until: float) -> tuple[int, TensorDictBase]:
    """Ask until `until`; return how many answers came in time, and the last one."""
    for answered, request in enumerate(requests(observation)):
        answer = client(request)
        if time.perf_counter() > until:
            return answered, answer
    raise AssertionError("requests never end")


async def ask_async(
    client: Any, observation: torch.Tensor, until: float
) -> tuple[int, TensorDictBase]:
    """Do as :func:`ask` does, as a coroutine."""
    for answered, request in enumerate(requests(observation)):
        answer = await client(request)
        if time.perf_counter() > until:
            return answered, answer
    raise AssertionError("requests never end")


def thread_rate(workload: Workload, clients: Sequence[SyncClient], seconds: float) -> float:
    """Answers per second of all clients together, each on a thread of its own."""
    lengths = iter((WARM_UP_S, seconds))
    until = 0.0

    def begin() -> None:
        nonlocal until
        until = time.perf_counter() + next(lengths)

    barrier = threading.Barrier(len(clients), action=begin)

    def actor(client: SyncClient, observation: torch.Tensor) -> tuple[int, TensorDictBase]:
        try:
            barrier.wait()
            ask(client, observation, until)
            barrier.wait()
            return ask(client, observation, until)
        except BaseException:
            barrier.abort()  # or the others would wait for ever
            raise

    with ThreadPoolExecutor(len(clients)) as pool:
        results = list(pool.map(actor, clients, workload.observations))
    workload.check([answer for _, answer in results])
    return sum(answered for answered, _ in results) / seconds


async def asyncio_rate(workload: Workload, clients: Sequence[Any], seconds: float) -> float:
    """Answers per second of all clients together, each a task."""
    results: list[tuple[int, TensorDictBase]] = []
    for length in (WARM_UP_S, seconds):
        until = time.perf_counter() + length
        pairs = zip(clients, workload.observations, strict=True)
        results = await asyncio.gather(*(ask_async(c, o, until) for c, o in pairs))
    workload.check([answer for _, answer in results])
    return sum(answered for answered, _ in results) / seconds


# -- contenders: seconds -> a figure ------------------------------------------


def on_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a new event loop of the best kind there is."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def where_it_computes(main: Callable[[], Coroutine[Any, Any, T]], own_loop: bool) -> T:
    """Run `main` on an event loop, which is on the main thread unless forwards run on it."""
    return off_main_thread(lambda: on_loop(main())) if own_loop else on_loop(main())


def off_main_thread(function: Callable[[], T]) -> T:
    """Call `function` on a thread of its own; see the top of this file."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@contextlib.contextmanager
def threads_end() -> Iterator[None]:
    """Wait for the threads that the block has started; fail if one does not end."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5.0)
        if thread.is_alive():
            raise RuntimeError(f"{thread.name} still runs after its server was shut down")


def aioinfer_asyncio(workload: Workload, seconds: float, *, own_loop: bool = False) -> float:
    """Requests per second of this library's asyncio clients."""

    async def main() -> float:
        transport = AsyncioTransport()
        policy = workload.policy
        async with InferenceServer(policy, transport, max_batch_size=CLIENTS, own_loop=own_loop):
            clients = [transport.async_client() for _ in range(CLIENTS)]
            return await asyncio_rate(workload, clients, seconds)

    return where_it_computes(main, own_loop)


def aioinfer_threads(workload: Workload, seconds: float) -> float:
    """Requests per second of this library's thread clients."""
    transport = ThreadingTransport()
    with InferenceServer(workload.policy, transport, max_batch_size=CLIENTS):
        clients = [transport.sync_client() for _ in range(CLIENTS)]
        return thread_rate(workload, clients, seconds)


def torchrl_threads(
    make_transport: Callable[[], Any], settings: dict[str, Any], workload: Workload, seconds: float
) -> float:
    """Requests per second of TorchRL's server."""
    transport = make_transport()
    server = torchrl.InferenceServer(
        workload.policy, transport, max_batch_size=CLIENTS, **settings
    ).start()
    try:
        clients = [transport.client() for _ in range(CLIENTS)]
        return thread_rate(workload, clients, seconds)
    finally:
        server.shutdown()


def bare_forward(workload: Workload, seconds: float) -> float:
    """Rows per second of the policy on a batch that is already stacked."""

    @torch.no_grad()
    def forwards() -> int:
        policy, batch = workload.policy, workload.batch(CLIENTS)
        done = 0
        for length in (WARM_UP_S, seconds):
            done = 0
            until = time.perf_counter() + length
            while True:
                policy(batch)
                if time.perf_counter() > until:
                    break
                done += 1
        return done

    return off_main_thread(forwards) * CLIENTS / seconds


async def typical_us(call: Callable[[], Any], seconds: float) -> float:
    """The median duration, in microseconds, of awaiting what `call` returns."""
    durations: list[float] = []
    for length in (WARM_UP_S, seconds):
        durations = []
        until = time.perf_counter() + length
        while (started := time.perf_counter()) < until or not durations:
            await call()
            durations.append(time.perf_counter() - started)
    return statistics.median(durations) * 1e6


def aioinfer_latency(workload: Workload, seconds: float, *, own_loop: bool = False) -> float:
    """Microseconds from an asyncio client's request to its answer, when it is the only one."""

    async def main() -> float:
        policy, ready = workload.policy, requests(workload.observations[0])
        async with InferenceServer(policy, AsyncioTransport(), own_loop=own_loop) as server:
            client = server.async_client()
            return await typical_us(lambda: client(next(ready)), seconds)

    return where_it_computes(main, own_loop)


def executor_latency(workload: Workload, seconds: float) -> float:
    """Microseconds of one run_in_executor round trip with the bare forward of one row in it."""
    policy, row = workload.policy, off_main_thread(lambda: workload.batch(1))

    @torch.no_grad()
    def forward() -> TensorDictBase:
        return policy(row)

    async def main() -> float:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as pool:
            return await typical_us(lambda: loop.run_in_executor(pool, forward), seconds)

    return on_loop(main())


def idle_cpu_s(workload: Workload, seconds: float) -> float:
    """CPU seconds of this process while two servers, with 32 clients each, have nothing to do."""

    async def main() -> float:
        transport = AsyncioTransport()
        async with InferenceServer(workload.policy, transport, max_batch_size=CLIENTS):
            clients = [transport.async_client() for _ in range(CLIENTS)]
            pairs = zip(clients, workload.observations, strict=True)
            await asyncio.gather(*(client(next(requests(o))) for client, o in pairs))
            await asyncio.sleep(0.5)
            gc.collect()
            before = time.process_time()
            await asyncio.sleep(seconds)
            return time.process_time() - before

    transport = ThreadingTransport()
    with InferenceServer(workload.policy, transport, max_batch_size=CLIENTS):
        clients = [transport.sync_client() for _ in range(CLIENTS)]
        for client, observation in zip(clients, workload.observations, strict=True):
            client(next(requests(observation)))
        return on_loop(main())


# -- the rounds ---------------------------------------------------------------

Contender = Callable[[Workload, float], float]

ASYNCIO = f"aioinfer, asyncio ({LOOP})"
OWN_LOOP = f"aioinfer, asyncio ({LOOP}), own_loop"
THREADS = "aioinfer, threads"
BARE = "bare batched forward"
LATENCY = f"aioinfer, one asyncio client ({LOOP})"
LATENCY_OWN_LOOP = f"{LATENCY}, own_loop"
EXECUTOR = f"run_in_executor with the bare forward ({LOOP})"


@dataclasses.dataclass(frozen=True)
class Group:
    """Contenders on one policy that are compared with each other."""

    title: str
    unit: str
    workload: Workload
    contenders: dict[str, Contender]
    settings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    rounds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median of a contender's rounds."""
        return statistics.median(self.rounds[name])

    def label(self, name: str) -> str:
        """The contender's name with the settings that were chosen for it."""
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.get(name, {}).items())
        return f"{name}, {settings}" if settings else name

    @property
    def torchrl_best(self) -> float | None:
        """The better of TorchRL's medians; ``None`` if it is not installed."""
        return max((self.median(name) for name in self.settings), default=None)


def measure(contender: Contender, workload: Workload, seconds: float) -> float:
    """Run one contender once, with nothing left over from the one before it."""
    gc.collect()
    with threads_end():
        return contender(workload, seconds)


def best_of_torchrl(workload: Workload) -> dict[str, tuple[dict[str, Any], Contender]]:
    """Try TorchRL's settings; return the best one per transport."""
    if torchrl is None:
        return {}
    transports: dict[str, Callable[[], Any]] = {
        "TorchRL ThreadingTransport": torchrl.ThreadingTransport,
        f"TorchRL SlotTransport({CLIENTS})": functools.partial(torchrl.SlotTransport, CLIENTS),
    }
    best: dict[str, tuple[dict[str, Any], Contender]] = {}
    for name, transport in transports.items():
        trials = []
        for settings in TORCHRL_SETTINGS:
            contender = functools.partial(torchrl_threads, transport, settings)
            trials.append((measure(contender, workload, TRIAL_S), settings, contender))
        tried = "; ".join(f"{settings} {rate:,.0f}/s" for rate, settings, _ in trials)
        note(f"{workload.name}, {name}: tried {tried}")
        _, settings, contender = max(trials, key=lambda trial: trial[0])
        best[name] = (settings, contender)
    return best


def throughput(workload: Workload) -> Group:
    """Put the contenders for requests per second together."""
    rivals = best_of_torchrl(workload)
    contenders: dict[str, Contender] = {
        ASYNCIO: aioinfer_asyncio,
        OWN_LOOP: functools.partial(aioinfer_asyncio, own_loop=True),
        THREADS: aioinfer_threads,
        **{name: contender for name, (_, contender) in rivals.items()},
        BARE: bare_forward,
    }
    settings = {name: chosen for name, (chosen, _) in rivals.items()}
    title = f"{workload.name}, {CLIENTS} clients"
    return Group(title, "requests/s", workload, contenders, settings)


def latency(workload: Workload) -> Group:
    """Put the contenders for the latency of a single client together."""
    contenders: dict[str, Contender] = {
        LATENCY: aioinfer_latency,
        LATENCY_OWN_LOOP: functools.partial(aioinfer_latency, own_loop=True),
        EXECUTOR: executor_latency,
    }
    return Group(f"{workload.name}, one client", "µs", workload, contenders)


def run_rounds(groups: Sequence[Group], rounds: int, seconds: float) -> None:
    """Measure everybody in turns; each round begins with another contender."""
    turns = [(group, name) for group in groups for name in group.contenders]
    for number in range(rounds):
        note(f"round {number + 1} of {rounds}")
        start = number % len(turns)
        for group, name in turns[start:] + turns[:start]:
            figure = measure(group.contenders[name], group.workload, seconds)
            group.rounds.setdefault(name, []).append(figure)


# -- targets ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio the project wants, beside the one that was measured."""

    what: str
    measured: float | None
    limit: float
    aim: float | None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the limit holds; ``None`` if it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def ratio(numerator: float, denominator: float | None) -> float | None:
    """Divide, unless there is nothing to divide by."""
    return None if not denominator else numerator / denominator


def targets(groups: dict[str, Group], idle: float | None) -> list[Target]:
    """Compare what was measured with what the project wants."""
    found = []
    if group := groups.get("mlp"):
        best = group.torchrl_best
        found += [
            Target("asyncio, MLP: times TorchRL's best", ratio(group.median(ASYNCIO), best), 6, 10),
            Target("threads, MLP: times TorchRL's best", ratio(group.median(THREADS), best), 2, 3),
        ]
    if group := groups.get("cnn"):
        share = ratio(group.median(ASYNCIO), group.median(BARE))
        found.append(Target("asyncio, CNN: of the bare forward", share, 0.88, 0.95))
    if group := groups.get("latency"):
        times = ratio(group.median(LATENCY), group.median(EXECUTOR))
        found.append(Target("one client, MLP: times run_in_executor", times, 1.2, None, False))
    what = "idle servers: % of one core"
    found.append(Target(what, None if idle is None else idle * 100, IDLE_LIMIT * 100, None, False))
    return found


# -- the machine --------------------------------------------------------------


def cpu_times() -> tuple[float, float] | None:
    """Seconds the machine's cores were busy, and all their seconds; ``None`` without /proc."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(field) for field in fields]
    idle = ticks[3] + ticks[4]
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - idle) / per_second, sum(ticks) / per_second


class OtherProcesses:
    """How much of the machine's CPU others use, from construction on."""

    def __init__(self) -> None:
        self._machine = cpu_times()
        self._own = time.process_time()

    def share(self) -> float | None:
        """Their share of all cores, 0 to 1; ``None`` where it cannot be known."""
        now = cpu_times()
        if now is None or self._machine is None or now[1] <= self._machine[1]:
            return None
        others = now[0] - self._machine[0] - (time.process_time() - self._own)
        return max(0.0, others) / (now[1] - self._machine[1])


def warn_if_busy(others: OtherProcesses, when: str) -> float | None:
    """Print a warning if other processes take a part in the results."""
    share = others.share()
    if share is None:
        note(f"it is not known whether the machine is otherwise idle {when}")
    elif share > BUSY:
        note(
            f"WARNING: other processes used {share:.0%} of the CPU {when}; "
            "the figures, and even the ratios, may mean nothing"
        )
    return share


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "tensordict", "torchrl", "uvloop"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


# -- the report ---------------------------------------------------------------


def note(text: str) -> None:
    """Say something about the run; the results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def print_group(group: Group) -> None:
    """Print one group's medians, their spread, and how they compare."""
    per_second = group.unit == "requests/s"
    bare = group.median(BARE) if BARE in group.rounds else None
    best = group.torchrl_best
    comparisons = f"{'of bare':>9}{'x TorchRL':>11}" if per_second else ""
    print(f"\n{group.title:70}{group.unit:>11}{'min':>10}{'max':>10}{comparisons}")
    for name, figures in group.rounds.items():
        median = group.median(name)
        line = f"  {group.label(name):68}{median:11,.0f}{min(figures):10,.0f}{max(figures):10,.0f}"
        if per_second:
            line += f"{number(ratio(median, bare)):>9}{number(ratio(median, best)):>11}"
        print(line)


def print_targets(found: Sequence[Target]) -> None:
    """Print what is wanted beside what was measured."""
    print(f"\n{'targets (ratios of medians)':45}{'measured':>10}{'limit':>10}{'aim':>8}")
    for target in found:
        limit = f"{'>=' if target.at_least else '<='} {target.limit:g}"
        aim = "" if target.aim is None else f"{target.aim:g}"
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[target.met]
        print(f"  {target.what:43}{number(target.measured):>10}{limit:>10}{aim:>8}  {verdict}")


def number(value: float | None) -> str:
    """Format a ratio, or the lack of one."""
    return "-" if value is None else f"{value:.3g}"


def rounds_and_seconds(description: str, argv: list[str] | None) -> argparse.Namespace:
    """Read the command line of a benchmark that has no other options; used by those beside this."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of one measurement; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line there too")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.seconds <= 0:
        parser.error(f"--seconds must be more than 0, got {args.seconds}")
    return args


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure aioinfer in one process, beside TorchRL and the bare forward."
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of one measurement; default: %(default)s"
    )
    parser.add_argument(
        "--idle-seconds", type=float, default=10.0, help="0 leaves it out; default: %(default)s"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=sorted(WORKLOADS),
        default=list(WORKLOADS),
        help="default: both; the latency is measured with mlp",
    )
    parser.add_argument(
        "--torch-threads",
        type=int,
        default=1,
        metavar="N",
        help="0 leaves the number to torch; default: %(default)s",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="make a new TensorDict for every request"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line there too")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.seconds <= 0:
        parser.error(f"--seconds must be more than 0, got {args.seconds}")
    if args.torch_threads < 0:
        parser.error(f"--torch-threads must be at least 0, got {args.torch_threads}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, report; return the exit status."""
    global FRESH
    args = parse(argv)
    FRESH = args.fresh
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    machine = describe_machine()
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    load = machine["load_average"]
    print(
        f"{machine['cores']} cores, torch threads: {machine['torch_threads']}, "
        f"load average {'unknown' if load is None else f'{load[0]:.2f}'} at the start",
        flush=True,
    )
    before = OtherProcesses()
    time.sleep(1.0)
    busy_before = warn_if_busy(before, "in the second before the start")
    if torchrl is None:
        note("TorchRL is not installed, so it is left out: pip install 'aioinfer[torchrl]'")

    torch.manual_seed(0)
    during = OtherProcesses()
    workloads = {name: off_main_thread(WORKLOADS[name]) for name in args.policies}
    groups = {name: throughput(workload) for name, workload in workloads.items()}
    if "mlp" in workloads:
        groups["latency"] = latency(workloads["mlp"])
    run_rounds(list(groups.values()), args.rounds, args.seconds)
    idle = None
    if args.idle_seconds > 0:
        note(f"idle for {args.idle_seconds:g} s")
        used = measure(idle_cpu_s, next(iter(workloads.values())), args.idle_seconds)
        idle = used / args.idle_seconds
    busy_during = warn_if_busy(during, "during the measurements")

    for group in groups.values():
        print_group(group)
    found = targets(groups, idle)
    print_targets(found)
    line = json.dumps(
        {
            "benchmark": "in_process",
            **machine,
            "loop": LOOP,
            "others_cpu_before": busy_before,
            "others_cpu_during": busy_during,
            "options": {
                "rounds": args.rounds,
                "seconds": args.seconds,
                "clients": CLIENTS,
                "fresh": FRESH,
            },
            "groups": {
                key: {
                    "title": group.title,
                    "unit": group.unit,
                    "settings": group.settings,
                    "medians": {name: group.median(name) for name in group.rounds},
                    "rounds": group.rounds,
                }
                for key, group in groups.items()
            },
            "targets": [{**dataclasses.asdict(target), "met": target.met} for target in found],
        }
    )
    print("\n" + line)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
