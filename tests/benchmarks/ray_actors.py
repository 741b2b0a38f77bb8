"""Requests per second of Ray actors, beside TorchRL's RayTransport and bare echoes.

As in ``in_process.py``, whose pieces this script uses: everybody is measured in one run and in
turns, and what counts is the median of the rounds, because only ratios within one run mean
anything. There are actors in processes of their own that ask without a pause, 8 of them one
request at a time or 4 of them with 8 coroutines each; what they ask between two moments, the same
for all, counts. Contenders:

-   ``RayTransport`` over direct connections, with the server in an actor, and an MLP (8-64-4);
-   the same, in calls, which an actor between client and server passes on;
-   ``RayInferenceServer`` over direct connections, and in calls, which its replica takes itself;
-   a bare echo of 64 bytes over asyncio's streams, a connection per coroutine: on uvloop, which
    Ray's async actors run on, and on asyncio's own event loop;
-   a bare echo of 64 bytes in calls of an async actor, one for each request;
-   TorchRL's ``RayTransport`` with the same policy, its server in this process. It is measured
    last, all rounds in a row, as its threads never rest.

Then ``RayInferenceServer`` with one replica and with two, for a policy that sleeps for 5 ms, in
batches of at most 8, asked by 4 actors with 16 coroutines each, enough to keep both busy; and
what the simulator foretells of both.

    python tests/benchmarks/ray_actors.py --help
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from _counting import Window
from in_process import (
    OtherProcesses,
    Target,
    describe_machine,
    note,
    print_targets,
    ratio,
    rounds_and_seconds,
    warn_if_busy,
)

import aioinfer
from aioinfer.simulation import Clients, Constant, LinearCost, simulate

ROOT = Path(__file__).resolve().parents[2]
ACTORS, COROUTINES = 4, 8
BUSY, BATCH = 16, 8
WARM_UP_S = 0.3
ONE, MANY = "8 actors x 1", "4 actors x 8"
DIRECT, CALLS = "aioinfer, direct connections", "aioinfer, calls"
OWN_DIRECT, OWN = "RayInferenceServer, direct", "RayInferenceServer, calls"
TCP, PLAIN = "TCP echo, uvloop", "TCP echo, asyncio"
BARE, TORCHRL = "bare calls", "TorchRL"
Rounds = dict[str, list[float]]


def start_ray() -> Any:
    """Start a local Ray whose actors find what they import."""
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 1024 * 1024,
        runtime_env={
            "env_vars": {
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
                "OMP_NUM_THREADS": "1",
            }
        },
    )
    return ray


def rate_of(
    ray: Any, seconds: float, actors: Sequence[Any], ask: Callable[[Any, Window], Any]
) -> float:
    """Requests per second of all actors together; ``ask`` tells one of them to make some."""
    window = Window.soon(WARM_UP_S, seconds)
    return float(sum(ray.get([ask(actor, window) for actor in actors])) / seconds)


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> Rounds:
    """Measure everybody in every round, another one first each time."""
    results: Rounds = {name: [] for name in contenders}
    for turn in range(rounds):
        order = list(contenders)[turn % len(contenders) :]
        for name in [*order, *(n for n in contenders if n not in order)]:
            results[name].append(contenders[name]())
    return results


def links(ray: Any, actors: list[Any], rounds: int, seconds: float) -> Rounds:
    """Measure the links, and what there is to compare them with."""
    from _ray_load import Echo, Server, make_policy

    rate = functools.partial(rate_of, ray, seconds)
    light = ray.remote(num_cpus=0)
    echo, server = light(Echo).remote(), light(Server).remote()
    addresses = {TCP: ray.get(echo.listen.remote()), PLAIN: ray.get(echo.listen_plain.remote())}
    transports: dict[str, Any] = {
        DIRECT: aioinfer.RayTransport("direct"),
        CALLS: aioinfer.RayTransport("rpc"),
    }
    ray.get(server.serve.remote(list(transports.values())))
    kinds: dict[str, Any] = {OWN_DIRECT: "direct", OWN: "rpc"}
    servers = {
        name: aioinfer.RayInferenceServer(
            make_policy, ray_options={"num_cpus": 0}, connection=kind, max_batch_size=64
        )
        for name, kind in kinds.items()
    }
    transports |= {name: each.transport for name, each in servers.items()}
    contenders: dict[str, Callable[[], float]] = {}
    for size, (some, coroutines) in {ONE: (actors, 1), MANY: (actors[:4], COROUTINES)}.items():

        def ask(name: str, some: list[Any] = some, coroutines: int = coroutines) -> float:
            ray.get([each.use.remote(transports[name]) for each in some])
            return rate(some, lambda e, w: e.ask.remote(coroutines, w))

        def ask_tcp(name: str, some: list[Any] = some, coroutines: int = coroutines) -> float:
            plain, address = name == PLAIN, addresses[name]
            return rate(some, lambda e, w: e.ask_echo.remote(address, coroutines, w, plain))

        def ask_bare(some: list[Any] = some, coroutines: int = coroutines) -> float:
            return rate(some, lambda e, w: e.ask_bare.remote(echo, coroutines, w))

        contenders[f"{DIRECT}, {size}"] = lambda ask=ask: ask(DIRECT)
        contenders[f"{CALLS}, {size}"] = lambda ask=ask: ask(CALLS)
        contenders[f"{OWN_DIRECT}, {size}"] = lambda ask=ask: ask(OWN_DIRECT)
        contenders[f"{OWN}, {size}"] = lambda ask=ask: ask(OWN)
        contenders[f"{TCP}, {size}"] = lambda ask=ask_tcp: ask(TCP)
        contenders[f"{PLAIN}, {size}"] = lambda ask=ask_tcp: ask(PLAIN)
        contenders[f"{BARE}, {size}"] = ask_bare
    with servers[OWN_DIRECT], servers[OWN]:
        results = in_turns(contenders, rounds)
    for each in (server, echo):
        ray.kill(each)
    return results


def torchrl(ray: Any, actors: list[Any], rounds: int, seconds: float) -> Rounds:
    """Measure TorchRL's server, at its best: 8 actors, which is what it is for."""
    from _ray_load import make_policy
    from torchrl.modules.inference_server import InferenceServer, RayTransport

    transport = RayTransport()
    clients = [transport.client() for _ in actors]
    with InferenceServer(make_policy(), transport, max_batch_size=64):
        ray.get([a.use_theirs.remote(c) for a, c in zip(actors, clients, strict=True)])

        def ask() -> float:
            return rate_of(ray, seconds, actors, lambda e, w: e.ask_theirs.remote(w))

        return in_turns({f"{TORCHRL}, {ONE}": ask}, rounds)


