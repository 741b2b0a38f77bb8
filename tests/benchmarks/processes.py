"""Requests per second and latency of clients in processes of their own, beside TorchRL's server.

As in ``in_process.py``, whose pieces this script uses: everybody is measured in one run and in
turns, and what counts is the median of the rounds, because only ratios within one run mean
anything. Contenders, with 8 client processes, each with the server in this process and with the
server in a process of its own:

-   aioinfer's ``MPTransport``;
-   TorchRL's ``MPTransport``, ``SharedMemoryTransport`` and ``ProcessSlotTransport``. A short
    trial of several settings (see ``torchrl_settings``) in both places picks the best of each
    transport for the rounds; ``--both-places`` takes both, each with its best settings.

Every client process asks for an answer, reports that it is connected, and waits. Then all get
the same two moments: they ask without a pause, and every answer that arrives between the two
counts, with the time it took from making the request (a fresh TensorDict around the client's own
observation) to holding the answer. Its last answer is compared with what the policy says about
its observation. The processes are new for every measurement, so that nobody else's server runs,
or polls, during it; starting them is not measured. Torch computes with one thread everywhere.

With 32 rows in a request only aioinfer is measured. TorchRL counts, stacks and slots requests,
not rows: 8 requests of 32 rows reach the policy as [8, 32, ...], which is no batch of 256 rows;
an MLP happens to accept it, a CNN fails with it, and requests of different sizes do not mix.

Nothing can hang: every wait ends, the processes are daemons that end with this one, and a
measurement that takes longer than ``HANG_S`` prints all stacks and ends the script.

    python tests/benchmarks/processes.py --help
    python tests/benchmarks/processes.py --threshold     # inline against shared memory
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import gc
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, resource_sharer
from pathlib import Path
from typing import Any

import torch
from in_process import (
    WARM_UP_S,
    WORKLOADS,
    OtherProcesses,
    SyncClient,
    Target,
    cpu_times,
    describe_machine,
    note,
    number,
    off_main_thread,
    print_targets,
    ratio,
    threads_end,
    torchrl,
    warn_if_busy,
)
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

import aioinfer

ROWS = 32
"""Rows of the larger request."""
MAX_BATCH_ROWS = 256
"""aioinfer's max_batch_size, in rows: as many as 8 requests of 32 rows have."""
TRIAL_S = 0.3
"""Seconds per setting in the search for TorchRL's best."""
CONNECT_S = 60.0
"""How long processes may take to start and get their first answer; spawn imports torch."""
GRACE_S = 20.0
"""How long after the end of a measurement its clients may still take."""
HANG_S = 180.0
"""How long one measurement may take with everything, before the script gives up."""

SIZES = [1024 << step for step in range(11)]
"""Bytes of a request in the sweep of ``--threshold``: 1 KiB to 1 MiB."""
ALWAYS_INLINE = 1 << 24
"""An ``inline_bytes`` above all ``SIZES``; 0 is the one below."""


# -- what is asked ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A policy, and for every client the observation it asks about and the right action."""

    title: str
    policy: TensorDictModule
    rows: int
    questions: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def batch_size(self) -> list[int]:
        """The batch size of a request."""
        return [] if self.rows == 1 else [self.rows]


@torch.no_grad()
def task_of(name: str, rows: int, clients: int) -> Task:
    """Make a task of a policy of ``in_process.py``."""
    workload = WORKLOADS[name]()
    size = f", {rows} rows per request" if rows > 1 else ""
    title = f"{workload.name}{size}, {clients} processes"
    pairs = list(zip(workload.observations, workload.expected, strict=True))
    if rows > 1:
        # The same rows for every client, each beginning with another one.
        starts = [pairs[client:] + pairs[:client] for client in range(clients)]
        stacked = ([torch.stack(leaf) for leaf in zip(*s[:rows], strict=True)] for s in starts)
        pairs = [(observation, action) for observation, action in stacked]
    return Task(title, workload.policy, rows, pairs[:clients])


def payload_task(size: int, clients: int) -> Task:
    """Make a task whose requests carry `size` bytes, and whose policy does next to nothing."""
    policy = TensorDictModule(lambda x: x[..., :4].clone(), ["observation"], ["action"])
    observations = torch.randn(clients, size // 4).unbind(0)
    return Task(f"{size} bytes", policy, 1, [(x, x[:4].clone()) for x in observations])


def served(policy: TensorDictModule) -> TensorDictModule:
    """Set up torch in a server's own process; with ``partial``, a policy factory."""
    torch.set_num_threads(1)
    return policy


# -- client processes ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figures:
    """One measurement: answered requests per second, and how long an answer took."""

    rate: float
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, latencies: list[float], seconds: float) -> Figures:
        """Sum up the answers of all clients."""
        if not latencies:
            raise RuntimeError(f"no client got an answer within {seconds} s")
        ordered = sorted(latencies)
        p50, p99 = (ordered[int(q * (len(ordered) - 1))] * 1e3 for q in (0.5, 0.99))
        return cls(len(ordered) / seconds, p50, p99)


