r"""Sizes a system from the command line: so many actors, so many replicas, and what comes of it.

    python -m aioinfer.simulate --actors 1000 --think exponential:20ms \
        --forward 1ms+20us*rows --replicas 1 2 4

simulates each number of actors with each number of replicas, and prints a table. The simulation
is that of :mod:`aioinfer.simulation`: virtual time, but the batcher of the server and the
balancer of its clients.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from aioinfer.simulation import Clients, SimulationResult, simulate
from aioinfer.simulation.notation import COSTS, THINK_TIMES, forward_cost, seconds, think_time

_WARMUP_REQUESTS = 20_000
_COUNTED_REQUESTS = 100_000

_HELP = f"""\
THINK, the time from an answer to the next request:
{THINK_TIMES}

COST, of one forward:
{COSTS}

A time is a number of seconds, or a number and us, ms or s: 0.02, 20ms.

The columns: rows answered per second; requests per second of one actor; mean rows per forward;
from submission to answer, in ms; the share of their time that actors wait for answers; the
share of the time that executors are busy, and of the least and the most busy one.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: of the command line; ``None`` for those of this process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.min_batch_size is not None and options.min_batch_size > options.max_batch_size:
        parser.error(
            "argument --min-batch-size: must be at most --max-batch-size, "
            f"{options.max_batch_size}, got {options.min_batch_size}"
        )
    if options.rows > options.max_batch_size:
        parser.error(
            f"argument --rows: must be at most --max-batch-size, {options.max_batch_size}, "
            f"got {options.rows}"
        )
    runs = [
        _run(actors, replicas, options)
        for actors in options.actors
        for replicas in options.replicas
    ]
    if options.json:
        json.dump(runs, sys.stdout, indent=1)
        print()
    else:
        print(_table(runs))