def replicas(
    ray: Any, actors: list[Any], rounds: int, seconds: float
) -> tuple[Rounds, dict[str, float]]:
    """Measure one replica and two; return also what a forward and the way cost, in seconds."""
    from _ray_load import Sleeping

    rate = functools.partial(rate_of, ray, seconds)
    servers = {
        count: aioinfer.RayInferenceServer(
            Sleeping, count, ray_options={"num_cpus": 0}, max_batch_size=BATCH
        )
        for count in (1, 2)
    }
    some = actors[:ACTORS]
    with servers[1], servers[2]:
        ray.get(some[0].use.remote(servers[1].transport))
        lone_s = 1 / rate(some[:1], lambda e, w: e.ask.remote(1, w))

        def ask(count: int) -> float:
            ray.get([each.use.remote(servers[count].transport) for each in some])
            return rate(some, lambda e, w: e.ask.remote(BUSY, w))

        for count in servers:
            ask(count)  # what a replica has room for is learnt
        results = in_turns({"one replica": lambda: ask(1), "two replicas": lambda: ask(2)}, rounds)
        forward_s = servers[1].stats()[0].p50_forward_ms / 1000
    return results, {"forward_s": forward_s, "network_s": max(0.0, (lone_s - forward_s) / 2)}


def foretold(costs: dict[str, float]) -> dict[str, float]:
    """What the simulator makes of the same."""
    return {
        name: simulate(
            [Clients(ACTORS * BUSY, Constant(0.0), per_process=BUSY)],
            LinearCost(fixed=costs["forward_s"], per_row=0.0),
            max_batch_size=BATCH,
            replicas=count,
            network=costs["network_s"],
            warmup=1.0,
            duration=4.0,
        ).throughput
        for name, count in {"one replica": 1, "two replicas": 2}.items()
    }


