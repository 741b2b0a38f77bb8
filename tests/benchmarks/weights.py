"""What new weights cost a server, and how soon they are served; beside TorchRL's scheme.

Everybody is measured in one run and in turns, and what counts is the median of the rounds, because
only ratios within one run mean anything. The trainer is a process of its own throughout. Torch
computes with one thread everywhere.

-   *Updates*: a small MLP serves 32 coroutines while the trainer offers 1,000 updates a second.
    Against it, the same trainer doing the same arithmetic at the same times, without sending.
-   *A large model*: 100 MB, updated 5 times a second. The longest time between two batches,
    against that of the same server while the trainer sends nothing and does nothing else.
-   *Freshness*: from the call of ``send`` to the first response with the new version, for 1 MB,
    100 MB and 1 GB, over the time of one plain copy of as many bytes in the same process. The
    server is asked every millisecond. Each is measured in a process of its own. Beside
    it TorchRL's ``SharedMemWeightSyncScheme`` with TorchRL's own server, whose version rises when
    its weights do. Its trainer calls ``send`` with weights that are no part of what is shared.
-   *Ten thousand updates*: memory, threads and descriptors of the server's process.

    python tests/benchmarks/weights.py --help
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from in_process import (
    OtherProcesses,
    Target,
    describe_machine,
    note,
    number,
    print_targets,
    torchrl,
    warn_if_busy,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncioTransport, InferenceServer, SharedMemWeightSyncScheme

CLIENTS = 32
UPDATES_PER_S = 1000
LARGE_NBYTES = 100_000_000
SIZES = {"1 MB": 1_000_000, "100 MB": 100_000_000, "1 GB": 1_000_000_000}
LEAVES = 16
ANSWER_S = 120.0
_PROBE_S = 0.001
"""Seconds between two requests of the one who looks for new weights. Each keeps a core busy for a
fifth of a millisecond, and both copies need one: asked five times as often, they take a third
longer, and what is measured is the asking."""
_WARM_UP = 4
"""Sends that are not counted: the first ones make the memory, on both sides."""


class Large(nn.Module):
    """So many bytes of weights, and a forward that reads one value of each leaf."""

    in_keys = ("observation",)
    out_keys = ("action",)

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            torch.zeros(nbytes // 4 // LEAVES) for _ in range(LEAVES)
        ).requires_grad_(False)

    def forward(self, td: Any) -> Any:
        """The same for every row."""
        values = torch.stack([weight[0] for weight in self.weights])
        return td.set("action", td["observation"][:, :1] + values.sum())


def mlp() -> TensorDictModule:
    """The small policy."""
    network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


# -- the trainer's process ----------------------------------------------------


def trainer(control: Connection, scheme: Any, make: Callable[[], nn.Module], kind: str) -> None:
    """Do what the benchmark asks, until it asks no more."""
    torch.set_num_threads(1)
    model = make().requires_grad_(False)
    weights = TensorDict.from_module(model).data.clone()
    if kind == "torchrl":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheme.init_on_sender(
                weights=weights.clone(), devices=[torch.device("cpu")], model_id="policy"
            )
            scheme.connect()
    else:
        scheme.init_on_sender(model=model)
        scheme.connect()
    control.send("ready")
    tensors = list(model.parameters())
    while (asked := control.recv()) is not None:
        what, *args = asked
        control.send(_TASKS[what](scheme, model, weights, tensors, kind, *args))
    if kind == "torchrl":
        scheme.shutdown()
    else:
        scheme.close()


def pace(
    scheme: Any,
    model: nn.Module,
    weights: Any,
    tensors: Any,
    kind: str,
    seconds: float,
    per_s: float,
    send: bool,
) -> int:
    """Change the weights so many times a second, and send them, or not; return how often."""
    started = time.perf_counter()
    done = 0
    while (now := time.perf_counter() - started) < seconds:
        if now < done / per_s:
            time.sleep(done / per_s - now)
            continue
        torch._foreach_add_(tensors, 1e-6)  # the arithmetic of an optimiser's step
        if send:
            scheme.send(model=model, wait="none")
        done += 1
    return done


def fresh(
    scheme: Any, model: nn.Module, weights: Any, tensors: Any, kind: str, value: float
) -> tuple[float, float]:
    """Send weights; return when, and how long one plain copy of as many bytes takes."""
    torch._foreach_zero_(tensors)
    torch._foreach_add_(tensors, value)
    copies = [torch.empty_like(tensor).fill_(0.0) for tensor in tensors]
    plain = []
    for _ in range(3):
        started = time.perf_counter()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        plain.append(time.perf_counter() - started)
    if kind == "torchrl":
        weights = TensorDict.from_module(model).data  # no part of what is shared
    del copies
    started = time.monotonic()
    if kind == "torchrl":
        scheme.send(weights)
    else:
        scheme.send(model=model, wait="none")
    return started, statistics.median(plain)


def many(scheme: Any, model: nn.Module, weights: Any, tensors: Any, kind: str, count: int) -> int:
    """Send so many updates, one after the other was applied."""
    for _ in range(count):
        scheme.send(model=model)
    return count


_TASKS: dict[str, Callable[..., Any]] = {"pace": pace, "fresh": fresh, "many": many}


class Trainer:
    """The process, as the benchmark sees it."""

    def __init__(self, scheme: Any, make: Callable[[], nn.Module], kind: str = "aioinfer") -> None:
        context = multiprocessing.get_context("fork")
        self._control, theirs = context.Pipe()
        self._process = context.Process(
            target=trainer, args=(theirs, scheme, make, kind), daemon=True
        )
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until it has begun."""
        self.answer()

    def ask(self, *what: Any) -> None:
        """Give it something to do."""
        self._control.send(what)

    def answer(self) -> Any:
        """Wait until it is done."""
        if not self._control.poll(ANSWER_S):
            raise TimeoutError(f"the trainer did not answer within {ANSWER_S} s")
        return self._control.recv()

    def close(self) -> None:
        """End it."""
        self._control.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