def horizon(
    clients: Clients,
    cost: Callable[[int], float],
    replicas: int,
    max_batch_size: int,
    network: float,
) -> tuple[float, float]:
    """Return how long to warm up and how long to count, in seconds of virtual time.

    Every actor has its turn in both, and a few actors have many: enough for percentiles.
    """
    rng = random.Random(0)
    think = statistics.fmean(clients.think.sample(rng, 0.0) for _ in range(1000))
    rows = clients.count * clients.rows
    batch = max(1, min(max_batch_size, rows // replicas))
    saturated = rows * cost(batch) / (batch * replicas)
    cycle = max(think + 2 * network + cost(clients.rows), saturated)
    warmup = cycle * max(1.5, _WARMUP_REQUESTS / clients.count)
    return warmup, cycle * max(1.0, _COUNTED_REQUESTS / clients.count)


def _run(actors: int, replicas: int, options: argparse.Namespace) -> dict[str, Any]:
    clients = Clients(
        actors, options.think, rows=options.rows, per_process=options.actors_per_process
    )
    warmup, duration = horizon(
        clients, options.forward, replicas, options.max_batch_size, options.network
    )
    result = simulate(
        [clients],
        options.forward,
        replicas=replicas,
        room=options.room,
        network=options.network,
        warmup=warmup if options.warmup is None else options.warmup,
        duration=duration if options.duration is None else options.duration,
        seed=options.seed,
        max_batch_size=options.max_batch_size,
        min_batch_size=options.min_batch_size,
        timeout=options.timeout,
        far_sighted=options.objective == "throughput",
    )
    return {"actors": actors, "replicas": replicas} | _figures(actors, result)


def _figures(actors: int, result: SimulationResult) -> dict[str, Any]:
    requests_per_s = result.requests / result.duration
    return {
        "duration_s": result.duration,
        "rows_per_s": result.throughput,
        "requests_per_s_of_an_actor": requests_per_s / actors,
        "mean_batch_size": result.mean_batch_size,
        "mean_latency_ms": result.mean_latency * 1e3,
        "p50_latency_ms": result.p50_latency * 1e3,
        "p95_latency_ms": result.p95_latency * 1e3,
        "p99_latency_ms": result.p99_latency * 1e3,
        # Little's law: those who wait are the rate times how long each does.
        "share_of_time_waiting": min(1.0, requests_per_s * result.mean_latency / actors),
        "utilisation": result.utilisation,
        "utilisations": result.utilisations,
        "reasons": result.reasons,
    }


def _table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'':27}{'per':>9}{'mean':>9}  {'latency, ms':<31}{'actors':>8}{'executors':>10}",
        f"{'actors':>9}{'replicas':>9}{'rows/s':>9}{'actor/s':>9}{'batch':>9}"
        f"{'mean':>9}{'p50':>8}{'p95':>8}{'p99':>8}{'waiting':>8}{'busy':>10}",
    ]
    for run in runs:
        each = run["utilisations"]
        spread = f"  ({min(each):.0%} to {max(each):.0%})" if len(each) > 1 else ""
        lines.append(
            f"{run['actors']:9,}{run['replicas']:9,}{run['rows_per_s']:9,.0f}"
            f"{run['requests_per_s_of_an_actor']:9.3g}{run['mean_batch_size']:9,.1f}"
            f"{run['mean_latency_ms']:9.2f}{run['p50_latency_ms']:8.2f}"
            f"{run['p95_latency_ms']:8.2f}{run['p99_latency_ms']:8.2f}"
            f"{run['share_of_time_waiting']:8.0%}{run['utilisation']:10.0%}{spread}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aioinfer.simulate",
        description="How fast N actors and M replicas of a server would be, in virtual time.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    one_or_more = _argument(_count)
    add("--actors", type=one_or_more, nargs="+", required=True, metavar="N", help="how many")
    add(
        "--think", type=_argument(think_time), required=True, metavar="THINK",
        help="how long each takes from an answer to its next request",
    )  # fmt: skip
    add(
        "--forward", type=_argument(forward_cost), required=True, metavar="COST",
        help="what a forward takes",
    )  # fmt: skip
    add("--replicas", type=one_or_more, nargs="+", default=[1], metavar="M", help="default: 1")
    add("--rows", type=one_or_more, default=1, help="rows of a request; default: 1")
    add(
        "--network", type=_argument(seconds), default=0.0, metavar="TIME",
        help="what a request takes to its server, and an answer back; default: 0",
    )  # fmt: skip
    add(
        "--room", type=one_or_more, default=None, metavar="ROWS",
        help="that a replica has under way before a second one is used too; default: as many "
        "as add no more than what a forward costs in any case, up to a batch",
    )  # fmt: skip
    add(
        "--actors-per-process", type=one_or_more, default=16, metavar="K",
        help="that share a view of how loaded the replicas are; default: 16",
    )  # fmt: skip
    add("--max-batch-size", type=one_or_more, default=64, metavar="ROWS", help="default: 64")
    add(
        "--min-batch-size", type=one_or_more, default=None, metavar="ROWS",
        help="default: the server decides",
    )  # fmt: skip
    add(
        "--timeout", type=_argument(seconds), default=None, metavar="TIME",
        help="how long a batch may be held back; default: the server's",
    )  # fmt: skip
    add("--objective", choices=("throughput", "latency"), default="throughput")
    add(
        "--duration", type=_argument(_some_time), default=None, metavar="TIME",
        help="virtual time that is counted; default: each actor asks at least once, and all "
        f"together {_COUNTED_REQUESTS:,} times",
    )  # fmt: skip
    add(
        "--warmup", type=_argument(seconds), default=None, metavar="TIME",
        help="virtual time before that; default: as above, with 1.5 and "
        f"{_WARMUP_REQUESTS:,} times",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="of the think times; default: 0")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _argument(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse say what was wrong, beside the name of the argument."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _some_time(text: str) -> float:
    if not (found := seconds(text)):
        raise ValueError(f"must be more than 0, got {text!r}")
    return found


if __name__ == "__main__":
    main()
