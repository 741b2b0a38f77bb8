"""Ray actors that ask a served policy: requests per second, beside TorchRL and a bare echo.

Every variant serves the same MLP (8-64-4, 8 floats in) to the same actors, in one run. The echo is
asyncio TCP between the same processes with 64 bytes and no server behind it; it says what the
machine can do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, RayTransport

ROOT = Path(__file__).resolve().parents[2]


def make_policy() -> TensorDictModule:
    network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


class Actor:
    """Asks for as long as it is told, in several coroutines at once."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    async def use(self, transport: RayTransport) -> None:
        self.client: Any = transport.client()
        await self.client(TensorDict({"observation": torch.zeros(8)}))

    async def ask(self, coroutines: int, seconds: float) -> float:
        """Requests per second."""
        done, end = 0, time.perf_counter() + seconds

        async def act() -> None:
            nonlocal done
            while time.perf_counter() < end:
                await self.client(TensorDict({"observation": torch.zeros(8)}))
                done += 1

        await asyncio.gather(*[act() for _ in range(coroutines)])
        return done / seconds

    async def echo(self, host: str, port: int, coroutines: int, seconds: float) -> float:
        done, end = 0, time.perf_counter() + seconds

        async def act() -> None:
            nonlocal done
            reader, writer = await asyncio.open_connection(host, port)
            while time.perf_counter() < end:
                writer.write(bytes(64))
                await reader.readexactly(64)
                done += 1
            writer.close()

        await asyncio.gather(*[act() for _ in range(coroutines)])
        return done / seconds


class Echo:
    """Answers with what it is sent."""

    async def listen(self) -> tuple[str, int]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()

        self.server = await asyncio.start_server(answer, "127.0.0.1", 0)
        host, port = self.server.sockets[0].getsockname()
        return host, port


class Server:
    """Serves the policy."""

    def serve(self, transport: RayTransport) -> None:
        torch.set_num_threads(1)
        self.server = InferenceServer(make_policy(), transport, max_batch_size=64).start()


class TorchRLActor:
    """Asks TorchRL's server, one request at a time."""

    def __init__(self, client: Any) -> None:
        torch.set_num_threads(1)
        self.client = client

    def ask(self, seconds: float) -> float:
        self.client(TensorDict({"observation": torch.zeros(8)}))
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.client(TensorDict({"observation": torch.zeros(8)}))
            done += 1
        return done / seconds


def torchrl(actors: int, seconds: float) -> float:
    from torchrl.modules.inference_server import InferenceServer as Theirs
    from torchrl.modules.inference_server import RayTransport as TheirTransport

    transport = TheirTransport()
    clients = [transport.client() for _ in range(actors)]
    with Theirs(make_policy(), transport, max_batch_size=64):
        light = ray.remote(num_cpus=0)(TorchRLActor)
        asking = [light.remote(client) for client in clients]
        found = ray.get([each.ask.remote(seconds) for each in asking])
    for each in asking:
        ray.kill(each)
    return sum(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
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
    light = ray.remote(num_cpus=0)
    actors = [light(Actor).remote() for _ in range(8)]
    echo = light(Echo).remote()
    address = ray.get(echo.listen.remote())
    transports = {kind: RayTransport(kind) for kind in ("direct", "rpc")}
    servers = []
    for transport in transports.values():
        servers.append(light(Server).remote())
        ray.get(servers[-1].serve.remote(transport))

    found: dict[str, list[float]] = {}

    def measure(name: str, calls: Any) -> None:
        found.setdefault(name, []).append(sum(ray.get(list(calls))))

    for _ in range(options.rounds):
        s = options.seconds
        for kind, transport in transports.items():
            ray.get([each.use.remote(transport) for each in actors])
            measure(f"{kind}, 8 actors x 1", [each.ask.remote(1, s) for each in actors])
            measure(f"{kind}, 4 actors x 8", [each.ask.remote(8, s) for each in actors[:4]])
        measure("bare echo, 8 x 1", [each.echo.remote(*address, 1, s) for each in actors])
        measure("bare echo, 4 x 8", [each.echo.remote(*address, 8, s) for each in actors[:4]])
    for each in [*actors, *servers, echo]:
        ray.kill(each)
    theirs = torchrl(8, options.seconds * options.rounds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        print(f"{name:24} {value:8.0f} req/s")
    print(f"{'TorchRL, 8 actors x 1':24} {theirs:8.0f} req/s")
    print()
    print(f"direct over TorchRL, 8 x 1: {medians['direct, 8 actors x 1'] / theirs:6.1f}  (goal 25)")
    print(f"rpc over TorchRL, 8 x 1:    {medians['rpc, 8 actors x 1'] / theirs:6.1f}  (goal 5)")
    ratio = medians["direct, 4 actors x 8"] / medians["bare echo, 4 x 8"]
    print(f"direct over echo, 4 x 8:    {ratio:6.2f}  (goal 0.4)")
    ray.shutdown()


if __name__ == "__main__":
    main()