# -- serving while weights come ----------------------------------------------


@dataclasses.dataclass
class Served:
    """What a server did in one measurement."""

    rate: float
    p99_ms: float
    longest_gap_ms: float
    updates: float


async def serve(server: InferenceServer, seconds: float) -> Served:
    """Let coroutines ask without a pause, and look at their answers."""
    client = server.async_client()
    latencies: list[float] = []
    answered: list[float] = []
    end = time.perf_counter() + seconds
    before = server.stats().weight_updates

    async def actor() -> None:
        observation = torch.randn(8)
        while (asked := time.perf_counter()) < end:
            await client(TensorDict({"observation": observation}))
            now = time.perf_counter()
            latencies.append(now - asked)
            answered.append(now)

    started = time.perf_counter()
    await asyncio.gather(*[actor() for _ in range(CLIENTS)])
    took = time.perf_counter() - started
    gaps = [b - a for a, b in itertools.pairwise(answered)]
    return Served(
        rate=len(answered) / took,
        p99_ms=sorted(latencies)[round(0.99 * (len(latencies) - 1))] * 1e3,
        longest_gap_ms=max(gaps) * 1e3,
        updates=(server.stats().weight_updates - before) / took,
    )


async def in_turns(
    make: Callable[[], nn.Module], per_s: float, rounds: int, seconds: float, idle: bool
) -> tuple[list[Served], list[Served]]:
    """Serve with updates and without, in turns: ``(with, without)``."""
    scheme = SharedMemWeightSyncScheme()
    process = Trainer(scheme, make)
    found: dict[bool, list[Served]] = {True: [], False: []}
    try:
        async with InferenceServer(make(), AsyncioTransport(), weight_sync=scheme) as server:
            await asyncio.to_thread(process.ready)
            await serve(server, 0.3)
            for index in range(rounds):
                for send in (True, False) if index % 2 else (False, True):
                    works = send or not idle
                    if works:
                        process.ask("pace", seconds + 0.1, per_s, send)
                        await asyncio.sleep(0.05)
                    found[send].append(await serve(server, seconds))
                    if works:
                        await asyncio.to_thread(process.answer)
    finally:
        await asyncio.to_thread(process.close)
    return found[True], found[False]


