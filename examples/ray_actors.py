"""Ray actors with vectorised gymnasium environments, and one policy that serves all of them.

The policy runs in Ray actors of its own, one or several. Starts a local Ray, runs, and prints a
table. On a cluster, `ray.init(address="auto")` instead.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import gymnasium as gym
import ray
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceTransport, RayInferenceServer


@ray.remote(num_cpus=0)
class Explorer:
    """Steps a batch of environments; every step asks for all of their actions at once."""

    def __init__(self, transport: InferenceTransport, envs: int) -> None:
        self.client: Any = transport.client()
        self.envs = gym.make_vec("CartPole-v1", num_envs=envs, vectorization_mode="sync")

    async def explore(self, steps: int, seed: int) -> tuple[int, float, float]:
        """Return the steps made, the episodes that ended, and the mean latency in ms."""
        observations, _ = self.envs.reset(seed=seed)
        episodes, waited_s = 0, 0.0
        for _ in range(steps):
            request = TensorDict(
                {"observation": torch.from_numpy(observations)}, batch_size=[len(observations)]
            )
            asked_at = time.perf_counter()
            answer = await self.client(request)
            waited_s += time.perf_counter() - asked_at
            actions = answer["logits"].argmax(-1).numpy()
            observations, _, terminated, truncated, _ = self.envs.step(actions)
            episodes += int((terminated | truncated).sum())
        return steps * len(observations), episodes, 1e3 * waited_s / steps


def make_policy() -> TensorDictModule:
    """Build the policy, in the actor that serves it."""
    torch.set_num_threads(1)
    network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    return TensorDictModule(network, in_keys=["observation"], out_keys=["logits"])


async def main(actors: int, envs: int, steps: int, replicas: int, connection: Any) -> None:
    server = RayInferenceServer(
        make_policy,
        replicas,
        ray_options={"num_cpus": 0},  # with a GPU for each: {"num_gpus": 1}, and device="cuda"
        connection=connection,
        max_batch_size=actors * envs,
    )
    explorers = [Explorer.remote(server.transport, envs) for _ in range(actors)]
    async with server:
        await asyncio.gather(*[each.explore.remote(1, 0) for each in explorers])  # all are up
        await server.astats(reset=True)
        started_at = time.perf_counter()
        found = await asyncio.gather(
            *[each.explore.remote(steps, number) for number, each in enumerate(explorers)]
        )
        seconds = time.perf_counter() - started_at
        stats = await server.astats()
    print("actor  steps  episodes  latency")
    for number, (made, episodes, latency_ms) in enumerate(found):
        print(f"{number:5}  {made:5}  {episodes:8}  {latency_ms:4.1f} ms")
    made = sum(each[0] for each in found)
    print(f"{made} steps in {seconds:.1f} s: {made / seconds:.0f} steps/s")
    for number, of_replica in stats.items():
        print(
            f"replica {number}: {of_replica.requests} requests, "
            f"{of_replica.rows} rows in {of_replica.batches} batches"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actors", type=int, default=8)
    parser.add_argument("--envs", type=int, default=4, help="environments of each actor")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=1, help="actors that serve the policy")
    parser.add_argument("--connection", choices=["auto", "direct", "rpc"], default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 1024 * 1024)
    asyncio.run(main(**vars(options)))
    ray.shutdown()
