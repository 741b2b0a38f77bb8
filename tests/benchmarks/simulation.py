"""Does the simulator foretell what a real server does? Run by ``make bench``.

For 8, 16, 32 and 64 actors: coroutines that think (sleep), and ask a real
:class:`aioinfer.InferenceServer` whose policy takes time. Two policies: one that sleeps, as a
policy on an accelerator does as far as the CPU can tell, and IMPALA's network, which computes.

What the simulator is told was measured:

*   *The cost of a forward.* Of the policy that sleeps it is measured beforehand, with actors that
    do not think, so that every batch holds all of them: ``stats().p50_forward_ms`` at 1, 8, 16,
    32 and 64 rows. That of the network is the mean by rows in the
    run that is compared: how fast a shared machine computes changes by a third from one minute to
    the next, and that is not the question here.
*   *The network.* A lone actor that does not think: half of its time per request that is not the
    forward's. There is no network; this is what the event loop and the threads take.
*   *Think times.* From an answer to the next request, as the actors saw them in the run that is
    compared. A sleep takes longer than it was asked to, by however much else the loop has to do.
    The simulator draws from them at random.

The actors are on an event loop with fine timers. Those of asyncio and uvloop sleep in whole
milliseconds, after which all who are due ask together; the simulator's actors know nothing of each
other.

Then it is asked for throughput and mean batch size, and both are compared. Prints a table and one
line of JSON; ``--markdown`` writes the table for the documentation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import selectors
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer import AsyncioTransport, InferenceServer
from aioinfer.simulation import Clients, Measured, MeasuredCost, SimulationResult, simulate

MS = 1e-3
ACTORS = (8, 16, 32, 64)
ROWS = (1, 8, 16, 32, 64)
WITHIN = 0.15

Think = Callable[[random.Random], float]


class Sleeper(torch.nn.Module):
    """A forward of ``rows`` rows takes 5 ms and 0.1 ms per row, and leaves the CPU alone."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        time.sleep((5 + 0.1 * len(observation)) * MS)
        return observation.sum(-1, keepdim=True)


def _sleeper() -> tuple[TensorDictModule, torch.Size]:
    return _policy(Sleeper()), torch.Size([8])


class Block(torch.nn.Module):
    """One of the three blocks of IMPALA's network."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(inputs, outputs, 3, padding=1)
        self.residual = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.ReLU(), torch.nn.Conv2d(outputs, outputs, 3, padding=1),
                torch.nn.ReLU(), torch.nn.Conv2d(outputs, outputs, 3, padding=1),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool2d(self.first(x), 3, 2, 1)
        for residual in self.residual:
            x = x + residual(x)
        return x


def _impala() -> tuple[TensorDictModule, torch.Size]:
    net = torch.nn.Sequential(
        Block(4, 16), Block(16, 32), Block(32, 32), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(32 * 11 * 11, 256), torch.nn.ReLU(), torch.nn.Linear(256, 6),
    )  # fmt: skip
    return _policy(net), torch.Size([4, 84, 84])


def _policy(net: torch.nn.Module) -> TensorDictModule:
    return TensorDictModule(net, in_keys=["observation"], out_keys=["action"])


SLEEPER = "5 ms + 0.1 ms per row"
IMPALA = "IMPALA, 84 x 84"
POLICIES = {SLEEPER: _sleeper, IMPALA: _impala}
LOADS: list[tuple[str, str, Think]] = [
    (SLEEPER, "uniform, 5 to 15 ms", lambda rng: rng.uniform(5, 15) * MS),
    (SLEEPER, "exponential, 20 ms", lambda rng: rng.expovariate(50)),
    (IMPALA, "exponential, 50 ms", lambda rng: rng.expovariate(20)),
]


def _precise_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


# -- the real server -----------------------------------------------------------------------------


class Run:
    """A real server and its actors, for some seconds."""

    def __init__(self, policy: str, actors: int, think: Think | None, **settings: Any) -> None:
        self._policy, self._shape = POLICIES[policy]()
        self._policy.module.register_forward_pre_hook(self._starts)
        self._policy.module.register_forward_hook(self._ends)
        self._actors = actors
        self._think = think
        self._settings = settings
        self._started = 0.0
        self.latencies: list[float] = []
        self.thought: list[float] = []
        self.forwards: dict[int, list[float]] = {}

    def _starts(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self._started = time.perf_counter()

    def _ends(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], _: Any) -> None:
        took = time.perf_counter() - self._started
        self.forwards.setdefault(len(inputs[0]), []).append(took)

    def measure(self, warmup: float, seconds: float) -> Any:
        """Run, and return the server's stats of what is not warm-up."""
        with asyncio.Runner(loop_factory=_precise_loop) as runner:
            return runner.run(self._serve(warmup, seconds))

    async def _serve(self, warmup: float, seconds: float) -> Any:
        async with InferenceServer(self._policy, AsyncioTransport(), **self._settings) as server:
            actors = [
                asyncio.create_task(self._act(server.client(), random.Random(seed)))
                for seed in range(self._actors)
            ]
            await asyncio.sleep(warmup)
            server.stats(reset=True)
            self.latencies.clear()
            self.thought.clear()
            self.forwards.clear()
            await asyncio.sleep(seconds)
            stats = server.stats()
            for actor in actors:
                actor.cancel()
            await asyncio.gather(*actors, return_exceptions=True)
            return stats

    async def _act(self, client: Callable[[TensorDictBase], Any], rng: random.Random) -> None:
        td = TensorDict({"observation": torch.rand(self._shape)})
        while True:
            answered = time.monotonic()
            if self._think is not None:
                await asyncio.sleep(self._think(rng))
            asked = time.monotonic()
            self.thought.append(asked - answered)
            await client(td)
            self.latencies.append(time.monotonic() - asked)