# -- freshness ----------------------------------------------------------------


def our_freshness(nbytes: int, repeats: int) -> list[tuple[float, float]]:
    """For each repeat, seconds to the first new response, and of one plain copy."""
    scheme = SharedMemWeightSyncScheme()
    process = Trainer(scheme, lambda: Large(nbytes))
    try:
        with InferenceServer(Large(nbytes), weight_sync=scheme) as server:
            process.ready()
            return _freshness(server.sync_client(), process, repeats)
    finally:
        process.close()


def torchrl_freshness(nbytes: int, repeats: int) -> list[tuple[float, float]]:
    """The same with TorchRL's scheme and server."""
    import copy

    from torchrl.weight_update import SharedMemWeightSyncScheme as Theirs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheme = Theirs()
        process, server = None, None
        model = Large(nbytes)
        scheme.init_on_sender(
            weights=TensorDict.from_module(model).data.clone(),
            devices=[torch.device("cpu")],
            model_id="policy",
            ctx=multiprocessing.get_context("fork"),
        )
        process = Trainer(_Started(scheme), lambda: Large(nbytes), "torchrl")
        transport = torchrl.ThreadingTransport()
        server = torchrl.InferenceServer(model, transport, weight_sync=copy.copy(scheme))
        try:
            server.start()
            process.ready()
            return _freshness(transport.client(), process, repeats)
        finally:
            process.close()
            server.shutdown()


class _Started:
    """TorchRL's scheme, whose queues must exist before the process does."""

    def __init__(self, scheme: Any) -> None:
        self._scheme = scheme

    def init_on_sender(self, **kwargs: Any) -> None:
        """Done already."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheme, name)


def _freshness(client: Any, process: Trainer, repeats: int) -> list[tuple[float, float]]:
    request = TensorDict({"observation": torch.zeros(8)})
    found = []
    for repeat in range(1, repeats + _WARM_UP + 1):
        expected = float(repeat * LEAVES)
        process.ask("fresh", float(repeat))
        while client(request)["action"].item() != expected:
            time.sleep(_PROBE_S)
        seen = time.monotonic()
        sent, plain = process.answer()
        if repeat > _WARM_UP:
            found.append((seen - sent, plain))
    return found


def apart(measure: Callable[..., Any], *args: Any) -> Any:
    """What ``measure`` returns in a process of its own; ``None`` if it fails."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(theirs, measure, *args))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(ANSWER_S) else None
    except EOFError:  # it ended without an answer, and has said why
        return None
    finally:
        process.kill()
        process.join()


def _apart(answer: Connection, measure: Callable[..., Any], *args: Any) -> None:
    torch.set_num_threads(1)
    answer.send(measure(*args))


# -- ten thousand updates -----------------------------------------------------


def footprint() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    descriptors = len(os.listdir("/proc/self/fd"))
    return {
        "resident_mb": resident / 1e6,
        "threads": threading.active_count(),
        "descriptors": descriptors,
    }


def flat(count: int) -> tuple[dict[str, float], dict[str, float]]:
    """The server's footprint before and after so many updates."""
    scheme = SharedMemWeightSyncScheme()
    process = Trainer(scheme, mlp)
    try:
        with InferenceServer(mlp(), weight_sync=scheme):
            process.ready()
            process.ask("many", 500)
            process.answer()
            before = footprint()
            process.ask("many", count)
            process.answer()
            return before, footprint()
    finally:
        process.close()


# -- the report ---------------------------------------------------------------


def median(runs: list[Served], what: str) -> float:
    """Of one figure."""
    return statistics.median(getattr(run, what) for run in runs)


