"""The shortest useful program with threads as actors."""

from concurrent.futures import ThreadPoolExecutor

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport

mlp = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
policy = TensorDictModule(mlp, in_keys=["observation"], out_keys=["action"])

transport = ThreadingTransport()
server = InferenceServer(policy, transport, max_batch_size=32)
server.start()


def actor(_: int) -> TensorDict:
    client = transport.client()
    return client(TensorDict({"observation": torch.randn(4)}))  # blocks this thread only


with ThreadPoolExecutor(32) as pool:
    replies = list(pool.map(actor, range(32)))
server.shutdown()
print(f"{len(replies)} replies from {server.stats().batches} forward(s)")
print("the first action:", replies[0]["action"].tolist())
