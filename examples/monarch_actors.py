"""Monarch actors, one policy in a process of its own, and weights that change while it serves.

Each actor is a process with several gymnasium CartPole-v1 environments, stepped by a coroutine
each. All of them ask one policy, which runs in another process of the mesh. The driver loads new
weights into it all the while, and every answer says which version it was computed by. Nothing is
learnt here; the weights are random.

    python examples/monarch_actors.py
    python examples/monarch_actors.py --replicas 2       # the policy in two processes
    python examples/monarch_actors.py --help             # the other options
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

import gymnasium
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import MonarchInferenceServer  # before Monarch: it sets how soon deaths are noticed

try:
    from monarch.actor import Actor, concurrent_endpoint, shutdown_context, this_host
except ImportError:
    sys.exit("This example needs Monarch: pip install 'aioinfer[examples,monarch]'")


class Sampler(nn.Module):
    """A small actor network that samples its action."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Map observations ``[..., 4]`` to actions ``[...]``."""
        return torch.multinomial(self.logits(observation).softmax(-1), 1).squeeze(-1)


def make_policy() -> TensorDictModule:
    """Build the policy; called in the process that serves it."""
    torch.set_num_threads(1)
    return TensorDictModule(Sampler(), in_keys=["observation"], out_keys=["action"])


class CartPoles(Actor):
    """One process with environments, and a client of the policy."""

    def __init__(self, client: Any, environments: int) -> None:
        torch.set_num_threads(1)
        self._client = client
        self._envs = [gymnasium.make("CartPole-v1") for _ in range(environments)]

    @concurrent_endpoint
    async def run(self, steps: int) -> tuple[int, int, set[int]]:
        """Step every environment so often; return steps, episodes and the versions seen."""
        done = await asyncio.gather(*(self._step(env, steps) for env in self._envs))
        return steps * len(self._envs), sum(d[0] for d in done), set().union(*(d[1] for d in done))

    async def _step(self, env: Any, steps: int) -> tuple[int, set[int]]:
        observation, _ = env.reset()
        episodes, versions = 0, set()
        for _ in range(steps):
            answer = await self._client(TensorDict({"observation": torch.from_numpy(observation)}))
            versions.add(int(answer["policy_version"]))
            observation, _, terminated, truncated, _ = env.step(answer["action"].item())
            if terminated or truncated:
                episodes += 1
                observation, _ = env.reset()
        return episodes, versions


async def update(server: MonarchInferenceServer, seconds: float) -> None:
    """Load new weights again and again."""
    while True:
        await asyncio.sleep(seconds)
        await server.aload_state_dict(make_policy().state_dict())


async def demonstrate(args: argparse.Namespace) -> None:
    """Start everything, run the actors, print a table."""
    per_host = {"replicas": args.replicas}
    async with MonarchInferenceServer(make_policy, per_host=per_host, max_batch_size=64) as server:
        procs = this_host().spawn_procs(per_host={"procs": args.actors})
        actors = procs.spawn("cartpoles", CartPoles, server.client(), args.environments)
        await actors.run.call(1)  # processes that start, and import torch, are not measured
        started = time.perf_counter()
        updating = asyncio.create_task(update(server, args.update_every))
        results = list((await actors.run.call(args.steps)).values())
        seconds = time.perf_counter() - started
        updating.cancel()
        stats = await server.astats()
        await procs.stop()
    print(f"{'actor':>8}{'steps':>10}{'episodes':>10}{'versions seen':>16}")
    for number, (steps, episodes, versions) in enumerate(results):
        seen = f"{min(versions)} to {max(versions)}"
        print(f"{number:8}{steps:10,}{episodes:10,}{seen:>16}")
    total = sum(steps for steps, _, _ in results)
    print(f"{total:,} steps in {seconds:.1f} s, {total / seconds:,.0f} per second")
    for number, replica in stats.items():
        print(
            f"replica {number}: {replica.requests:,} requests in {replica.batches:,} batches, "
            f"{replica.avg_batch_size:.1f} rows each"
        )


def at_least_one(text: str) -> int:
    """Parse an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; return the exit status."""
    parser = argparse.ArgumentParser(description="Serve one policy to actors on a Monarch mesh.")
    parser.add_argument("--actors", type=at_least_one, default=4, help="processes; default: 4")
    parser.add_argument(
        "--environments", type=at_least_one, default=8, help="of each actor; default: 8"
    )
    parser.add_argument(
        "--steps", type=at_least_one, default=500, help="of each environment; default: 500"
    )
    parser.add_argument(
        "--replicas", type=at_least_one, default=1, help="processes that serve; default: 1"
    )
    parser.add_argument(
        "--update-every", type=float, default=0.2, metavar="SECONDS", help="default: 0.2"
    )
    try:
        asyncio.run(demonstrate(parser.parse_args(argv)))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        shutdown_context().get(timeout=10)
    return 0


if __name__ == "__main__":
    sys.exit(main())
