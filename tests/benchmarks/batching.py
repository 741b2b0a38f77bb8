"""How good are the server's own batching decisions? Run by ``make bench``.

Three parts:

*   *Simulated*: workloads of synthetic clients in virtual time, on the batcher that serves. For
    each, the *oracle* is the best throughput over a grid of static settings (min_batch_size x
    timeout). Beside it: the default, which is told nothing; dispatch at once (what TorchRL's
    server does by default); and "all clients in, or 10 ms".
*   *Real*: asyncio clients that sleep, a real server and real policies; the default against a
    grid of static settings, in turns, median of several rounds.
*   *Cost* of one decision, for several numbers of waiting clients.

Prints tables and one line of JSON. ``--markdown`` and ``--plot`` write the simulated part for
the documentation, ``--quick`` shortens everything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from aioinfer import AsyncioTransport, InferenceServer
from aioinfer.batching import Batcher, Dispatch, Wait
from aioinfer.request import Request, Source
from aioinfer.simulation import (
    Bimodal,
    Bursts,
    Clients,
    Constant,
    Exponential,
    Pareto,
    SimulationResult,
    Uniform,
    simulate,
)

MS = 1e-3


@dataclass(frozen=True)
class Linear:
    """A forward of ``rows`` rows takes ``fixed + per_row * rows`` milliseconds."""

    fixed: float
    per_row: float

    def __call__(self, rows: int) -> float:
        return (self.fixed + self.per_row * rows) * MS


@dataclass(frozen=True)
class Workload:
    clients: tuple[Clients, ...]
    cost: Linear
    max_batch_size: int = 64

    @property
    def count(self) -> int:
        return sum(c.count for c in self.clients)


def _of(cost: Linear, *clients: Clients, max_batch_size: int = 64) -> Workload:
    return Workload(clients, cost, max_batch_size)


WORKLOADS: dict[str, Workload] = {
    "1 client": _of(Linear(1, 0.01), Clients(1, Constant(1 * MS))),
    "8, exponential": _of(Linear(1, 0.05), Clients(8, Exponential(2 * MS))),
    "64 in lock-step, think < a": _of(Linear(5, 0.01), Clients(64, Constant(2 * MS))),
    "64 in lock-step, think > a": _of(Linear(3, 0.05), Clients(64, Constant(6 * MS))),
    "2 x 32, out of step, think < a": _of(
        Linear(5, 0.01),
        Clients(32, Uniform(1.9 * MS, 2.1 * MS)),
        Clients(32, Uniform(1.9 * MS, 2.1 * MS), joins_at=3.5 * MS),
    ),
    "32, jittered lock-step": _of(Linear(4, 0.05), Clients(32, Uniform(1.5 * MS, 2.5 * MS))),
    "32 in lock-step, b dominates": _of(Linear(0.1, 0.12), Clients(32, Constant(5 * MS))),
    "64 in lock-step, mixed": _of(Linear(1, 0.05), Clients(64, Constant(10 * MS))),
    "32, jittered, b dominates": _of(Linear(0.1, 0.12), Clients(32, Uniform(4 * MS, 6 * MS))),
    "64, exponential, b dominates": _of(Linear(0.2, 0.4), Clients(64, Exponential(5 * MS))),
    "32, exponential, mixed": _of(Linear(2, 0.1), Clients(32, Exponential(5 * MS))),
    "64, heavy-tailed": _of(Linear(3, 0.05), Clients(64, Pareto(2 * MS, 1.5))),
    "64, bimodal": _of(Linear(3, 0.05), Clients(64, Bimodal(2 * MS, 50 * MS, 0.05))),
    "48 fast, 16 slow": _of(
        Linear(3, 0.05), Clients(48, Constant(2 * MS)), Clients(16, Constant(20 * MS))
    ),
    "30 and 2 stragglers": _of(
        Linear(2, 0.05), Clients(30, Constant(2 * MS)), Clients(2, Constant(50 * MS))
    ),
    "joining and leaving": _of(
        Linear(2, 0.1),
        Clients(16, Exponential(3 * MS)),
        Clients(32, Exponential(3 * MS), joins_at=2.0, leaves_at=4.0),
    ),
    "64, in bursts": _of(Linear(2, 0.1), Clients(64, Bursts(Exponential(3 * MS), 1.0, 0.5))),
    "256, lightly loaded": _of(
        Linear(1, 0.02), Clients(256, Exponential(200 * MS)), max_batch_size=256
    ),
    "1000, exponential": _of(
        Linear(4, 0.05), Clients(1000, Exponential(50 * MS)), max_batch_size=256
    ),
    "1000 in lock-step": _of(
        Linear(4, 0.02), Clients(1000, Constant(20 * MS)), max_batch_size=1024
    ),
}
MINIMA = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 512, 1000)
TIMEOUTS = (0.5 * MS, 1 * MS, 2 * MS, 5 * MS, 10 * MS, 20 * MS, 50 * MS)


def _run(workload: Workload, duration: float, seed: int, **settings: Any) -> SimulationResult:
    return simulate(
        workload.clients,
        workload.cost,
        duration=duration,
        warmup=1.0,
        seed=seed,
        max_batch_size=workload.max_batch_size,
        **settings,
    )


def measure(name: str, duration: float, seed: int) -> dict[str, Any]:
    """One workload: the oracle, and the others relative to it."""
    workload = WORKLOADS[name]
    everybody = min(workload.count, workload.max_batch_size)
    grid = [
        (minimum, timeout)
        for minimum in sorted({m for m in MINIMA if m < everybody} | {everybody})
        for timeout in (TIMEOUTS if minimum > 1 else TIMEOUTS[:1])
    ]
    static = {
        setting: _run(workload, duration, seed, min_batch_size=setting[0], timeout=setting[1])
        for setting in grid
    }
    best = max(static, key=lambda setting: static[setting].throughput)
    oracle = static[best]
    contenders = {
        "learnt": _run(workload, duration, seed),
        "at once": static[grid[0]],
        "10 ms timer": static[(everybody, 10 * MS)] if everybody > 1 else static[grid[0]],
    }
    return {
        "name": name,
        "seed": seed,
        "oracle": oracle.throughput,
        "min_batch_size": best[0],
        "timeout_ms": best[1] / MS,
        "p99_ms": oracle.p99_latency / MS,
        "throughput": {k: r.throughput / oracle.throughput for k, r in contenders.items()},
        "p99": {k: r.p99_latency / oracle.p99_latency for k, r in contenders.items()},
    }


def simulated(duration: float, seeds: int) -> list[dict[str, Any]]:
    jobs = [(name, duration, seed) for name in WORKLOADS for seed in range(seeds)]
    with ProcessPoolExecutor(2) as pool:
        runs = list(pool.map(measure, *zip(*jobs, strict=True)))
    worst = []
    for name in WORKLOADS:  # of several seeds the one in which the default did worst
        mine = [run for run in runs if run["name"] == name]
        worst.append(min(mine, key=lambda run: run["throughput"]["learnt"]))
        worst[-1]["p99"]["learnt"] = max(run["p99"]["learnt"] for run in mine)
    return worst


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| clients | oracle, rows/s | its setting "
        "| learnt | p99 | at once | p99 | 10 ms timer | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["name"], f"{row['oracle']:,.0f}"]
        cells.append(f"min {row['min_batch_size']}, {row['timeout_ms']:g} ms")
        for contender in ("learnt", "at once", "10 ms timer"):
            cells += [f"{row['throughput'][contender]:.3f}", f"{row['p99'][contender]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        contender: {
            "geometric_mean": math.exp(
                statistics.fmean(math.log(row["throughput"][contender]) for row in rows)
            ),
            "worst": min(row["throughput"][contender] for row in rows),
            "p99": max(row["p99"][contender] for row in rows),
        }
        for contender in ("learnt", "at once", "10 ms timer")
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    names = [row["name"] for row in rows]
    places = range(len(rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * len(rows) + 1.2), sharey=True)
    styles = {"learnt": ("o", "C0", 46), "at once": ("x", "C1", 34), "10 ms timer": ("+", "C2", 44)}
    for axis, figure_of, title in (
        (axes[0], "throughput", "throughput / oracle's (more is better)"),
        (axes[1], "p99", "p99 latency / oracle's (less is better)"),
    ):
        for contender, (marker, color, size) in styles.items():
            values = [row[figure_of][contender] for row in rows]
            axis.scatter(values, places, marker=marker, color=color, s=size, label=contender)
        axis.axvline(1.0, color="0.6", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
    axes[1].set_xscale("log")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5)
    axes[1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[1].xaxis.set_minor_locator(NullLocator())
    axes[0].set_yticks(list(places), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# -- real ----------------------------------------------------------------------------------------


def _mlp() -> tuple[TensorDictModule, torch.Size]:
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    return TensorDictModule(net, in_keys=["observation"], out_keys=["action"]), torch.Size([8])


def _cnn() -> tuple[TensorDictModule, torch.Size]:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(4, 32, 8, 4), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 4, 2), torch.nn.ReLU(),
        torch.nn.Conv2d(64, 64, 3, 1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(3136, 512), torch.nn.ReLU(), torch.nn.Linear(512, 6),
    )  # fmt: skip
    shape = torch.Size([4, 84, 84])
    return TensorDictModule(net, in_keys=["observation"], out_keys=["action"]), shape


Think = Callable[[random.Random], float]
REAL: dict[str, tuple[Callable[[], tuple[TensorDictModule, torch.Size]], list[Think]]] = {
    "MLP, 32 x 2 ms": (_mlp, [lambda rng: 2 * MS] * 32),
    "MLP, 64, exponential 5 ms": (_mlp, [lambda rng: rng.expovariate(200)] * 64),
    "CNN, 32 x 5 ms": (_cnn, [lambda rng: 5 * MS] * 32),
    "CNN, 16 x 2 ms, 4 x 40 ms": (
        _cnn,
        [lambda rng: 2 * MS] * 16 + [lambda rng: 40 * MS] * 4,
    ),
    "CNN, 24, exponential 10 ms": (_cnn, [lambda rng: rng.expovariate(100)] * 24),
}


async def _serve(name: str, seconds: float, settings: dict[str, Any]) -> float:
    make, thinks = REAL[name]
    policy, shape = make()
    answered = 0
    async with InferenceServer(policy, AsyncioTransport(), **settings) as server:
        until = time.monotonic() + seconds

        async def actor(think: Think, rng: random.Random) -> None:
            nonlocal answered
            client = server.client()
            td = TensorDict({"observation": torch.rand(shape)})
            while time.monotonic() < until:
                await asyncio.sleep(think(rng))
                await client(td)
                answered += 1

        started = time.monotonic()
        await asyncio.gather(*(actor(t, random.Random(i)) for i, t in enumerate(thinks)))
        return answered / (time.monotonic() - started)


def real(seconds: float, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, (_, thinks) in REAL.items():
        settings: dict[str, dict[str, Any]] = {"learnt": {}}
        for minimum in (1, len(thinks) // 4, len(thinks) // 2, len(thinks)):
            for timeout in (2 * MS, 10 * MS) if minimum > 1 else (2 * MS,):
                label = f"min {minimum}, {timeout / MS:g} ms"
                settings[label] = {"min_batch_size": minimum, "timeout": timeout}
        rates: dict[str, list[float]] = {label: [] for label in settings}
        for _ in range(rounds):
            for label, setting in settings.items():
                rates[label].append(asyncio.run(_serve(name, seconds, setting)))
        medians = {label: statistics.median(found) for label, found in rates.items()}
        learnt = medians.pop("learnt")
        best = max(medians, key=lambda label: medians[label])
        rows.append(
            {"name": name, "learnt": learnt, "best": best, "best_rate": medians[best]}
            | {"ratio": learnt / medians[best]}
        )
    return rows


# -- the cost of a decision ----------------------------------------------------------------------


def decisions(rounds: int) -> list[dict[str, Any]]:
    """The shortest of many: what the decision costs, not what the machine does meanwhile."""
    rows = []
    for waiting, out in ((1, 8), (8, 24), (32, 32), (256, 256)):
        leave, wait = [], []
        batcher = Batcher(
            max_batch_size=1024, min_batch_size=None, timeout=0.05, max_queue_size=1 << 20
        )
        sources = [Source() for _ in range(waiting + out)]
        for source in sources:
            batcher.join(source)
        rng = random.Random(0)
        now = 0.0
        ready = [(rng.expovariate(300), i) for i in range(len(sources))]
        for _ in range(rounds):
            ready.sort()
            while ready and batcher.rows < waiting:
                at, i = ready.pop(0)
                now = max(now, at)
                _push(batcher, sources[i], i, now)
            while True:
                started = time.perf_counter()
                action = batcher.next_action(now)
                took = (time.perf_counter() - started) * 1e6
                if isinstance(action, Dispatch):
                    leave.append((took, action.rows))
                    break
                wait.append((took, batcher.rows))
                now, ready = _let_pass(batcher, sources, ready, now, action)
            now += (1.0 + 0.05 * action.rows) * MS
            batcher.forward_ended(action.requests, now)
            ready += [(now + rng.expovariate(300), r.handle) for r in action.requests]
        for kind, found in (("leave", leave), ("wait", wait)):
            if len(found) >= 20:
                per = sorted(took - 0.2 * rows_ for took, rows_ in found)
                rows.append({"waiting": waiting, "decision": kind, "us": per[len(per) // 20]})
    return rows


def _push(batcher: Batcher, source: Source, i: int, now: float) -> None:
    request = Request(None, 1, False, "", None, 0, source, i)
    request.submitted_at = now
    batcher.push(request)


def _let_pass(
    batcher: Batcher,
    sources: list[Source],
    ready: list[tuple[float, int]],
    now: float,
    action: Wait,
) -> tuple[float, list[tuple[float, int]]]:
    ready.sort()
    until = math.inf if action.until is None else action.until
    if ready and ready[0][0] <= until:
        at, i = ready.pop(0)
        now = max(now, at)
        _push(batcher, sources[i], i, now)
    else:
        now = until
    return now, ready


# -- main ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("simulated", "real", "decisions")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="short runs, one seed")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a real measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of the real part")
    parser.add_argument("--markdown", type=Path, help="write the simulated table here")
    parser.add_argument("--plot", type=Path, help="draw the simulated part here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)

    result: dict[str, Any] = {}
    if "simulated" in options.parts:
        rows = simulated(1.5 if options.quick else 3.0, 1 if options.quick else 2)
        result["simulated"] = rows
        result["summary"] = _report_simulated(rows)
        if options.markdown:
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text("\n".join(table(rows)) + "\n")
        if options.plot:
            plot(rows, options.plot)
    if "real" in options.parts:
        seconds, rounds = (0.5, 1) if options.quick else (options.seconds, options.rounds)
        result["real"] = _report_real(real(seconds, rounds))
    if "decisions" in options.parts:
        result["decisions"] = _report_decisions(decisions(100 if options.quick else 600))
    print("\n" + json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _report_simulated(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    totals = summary(rows)
    print("Simulated; throughput and p99 latency relative to the oracle's\n")
    print("\n".join(table(rows)) + "\n")
    for contender, total in totals.items():
        print(
            f"{contender:12s} geometric mean {total['geometric_mean']:.3f}, "
            f"worst {total['worst']:.3f}, largest p99 {total['p99']:.2f}"
        )
    learnt = totals["learnt"]
    _judge("worst >= 0.97", learnt["worst"] >= 0.97)
    _judge("geometric mean > 1.0", learnt["geometric_mean"] > 1.0)
    _judge("p99 <= 1.5", learnt["p99"] <= 1.5)
    return totals


def _report_real(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    print("\nReal, requests/s")
    for row in rows:
        print(
            f"{row['name']:28s} learnt {row['learnt']:8.0f}   best static {row['best_rate']:8.0f} "
            f"({row['best']})   ratio {row['ratio']:.2f}"
        )
    _judge("ratio >= 0.9 everywhere", all(row["ratio"] >= 0.9 for row in rows))
    return rows


def _report_decisions(costs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    print("\nOne decision, microseconds beyond 0.2 per waiting client (5th percentile)")
    for cost in costs:
        print(f"{cost['waiting']:4.0f} waiting, {cost['decision']:5s} {cost['us']:6.2f}")
    _judge("at most 5", all(cost["us"] <= 5.0 for cost in costs))
    return costs


def _judge(target: str, met: bool) -> None:
    print(f"  {target}: {'met' if met else 'NOT MET'}")


if __name__ == "__main__":
    main()
