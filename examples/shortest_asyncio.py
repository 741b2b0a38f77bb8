"""The shortest useful program with asyncio actors."""

import asyncio

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import AsyncioTransport, InferenceServer

mlp = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
policy = TensorDictModule(mlp, in_keys=["observation"], out_keys=["action"])


async def main() -> None:
    async with InferenceServer(policy, AsyncioTransport(), max_batch_size=32) as server:

        async def actor() -> TensorDict:
            client = server.client()
            return await client(TensorDict({"observation": torch.randn(4)}))

        replies = await asyncio.gather(*(actor() for _ in range(32)))
        print(f"{len(replies)} replies from {server.stats().batches} forward(s)")
        print("the first action:", replies[0]["action"].tolist())


asyncio.run(main())
