"""Weights that are sent reach every replica."""

from __future__ import annotations

import asyncio

import torch
from helpers import row, until, within
from tensordict.nn import TensorDictModule

from aioinfer import InferenceServer, InProcessWeightSyncScheme


async def test_every_replica_serves_what_was_sent() -> None:
    """Replies of both are whole and labelled, and in the end both serve the last version."""
    model = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["observation"], out_keys=["action"])
    trained = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["observation"], out_keys=["action"])
    scheme = InProcessWeightSyncScheme()
    scheme.init_on_sender(model=trained)
    async with InferenceServer(
        model, devices=["cpu", "cpu"], weight_sync=scheme, max_batch_size=1
    ) as server:
        for version in range(1, 6):
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter.fill_(float(version))
            await scheme.asend(model=trained)
            await until(lambda v=version: server.policy_version >= v)
            clients = [server.async_client() for _ in range(8)]
            replies = await within(asyncio.gather(*(client(row(1)) for client in clients)))
            for reply in replies:
                assert reply["policy_version"].item() == version
                assert reply["action"].item() == 4 * version