def off(measured: float, foretold: float) -> float:
    """By what share the one differs from the other."""
    return abs(measured / foretold - 1)


def targets(medians: dict[str, float], simulated: dict[str, float]) -> list[Target]:
    """Compare what was measured with what the project wants."""
    direct = {"transport, direct": DIRECT, "server, direct": OWN_DIRECT}
    calls = {"transport, calls": CALLS, "server, calls": OWN}

    def compare(what: str, name: str, size: str, other: str, limit: float) -> Target:
        measured = ratio(medians[f"{name}, {size}"], medians.get(f"{other}, {size}"))
        return Target(f"{what}, {size}: of {other}", measured, limit, None)

    return [
        *[compare(what, name, ONE, TORCHRL, 25) for what, name in direct.items()],
        *[compare(what, name, ONE, TORCHRL, 5) for what, name in calls.items()],
        *[compare(what, name, MANY, PLAIN, 0.4) for what, name in direct.items()],
        *[compare(what, name, MANY, TCP, 0.4) for what, name in direct.items()],
        *[compare(what, name, MANY, BARE, 1) for what, name in calls.items()],
        Target(
            "two replicas: of one",
            ratio(medians["two replicas"], medians["one replica"]),
            1.9,
            None,
        ),
        *[
            Target(f"{name}: off what was foretold", off(medians[name], rate), 0.15, None, False)
            for name, rate in simulated.items()
        ],
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, report; return the exit status."""
    args = rounds_and_seconds("Measure aioinfer with Ray actors.", argv)
    try:
        import ray as ray
    except ImportError:
        note("Ray is not installed, so nothing is measured: pip install 'aioinfer[ray]'")
        return 0
    from _ray_load import Actor

    torch.set_num_threads(1)
    machine = describe_machine()
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(f"{machine['cores']} cores", flush=True)
    before = OtherProcesses()
    time.sleep(1.0)
    busy_before = warn_if_busy(before, "in the second before the start")
    ray = start_ray()
    actors = [ray.remote(num_cpus=0)(Actor).remote() for _ in range(8)]
    found, costs = replicas(ray, actors, args.rounds, args.seconds)
    results = {**links(ray, actors, args.rounds, args.seconds), **found}
    try:
        results |= torchrl(ray, actors, args.rounds, args.seconds)
    except ImportError:
        note("TorchRL is not installed, so there is nothing to compare with")
    ray.shutdown()
    medians = {name: statistics.median(figures) for name, figures in results.items()}
    simulated = foretold(costs)
    print(f"\n{'requests/s, medians':46}{'':>10}{'min':>10}{'max':>10}")
    for name, figures in results.items():
        print(f"  {name:44}{medians[name]:10,.0f}{min(figures):10,.0f}{max(figures):10,.0f}")
    for name, rate in simulated.items():
        print(f"  {name + ', foretold':44}{rate:10,.0f}")
    forward_ms, network_us = 1e3 * costs["forward_s"], 1e6 * costs["network_s"]
    print(f"  a forward takes {forward_ms:.2f} ms, the way to the server {network_us:.0f} us")
    wanted = targets(medians, simulated)
    print_targets(wanted)
    line = json.dumps(
        {
            "benchmark": "ray_actors",
            **machine,
            "others_cpu_before": busy_before,
            "options": {key: value for key, value in vars(args).items() if key != "json"},
            "medians": medians,
            "rounds": results,
            "costs": costs,
            "foretold": simulated,
            "targets": [{**dataclasses.asdict(target), "met": target.met} for target in wanted],
        }
    )
    print("\n" + line)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