def cost_beforehand(policy: str, seconds: float) -> MeasuredCost:
    points = {}
    for rows in ROWS:
        run = Run(policy, rows, None, min_batch_size=rows, timeout=1.0)
        points[rows] = run.measure(0.2, seconds).p50_forward_ms * MS
    return MeasuredCost(points)


def cost_meanwhile(run: Run) -> MeasuredCost:
    """What forwards took by rows, sizes alike taken together."""
    alike: dict[int, list[tuple[int, float]]] = {}
    for rows, seconds in run.forwards.items():
        alike.setdefault(rows.bit_length(), []).extend((rows, took) for took in seconds)
    points = {}
    for found in alike.values():
        rows = round(statistics.fmean(rows for rows, _ in found))
        points[rows] = statistics.fmean(seconds for _, seconds in found)
    return MeasuredCost(points)


def network_of(policy: str, seconds: float) -> float:
    run = Run(policy, 1, None, min_batch_size=1)
    stats = run.measure(0.2, seconds)
    return max(0.0, statistics.median(run.latencies) - stats.p50_forward_ms * MS) / 2


# -- the comparison ------------------------------------------------------------------------------


def compare(seconds: float) -> list[dict[str, Any]]:
    beforehand = cost_beforehand(SLEEPER, seconds / 4)
    rows = []
    for policy, name, think in LOADS:
        network = network_of(policy, seconds / 4)
        for actors in ACTORS:
            run = Run(policy, actors, think)
            stats = run.measure(seconds / 4, seconds)
            cost = beforehand if policy == SLEEPER else cost_meanwhile(run)
            found = foretold(actors, run.thought, cost, network)
            rows.append({
                "policy": policy, "think": name, "actors": actors,
                "thought_ms": statistics.fmean(run.thought) / MS,
                "rows_per_s": stats.rows_per_s, "simulated_rows_per_s": found.throughput,
                "batch": stats.avg_batch_size, "simulated_batch": found.mean_batch_size,
                "network_ms": network / MS,
                "latency_ms": statistics.fmean(run.latencies) / MS,
                "simulated_latency_ms": found.mean_latency / MS,
            })  # fmt: skip
    return rows


def foretold(
    actors: int, thought: list[float], cost: MeasuredCost, network: float
) -> SimulationResult:
    """What the simulator says; coroutines of the server's process are not independent of it."""
    clients = Clients(actors, Measured(tuple(thought)))
    return simulate([clients], cost, network=network, duration=20.0, warmup=5.0, independent=False)


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| forward | think | actors | rows/s | simulated | | batch | simulated | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["policy"], row["think"], f"{row['actors']}"]
        for name, form in (("rows_per_s", ",.0f"), ("batch", ".1f")):
            real, simulated = row[name], row[f"simulated_{name}"]
            cells += [f"{real:{form}}", f"{simulated:{form}}", f"{simulated / real - 1:+.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of a real measurement")
    parser.add_argument("--quick", action="store_true", help="one second")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows = compare(1.0 if options.quick else options.seconds)
    lines = table(rows)
    print("\n" + "\n".join(lines) + "\n")
    off = {
        name: max(abs(row[f"simulated_{name}"] / row[name] - 1) for row in rows)
        for name in ("rows_per_s", "batch", "latency_ms")
    }
    print(
        f"furthest off: throughput {off['rows_per_s']:.0%}, mean batch {off['batch']:.0%}, "
        f"mean latency {off['latency_ms']:.0%}"
    )
    met = max(off["rows_per_s"], off["batch"]) <= WITHIN
    print(f"  throughput and mean batch within {WITHIN:.0%}: {'met' if met else 'NOT MET'}")
    print("\n" + json.dumps({"rows": rows, "off": off}))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "off": off}, indent=1) + "\n")


if __name__ == "__main__":
    main()