def converse(
    client: SyncClient, ask: Callable[[], TensorDict], begin: float, end: float
) -> tuple[list[float], TensorDictBase]:
    """Ask until `end`; return the latencies of the answers since `begin`, and the last answer."""
    latencies: list[float] = []
    now = time.perf_counter()
    while True:
        asked = now
        answer = client(ask())
        now = time.perf_counter()  # the clock is the same one in all processes
        if now > end:
            return latencies, answer
        if now >= begin:
            latencies.append(now - asked)


def exit_with_parent() -> None:
    """Wait for the end of the parent process, which may have been killed, and end with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def actor(
    client: SyncClient,
    observation: torch.Tensor,
    expected: torch.Tensor,
    batch_size: list[int],
    commands: connection.Connection,
) -> None:
    """Do as the top of this file says, in a process of its own."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    def ask() -> TensorDict:
        return TensorDict({"observation": observation}, batch_size)

    try:
        commands.recv()
        client(ask())
        commands.send((True, None))
        latencies, answer = converse(client, ask, *commands.recv())
        torch.testing.assert_close(answer["action"], expected, rtol=1e-3, atol=1e-4)
        commands.send((True, latencies))
    except BaseException:
        commands.send((False, traceback.format_exc()))


class Actors:
    """The client processes of one measurement; leaving the context kills them."""

    def __init__(self, context: Any, task: Task, clients: Sequence[SyncClient]) -> None:
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        try:
            for client, question in zip(clients, task.questions, strict=True):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                args = (client, *question, task.batch_size, theirs)
                self._processes.append(context.Process(target=actor, args=args, daemon=True))
                self._processes[-1].start()
                theirs.close()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *_: object) -> None:
        started = [process for process in self._processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join(timeout=5.0)
        for pipe in self._pipes:
            pipe.close()

    def tell(self, message: object) -> None:
        """Send `message` to all."""
        for pipe in self._pipes:
            pipe.send(message)

    def replies(self, timeout_s: float) -> list[Any]:
        """Return one message of each; fail if one fails, dies or takes too long."""
        until = time.monotonic() + timeout_s
        found = []
        for index, (process, pipe) in enumerate(zip(self._processes, self._pipes, strict=True)):
            remaining = max(0.0, until - time.monotonic())
            if not connection.wait([pipe, process.sentinel], remaining):
                raise TimeoutError(f"client {index} did not report within {timeout_s:g} s")
            try:
                succeeded, payload = pipe.recv() if pipe.poll() else (None, None)
            except EOFError:
                succeeded = payload = None
            if succeeded is None:
                process.join(timeout=1.0)
                raise RuntimeError(f"client {index} died, exit code {process.exitcode}")
            if not succeeded:
                raise RuntimeError(f"client {index} failed:\n{payload}")
            found.append(payload)
        return found

    def measure(self, seconds: float) -> Figures:
        """Let all connect, warm up and ask at the same time."""
        self.tell("connect")
        self.replies(CONNECT_S)
        begin = time.perf_counter() + WARM_UP_S
        self.tell((begin, begin + seconds))
        results = self.replies(WARM_UP_S + seconds + GRACE_S)
        return Figures.of([latency for result in results for latency in result], seconds)


# -- contenders ---------------------------------------------------------------

Contender = Callable[[Task, float], Figures]
HERE = "server here"
APART = "server in a process"


@dataclasses.dataclass(frozen=True)
class Run:
    """What all measurements have in common: a multiprocessing context, and how many clients."""

    context: Any
    clients: int


def aioinfer_figures(
    run: Run, place: str, options: dict[str, Any], task: Task, seconds: float
) -> Figures:
    """Measure this library; `options` are the transport's."""
    transport = aioinfer.MPTransport(run.context, **options)
    clients = [transport.sync_client() for _ in range(run.clients)]
    if place == HERE:
        make, policy = aioinfer.InferenceServer, task.policy
    else:
        make, policy = aioinfer.ProcessInferenceServer, functools.partial(served, task.policy)
    server = make(policy, transport, max_batch_size=MAX_BATCH_ROWS)
    # The processes come before the server's threads, as forking them later would be unsafe.
    with Actors(run.context, task, clients) as actors, server:
        return actors.measure(seconds)


def torchrl_settings(clients: int) -> list[dict[str, Any]]:
    """Return what is tried: its default, and to wait for everybody, for long or not so long."""
    return [
        {"min_batch_size": 1},  # the default has a timeout of 0.01
        {"min_batch_size": clients, "timeout": 0.01},
        {"min_batch_size": clients, "timeout": 0.002},
    ]


def torchrl_transport(name: str, run: Run, task: Task) -> Any:
    """Make one of TorchRL's transports; two of them must know what they will carry."""
    if name == "MPTransport":
        return torchrl.MPTransport(run.context)
    observation, action = (leaf.clone() for leaf in task.questions[0])
    version = torch.zeros((), dtype=torch.long)
    return getattr(torchrl, name)(
        TensorDict({"observation": observation}),
        TensorDict({"action": action, "policy_version": version}),
        num_slots=run.clients,
        ctx=run.context,
    )


def torchrl_figures(
    run: Run, name: str, place: str, settings: dict[str, Any], task: Task, seconds: float
) -> Figures:
    """Measure TorchRL's server with the transport `name`."""
    transport = torchrl_transport(name, run, task)
    # All clients must exist before any process has the transport.
    clients = [transport.client() for _ in range(run.clients)]
    settings = {"max_batch_size": run.clients, **settings}
    if place == HERE:
        server = torchrl.InferenceServer(task.policy, transport, **settings)
    else:
        server = torchrl.ProcessInferenceServer(
            policy_factory=functools.partial(served, task.policy),
            transport=transport,
            mp_context=run.context,
            startup_timeout=CONNECT_S,
            **settings,
        )
    with Actors(run.context, task, clients) as actors, server:
        return actors.measure(seconds)


def measure(contender: Contender, task: Task, seconds: float) -> Figures:
    """Run one contender once, with nothing left over from the one before it."""
    gc.collect()
    faulthandler.dump_traceback_later(HANG_S + seconds, exit=True)
    try:
        with threads_end():
            figures = contender(task, seconds)
            gc.collect()  # the feeder threads of queues end with their queues
            resource_sharer.stop(timeout=5.0)  # hands out the tensors that queues carry
        return figures
    finally:
        faulthandler.cancel_dump_traceback_later()


# -- the rounds ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    """Contenders on one task that are compared with each other."""

    task: Task
    contenders: dict[str, Contender]
    trials: dict[str, dict[str, int | str]]
    rounds: dict[str, list[Figures]] = dataclasses.field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What is counted."""
        return "requests/s" if self.task.rows == 1 else "rows/s"

    def median(self, name: str, what: str = "rate") -> float:
        """The median of a contender's rounds; a rate is one of rows."""
        scale = self.task.rows if what == "rate" else 1
        return scale * statistics.median(getattr(figures, what) for figures in self.rounds[name])

    def best(self, beginning: str) -> str | None:
        """The fastest contender whose name begins so; ``None`` if there is none."""
        names = [name for name in self.rounds if name.startswith(beginning)]
        return max(names, key=self.median, default=None)

    def best_rate(self, beginning: str) -> float | None:
        """The rate of that contender."""
        name = self.best(beginning)
        return None if name is None else self.median(name)


def aioinfer_contenders(run: Run) -> dict[str, Contender]:
    """Put this library's contenders together."""
    return {
        f"aioinfer MPTransport, {place}": functools.partial(aioinfer_figures, run, place, {})
        for place in (HERE, APART)
    }


def torchrl_group(run: Run, task: Task, both_places: bool) -> Group:
    """Try TorchRL's settings; return a group with the best ones per transport."""
    group = Group(task, {}, {})
    for name in ("MPTransport", "SharedMemoryTransport", "ProcessSlotTransport"):
        found: dict[str, tuple[float, str, Contender]] = {}  # by place
        for place in (HERE, APART):
            tried = group.trials.setdefault(f"TorchRL {name}, {place}", {})
            for settings in torchrl_settings(run.clients):
                contender = functools.partial(torchrl_figures, run, name, place, settings)
                label = ", ".join(f"{key}={value}" for key, value in settings.items())
                try:
                    rate = round(measure(contender, task, TRIAL_S).rate)
                except Exception as error:
                    tried[label] = repr(error)
                    continue
                tried[label] = rate
                if place not in found or rate > found[place][0]:
                    found[place] = (rate, f"TorchRL {name}, {place}, {label}", contender)
            outcome = "; ".join(f"{label}: {result}" for label, result in tried.items())
            note(f"{task.title}, TorchRL {name}, {place}, requests/s: {outcome}")
        ranked = sorted(found.values(), key=lambda trial: trial[0], reverse=True)
        for _, label, contender in ranked if both_places else ranked[:1]:
            group.contenders[label] = contender
    return group


def make_groups(run: Run, only: Sequence[str], both_places: bool) -> dict[str, Group]:
    """Put together what is to be measured."""
    groups: dict[str, Group] = {}
    ours = aioinfer_contenders(run) if hasattr(aioinfer, "MPTransport") else {}
    for key in only:
        name, rows = ("mlp", ROWS) if key == "rows" else (key, 1)
        task = off_main_thread(functools.partial(task_of, name, rows, run.clients))
        rivals = torchrl is not None and rows == 1
        group = torchrl_group(run, task, both_places) if rivals else Group(task, {}, {})
        groups[key] = dataclasses.replace(group, contenders={**ours, **group.contenders})
    return groups


def run_rounds(groups: Sequence[Group], rounds: int, seconds: float) -> None:
    """Measure everybody in turns; each round begins with another contender."""
    turns = [(group, name) for group in groups for name in group.contenders]
    for index in range(rounds):
        note(f"round {index + 1} of {rounds}")
        start = index % max(1, len(turns))
        for group, name in turns[start:] + turns[:start]:
            figures = measure(group.contenders[name], group.task, seconds)
            group.rounds.setdefault(name, []).append(figures)


def targets(groups: dict[str, Group]) -> list[Target]:
    """Compare what was measured with what the project wants; each side in its better place."""
    found = []
    mlp = groups.get("mlp")
    if mlp:
        ours, theirs = mlp.best("aioinfer"), mlp.best("TorchRL")
        rate = mlp.best_rate("aioinfer")
        p99_ms = mlp.median(ours, "p99_ms") if ours else None
        p50_ms = mlp.median(theirs, "p50_ms") if theirs else None
        pipes = mlp.best_rate("TorchRL MPTransport")
        best = mlp.best_rate("TorchRL")
        found += [
            Target("MLP: times TorchRL's best", quotient(rate, best), 5, 8),
            Target("MLP: times TorchRL's MPTransport", quotient(rate, pipes), 40, None),
            Target(
                "MLP: p99 latency / TorchRL's best's p50", quotient(p99_ms, p50_ms), 1, None, False
            ),
        ]
    if group := groups.get("cnn"):
        times = quotient(group.best_rate("aioinfer"), group.best_rate("TorchRL"))
        found.append(Target("CNN: times TorchRL's best", times, 2, None))
    if (group := groups.get("rows")) and mlp:
        times = quotient(group.best_rate("aioinfer"), mlp.best_rate("aioinfer"))
        found.append(Target(f"{ROWS} rows per request: times the rows of one", times, 20, None))
    return found


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """Divide, unless one of them was not measured."""
    return None if numerator is None else ratio(numerator, denominator)


# -- inline or shared memory --------------------------------------------------


def threshold(run: Run, rounds: int, seconds: float) -> dict[str, Any]:
    """Compare both ways of sending a payload, by its size; print and return the medians."""
    ways = {"inline": {"inline_bytes": ALWAYS_INLINE}, "shared": {"inline_bytes": 0}}
    rates: dict[int, dict[str, list[float]]] = {size: {way: [] for way in ways} for size in SIZES}
    tasks = {size: payload_task(size, run.clients) for size in SIZES}
    for index in range(rounds):
        note(f"round {index + 1} of {rounds}")
        for size, task in tasks.items():
            for way in list(ways)[:: -1 if index % 2 else 1]:
                contender = functools.partial(aioinfer_figures, run, HERE, ways[way])
                rates[size][way].append(measure(contender, task, seconds).rate)
    medians = {
        size: {way: statistics.median(found) for way, found in by_way.items()}
        for size, by_way in rates.items()
    }
    print(f"\n{'bytes per request':>20}{'inline/s':>12}{'shared/s':>12}{'shared/inline':>15}")
    since: int | None = None  # the size from which on shared memory wins at every size
    for size, by_way in medians.items():
        wins = by_way["shared"] > by_way["inline"]
        since = (since or size) if wins else None
        share = number(ratio(by_way["shared"], by_way["inline"]))
        print(f"{size:20,}{by_way['inline']:12,.0f}{by_way['shared']:12,.0f}{share:>15}")
    print(f"shared memory wins from {'no size on' if since is None else f'{since:,} bytes on'}")
    return {"medians": medians, "rounds": rates, "shared_wins_from_bytes": since}


# -- the machine, the report --------------------------------------------------


def children_s() -> float:
    """CPU seconds of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


class Strangers(OtherProcesses):
    """How much of the machine's CPU is used by others than this process and its children."""

    def __init__(self) -> None:
        super().__init__()
        self._children = children_s()

    def share(self) -> float | None:
        """Their share of all cores, 0 to 1; ``None`` where it cannot be known."""
        others, now = super().share(), cpu_times()
        if others is None or now is None or self._machine is None:
            return None
        return max(0.0, others - (children_s() - self._children) / (now[1] - self._machine[1]))


def print_group(group: Group) -> None:
    """Print one group's medians, their spread, and how they compare."""
    best = group.best_rate("TorchRL")
    heads = f"{'min':>10}{'max':>10}{'p50 ms':>9}{'p99 ms':>9}{'x TorchRL':>11}"
    print(f"\n{group.task.title:78}{group.unit:>11}{heads}")
    for name, rounds in group.rounds.items():
        rates = [figures.rate * group.task.rows for figures in rounds]
        line = f"  {name:76}{group.median(name):11,.0f}{min(rates):10,.0f}{max(rates):10,.0f}"
        line += f"{group.median(name, 'p50_ms'):9.2f}{group.median(name, 'p99_ms'):9.2f}"
        print(line + f"{number(ratio(group.median(name), best)):>11}")
    if group.task.rows > 1:
        print("  TorchRL is left out: it batches requests, not rows (see the top of the script)")


def group_json(group: Group) -> dict[str, Any]:
    """What is kept of a group."""
    whats = ("rate", "p50_ms", "p99_ms")
    return {
        "title": group.task.title,
        "unit": group.unit,
        "medians": {n: {what: group.median(n, what) for what in whats} for n in group.rounds},
        "rounds": {n: [dataclasses.asdict(f) for f in r] for n, r in group.rounds.items()},
        "trials": group.trials,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure aioinfer with client processes, beside TorchRL."
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of one measurement; default: %(default)s"
    )
    parser.add_argument("--clients", type=int, default=8, help="1 to 32; default: %(default)s")
    names = ["mlp", "cnn", "rows"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument(
        "--both-places", action="store_true", help="measure TorchRL's transports in both places"
    )
    parser.add_argument(
        "--start-method",
        choices=multiprocessing.get_all_start_methods(),
        default="fork",
        help="spawn needs seconds per measurement; default: %(default)s",
    )
    parser.add_argument(
        "--threshold", action="store_true", help="only compare inline and shared-memory payloads"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line there too")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.seconds <= 0:
        parser.error(f"--seconds must be more than 0, got {args.seconds}")
    if not 1 <= args.clients <= 32:
        parser.error(f"--clients must be 1 to 32, got {args.clients}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, report; return the exit status."""
    args = parse(argv)
    torch.set_num_threads(1)
    machine = describe_machine()
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    load = machine["load_average"]
    print(
        f"{machine['cores']} cores, torch threads: 1, start method: {args.start_method}, "
        f"load average {'unknown' if load is None else f'{load[0]:.2f}'} at the start",
        flush=True,
    )
    before = Strangers()
    time.sleep(1.0)
    busy_before = warn_if_busy(before, "in the second before the start")
    torch.manual_seed(0)
    run = Run(multiprocessing.get_context(args.start_method), args.clients)
    during = Strangers()
    report: dict[str, Any]
    if args.threshold:
        report = {"threshold": threshold(run, args.rounds, args.seconds)}
    else:
        if torchrl is None:
            note("TorchRL is not installed, so it is left out: pip install 'aioinfer[torchrl]'")
        groups = make_groups(run, args.only, args.both_places)
        run_rounds(list(groups.values()), args.rounds, args.seconds)
        for group in groups.values():
            print_group(group)
        found = targets(groups)
        print_targets(found)
        report = {
            "groups": {key: group_json(group) for key, group in groups.items()},
            "targets": [{**dataclasses.asdict(target), "met": target.met} for target in found],
        }
    busy_during = warn_if_busy(during, "during the measurements")
    options = {key: value for key, value in vars(args).items() if key != "json"}
    line = json.dumps(
        {
            "benchmark": "processes",
            **machine,
            "others_cpu_before": busy_before,
            "others_cpu_during": busy_during,
            "options": options,
            **report,
        }
    )
    print("\n" + line)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
