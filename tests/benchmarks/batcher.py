"""The batcher alone: what a request costs in it, however many others wait.

A closed loop in made-up time, without event loop, threads and tensors: as many clients as
requests wait; every turn a batch of up to 32 requests leaves, its forward ends, and its clients
ask again. Timed are

-   *push*: taking one request in;
-   *dispatch*: deciding, choosing the batch and taking note of its end, per request in it;
-   *discard*: withdrawing one request from the middle of the queue;

for ordinary requests, for requests with a timeout, and for a mix of priorities and timeouts.
Ordinary requests stand in a deque, so their cost should not depend on how many wait; the others
in heaps, whose depth grows with the logarithm. With 10 waiting a batch has only 10 rows to share
the cost of its decision. What counts is the median of the rounds, which go through all cases in
turn. The collector of cyclic garbage is off.

    python tests/benchmarks/batcher.py --help
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from aioinfer.batching import Batcher, Dispatch
from aioinfer.request import Request, Source

MAX_BATCH_SIZE = 32
FORWARD_S = 0.001
PARTS = ("push", "dispatch", "discard")

Kind = Callable[[int], tuple[float | None, int]]
"""Timeout and priority of the n-th request."""

KINDS: dict[str, Kind] = {
    "ordinary": lambda n: (None, 0),
    "timeouts": lambda n: (3600.0 + n % 7, 0),
    "mixed": lambda n: (3600.0 if n % 2 else None, n % 3),
}


class Loop:
    """``waiting`` clients in a closed loop with one batcher."""

    def __init__(self, waiting: int, kind: Kind) -> None:
        self.now = 0.0
        self._kind = kind
        self._made = 0
        self.batcher = Batcher(
            max_batch_size=MAX_BATCH_SIZE,
            min_batch_size=None,
            timeout=0.002,
            max_queue_size=10 * waiting,
        )
        sources = [Source() for _ in range(waiting)]
        for source in sources:
            self.batcher.join(source)
        self.push(list(self.requests(sources)))

    def requests(self, sources: Iterable[Source]) -> Iterator[Request]:
        """One new request of each source."""
        for source in sources:
            timeout, priority = self._kind(self._made)
            self._made += 1
            request = Request(None, 1, False, "signature", timeout, priority, source, None)
            request.submitted_at = self.now
            request.deadline = None if timeout is None else self.now + timeout
            yield request

    def push(self, requests: list[Request]) -> float:
        """Take them in; return the seconds that took."""
        push = self.batcher.push
        started = time.perf_counter()
        for request in requests:
            push(request)
        return time.perf_counter() - started

    def turn(self) -> tuple[float, float, int]:
        """One batch and the return of its clients: seconds to dispatch, to push, requests."""
        batcher = self.batcher
        started = time.perf_counter()
        action = batcher.next_action(self.now)
        decided = time.perf_counter()
        assert isinstance(action, Dispatch), action
        assert not action.expired
        self.now += FORWARD_S
        resumed = time.perf_counter()
        batcher.forward_ended(action.requests, self.now)
        dispatch_s = time.perf_counter() - resumed + decided - started
        again = list(self.requests([request.source for request in action.requests]))
        return dispatch_s, self.push(again), len(again)

    def discard(self, requests: list[Request]) -> float:
        """Withdraw them; return the seconds that took."""
        discard = self.batcher.discard
        started = time.perf_counter()
        for request in requests:
            discard(request)
        return time.perf_counter() - started


def measure(waiting: int, kind: Kind, requests: int) -> dict[str, float]:
    """Microseconds per request of each part, over about so many requests."""
    loop = Loop(waiting, kind)
    pushed = dispatched = 0.0
    count = 0
    while count < requests:
        dispatch_s, push_s, size = loop.turn()
        dispatched += dispatch_s
        pushed += push_s
        count += size
    discarded = 0.0
    discards = 0
    while discards < requests // 4:
        middle = sorted(loop.batcher.waiting(), key=id)[: max(1, min(waiting // 2, requests // 4))]
        discarded += loop.discard(middle)
        discards += len(middle)
        loop.push(list(loop.requests([request.source for request in middle])))
    return {
        "push": pushed / count * 1e6,
        "dispatch": dispatched / count * 1e6,
        "discard": discarded / discards * 1e6,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure the batcher alone.")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--waiting",
        type=int,
        nargs="+",
        default=[10, 1_000, 100_000],
        help="requests that wait; default: %(default)s",
    )
    parser.add_argument(
        "--requests", type=int, default=64_000, help="per measurement; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line there too")
    # `make bench ARGS=...` gives every benchmark the same options.
    args, other = parser.parse_known_args(argv)
    if other:
        print(f"not an option of this benchmark: {' '.join(other)}", file=sys.stderr)
    if min(args.rounds, args.requests, *args.waiting) < 1:
        parser.error("--rounds, --requests and --waiting must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run it."""
    args = parse(argv)
    cases = [(kind, waiting) for kind in KINDS for waiting in args.waiting]
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    gc.disable()
    for _ in range(args.rounds):
        for kind, waiting in cases:
            rounds[kind, waiting].append(measure(waiting, KINDS[kind], args.requests))
            gc.collect()
    gc.enable()
    results = [
        {
            "kind": kind,
            "waiting": waiting,
            **{
                f"{part}_us": round(statistics.median(r[part] for r in rounds[kind, waiting]), 3)
                for part in PARTS
            },
        }
        for kind, waiting in cases
    ]
    print(
        f"microseconds per request, median of {args.rounds} rounds, batches of {MAX_BATCH_SIZE}\n"
    )
    print(
        f"{'requests':<10} {'waiting':>9} {'push':>8} {'dispatch':>9} {'discard':>8} {'request':>8}"
    )
    for row in results:
        row["request_us"] = round(row["push_us"] + row["dispatch_us"], 3)  # type: ignore[operator]
        print(
            f"{row['kind']:<10} {row['waiting']:>9,} {row['push_us']:>8} {row['dispatch_us']:>9} "
            f"{row['discard_us']:>8} {row['request_us']:>8}"
        )
    growth = {
        kind: round(costs[-1] / costs[0], 2)
        for kind in KINDS
        for costs in [[float(r["request_us"]) for r in results if r["kind"] == kind]]
    }
    least, most = args.waiting[0], args.waiting[-1]
    print(f"\ncost of a request (push + dispatch) with {most:,} waiting, over that with {least:,}:")
    print("  ".join(f"{kind} {ratio}x" for kind, ratio in growth.items()))
    line = json.dumps(
        {
            "benchmark": "batcher",
            "python": platform.python_version(),
            "max_batch_size": MAX_BATCH_SIZE,
            "rounds": args.rounds,
            "results": results,
            "growth": growth,
        }
    )
    print("\n" + line)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
