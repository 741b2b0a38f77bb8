"""Requests per second of Monarch actors, beside a bare TCP echo and a bare endpoint.

As in ``in_process.py``, whose pieces this script uses: everybody is measured in one run and in
turns, and what counts is the median of the rounds, because only ratios within one run mean
anything. There are 4 actors in processes of their own with 8 coroutines each, which ask without
a pause. Contenders:

-   ``MonarchTransport`` over direct connections, with the server in this process, and a linear
    policy of 8 floats;
-   the same, in calls of endpoints;
-   a bare echo of 64 bytes over asyncio's streams, a connection per coroutine, with its server
    on an event loop in this process;
-   the same over one connection per actor, with numbered requests, for comparison;
-   a bare ``@concurrent_endpoint`` echo of 64 bytes, an actor of this process.

TorchRL's MonarchTransport cannot be constructed, so it is not among them.

    python tests/benchmarks/monarch_actors.py --help
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from _counting import Window
from in_process import (
    OtherProcesses,
    Target,
    describe_machine,
    note,
    number,
    print_targets,
    ratio,
    rounds_and_seconds,
    warn_if_busy,
)
from tensordict.nn import TensorDictModule

import aioinfer

ACTORS, COROUTINES = 4, 8
WARM_UP_S = 0.3
DIRECT, CALLS = "aioinfer, direct connections", "aioinfer, calls of endpoints"
TCP, NUMBERED = "bare TCP echo", "TCP echo, numbered requests"
ENDPOINT = "bare endpoint echo"
Rounds = dict[str, list[float]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes."""
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()


async def measure(rounds: int, seconds: float) -> Rounds:
    """Measure everybody in turns."""
    from _monarch_load import Echo, Load
    from monarch.actor import this_host, this_proc

    policy = TensorDictModule(torch.nn.Linear(8, 2), ["observation"], ["action"])
    transports = {
        DIRECT: aioinfer.MonarchTransport("direct"),
        CALLS: aioinfer.MonarchTransport("rpc"),
    }
    procs = this_host().spawn_procs(per_host={"procs": ACTORS})
    loads = {name: procs.spawn("load", Load, t.client()) for name, t in transports.items()}
    bare = loads[DIRECT]
    echoing = this_proc().spawn("echo", Echo)
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    contenders: dict[str, Callable[..., Awaitable[Any]]] = {
        DIRECT: loads[DIRECT].ask_server.call,
        CALLS: loads[CALLS].ask_server.call,
        TCP: lambda *args: bare.ask_stream.call(port, *args),
        NUMBERED: lambda *args: bare.ask_with_ids.call(port, *args),
        ENDPOINT: lambda *args: bare.ask_endpoint.call(echoing, *args),
    }
    results: Rounds = {name: [] for name in contenders}
    with aioinfer.InferenceServer(policy, list(transports.values())):
        for name in contenders:  # processes that start, and import torch, are not measured
            await contenders[name](COROUTINES, Window.soon(0.0, WARM_UP_S))
        for turn in range(rounds):
            order = list(contenders)[turn % len(contenders) :]
            for name in [*order, *(n for n in contenders if n not in order)]:
                answers = await contenders[name](COROUTINES, Window.soon(WARM_UP_S, seconds))
                results[name].append(sum(answers.values()) / seconds)
    server.close()
    await procs.stop()
    return results


def targets(medians: dict[str, float]) -> list[Target]:
    """Compare what was measured with what the project wants."""
    direct = ratio(medians[DIRECT], medians[TCP])
    calls = ratio(medians[CALLS], medians[ENDPOINT])
    return [
        Target("direct: of the bare TCP echo", direct, 0.4, None),
        Target("calls: of the bare endpoint echo", calls, 0.9, None),
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, report; return the exit status."""
    args = rounds_and_seconds("Measure aioinfer with Monarch actors.", argv)
    try:
        from monarch.actor import shutdown_context
    except ImportError:
        note("Monarch is not installed, so nothing is measured: pip install 'aioinfer[monarch]'")
        return 0
    # The actors' processes import the modules beside this one.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    torch.set_num_threads(1)
    machine = describe_machine()
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(
        f"{machine['cores']} cores, {ACTORS} actors with {COROUTINES} coroutines each", flush=True
    )
    before = OtherProcesses()
    time.sleep(1.0)
    busy_before = warn_if_busy(before, "in the second before the start")
    results = asyncio.run(measure(args.rounds, args.seconds))
    shutdown_context().get(timeout=10)
    medians = {name: statistics.median(figures) for name, figures in results.items()}
    print(f"\n{'requests/s, medians':40}{'':>10}{'min':>10}{'max':>10}{'of TCP':>9}")
    for name, figures in results.items():
        share = number(ratio(medians[name], medians[TCP]))
        line = f"  {name:38}{medians[name]:10,.0f}{min(figures):10,.0f}{max(figures):10,.0f}"
        print(line + f"{share:>9}")
    found = targets(medians)
    print_targets(found)
    line = json.dumps(
        {
            "benchmark": "monarch_actors",
            **machine,
            "others_cpu_before": busy_before,
            "options": {key: value for key, value in vars(args).items() if key != "json"},
            "medians": medians,
            "rounds": results,
            "targets": [{**dataclasses.asdict(target), "met": target.met} for target in found],
        }
    )
    print("\n" + line)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