def print_served(title: str, runs: list[Served]) -> None:
    """One line."""
    print(
        f"  {title:44}{median(runs, 'rate'):12,.0f}{median(runs, 'p99_ms'):10.2f}"
        f"{median(runs, 'longest_gap_ms'):14.2f}{median(runs, 'updates'):12,.0f}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure what new weights cost.")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.5, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="of a send; default: %(default)s")
    names = ["updates", "large", "fresh", "flat"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line there too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, report; return the exit status."""
    args = parse(argv)
    torch.set_num_threads(1)
    machine = describe_machine()
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    before = OtherProcesses()
    time.sleep(1.0)
    busy = warn_if_busy(before, "in the second before the start")
    report: dict[str, Any] = {}
    found: list[Target] = []
    heads = f"{'requests/s':>12}{'p99 ms':>10}{'longest gap':>14}{'updates/s':>12}"
    if "updates" in args.only:
        note("updates")
        with_, without = asyncio.run(
            in_turns(mlp, UPDATES_PER_S, args.rounds, args.seconds, idle=False)
        )
        print(f"\n  {f'{UPDATES_PER_S} updates a second, MLP 8-64-4':44}{heads}")
        print_served("sent", with_)
        print_served("the same arithmetic, not sent", without)
        rate = median(with_, "rate") / median(without, "rate")
        p99 = median(with_, "p99_ms") / median(without, "p99_ms")
        found.append(Target("updates: throughput, times that without", rate, 0.8, None))
        found.append(Target("updates: p99, times that without", p99, 3, None, False))
        report["updates"] = [[dataclasses.asdict(s) for s in runs] for runs in (with_, without)]
    if "large" in args.only:
        note("a large model")
        with_, without = asyncio.run(
            in_turns(lambda: Large(LARGE_NBYTES), 5, args.rounds, args.seconds, idle=True)
        )
        print(f"\n  {'100 MB, 5 updates a second':44}{heads}")
        print_served("sent", with_)
        print_served("quiet", without)
        gap = median(with_, "longest_gap_ms") / median(without, "longest_gap_ms")
        found.append(Target("large: longest gap, times the quiet one", gap, 2, None, False))
        report["large"] = [[dataclasses.asdict(s) for s in runs] for runs in (with_, without)]
    if "fresh" in args.only:
        print(
            f"\n  {'from send to the first new response':44}{'ms':>12}{'one copy':>10}{'ratio':>10}"
        )
        for name in args.sizes:
            for who, measure in (("aioinfer", our_freshness), ("TorchRL", torchrl_freshness)):
                if who == "TorchRL" and torchrl is None:
                    continue
                note(f"{name}, {who}")
                runs = apart(measure, SIZES[name], args.repeats)
                report[f"fresh {name} {who}"] = runs
                if runs is None:
                    if who == "aioinfer":
                        raise RuntimeError(f"the freshness of {name} could not be measured")
                    print(f"  {f'{name}, {who}':44}{'failed':>12}")
                    continue
                took = statistics.median(took for took, _ in runs)
                plain = statistics.median(plain for _, plain in runs)
                ratio = took / plain
                print(f"  {f'{name}, {who}':44}{took * 1e3:12.2f}{plain * 1e3:10.2f}{ratio:10.2f}")
                if who == "aioinfer" and name != "1 MB":
                    title = f"fresh: {name}, times one copy"
                    found.append(Target(title, ratio, 2.5, 2, False))
    if "flat" in args.only:
        note("10,000 updates")
        first, last = flat(10_000)
        print(f"\n  {'10,000 updates: the server':44}{'before':>12}{'after':>10}")
        for name in first:
            print(f"  {name:44}{number(first[name]):>12}{number(last[name]):>10}")
        grown = last["resident_mb"] - first["resident_mb"]
        found.append(Target("flat: MB more after 10,000 updates", grown, 5, None, False))
        report["flat"] = [first, last]
    print_targets(found)
    options = {key: value for key, value in vars(args).items() if key != "json"}
    line = json.dumps(
        {
            "benchmark": "weights",
            **machine,
            "others_cpu_before": busy,
            "options": options,
            **report,
            "targets": [{**dataclasses.asdict(target), "met": target.met} for target in found],
        }
    )
    print("\n" + line)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
