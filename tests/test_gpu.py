"""What only a CUDA device can show; the logic is tested everywhere, on stand-ins."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import action, outcomes, row, rows, within
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, InProcessWeightSyncScheme, MPTransport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

WARM_S = 60.0
"""Seconds that the first answer may take, with everything that is made once."""


@pytest.fixture(scope="module", autouse=True)
def _cuda_is_open() -> None:
    """Have CUDA open, before a test is watched, what it keeps open until the process ends."""
    server = InferenceServer(policy(), device="cuda", cuda_graphs=True)

    async def serve() -> None:
        async with server:
            for _ in range(3):
                await server.async_client()(row(0))

    asyncio.run(serve())


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def policy() -> TensorDictModule:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3))
    return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


def expected(td: TensorDict) -> torch.Tensor:
    with torch.no_grad():
        return policy().module(td["observation"])


GRAPHS: list[dict[str, Any]] = [
    {},
    {"cuda_graphs": True},
    {"cuda_graphs": True, "example": row(0)},
    {"cuda_graphs": True, "fixed_batch": True},
]


@pytest.mark.parametrize("options", GRAPHS, ids=str)
async def test_every_request_gets_its_own_rows(options: dict[str, Any]) -> None:
    """Of any number of rows, staged, captured or not; replies are on the CPU."""
    async with InferenceServer(policy(), device="cuda", max_batch_size=16, **options) as server:
        await within(server.async_client()(row(0)), WARM_S)

        async def actor(number: int) -> None:
            client = server.async_client()
            for step in range(30):
                count = (number * step) % 40
                asked = rows([number + step / 7] * count) if count else row(number + step / 7)
                reply = await client(asked)
                assert reply["action"].device.type == "cpu"
                torch.testing.assert_close(reply["action"], expected(asked), rtol=1e-4, atol=1e-5)

        await within(asyncio.gather(*(actor(number) for number in range(12))), WARM_S)


@pytest.mark.parametrize("graphs", [False, True])
async def test_weights_change(graphs: bool) -> None:
    """In place, between two batches: every reply is of one version, and says which."""

    class Scale(nn.Module):
        in_keys = ("observation",)
        out_keys = ("action", "torn")

        def __init__(self) -> None:
            super().__init__()
            self.factor, self.copy = (nn.Parameter(torch.zeros(4096, 1024)) for _ in range(2))

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            torn = (self.factor - self.copy).abs().max().expand(*td.batch_size)
            return TensorDict(
                {"action": td["observation"] * self.factor[0, 0], "torn": torn}, td.batch_size
            )

        def set_to(self, value: float) -> None:
            with torch.no_grad():
                self.factor.fill_(value)
                self.copy.fill_(value)

    async with InferenceServer(Scale(), device="cuda", cuda_graphs=graphs) as server:
        over = False
        replies: list[TensorDictBase] = []

        async def actor() -> None:
            client = server.async_client()
            while not over:
                replies.append(await client(row(1)))

        actors = [asyncio.create_task(actor()) for _ in range(8)]
        for version in range(1, 31):
            await within(server.aupdate_model(lambda p, v=version: p.set_to(v)), WARM_S)
        over = True
        await within(asyncio.gather(*actors))
    for reply in replies:
        assert reply["torn"] == 0
        assert action(reply) == reply["policy_version"].item()


async def test_what_cannot_be_captured(caplog: pytest.LogCaptureFixture) -> None:
    """A policy that reads from the device runs as it is, and one warning says why."""

    def reads(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() >= 0 else x * 3

    model = TensorDictModule(reads, in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(model, device="cuda", cuda_graphs=True) as server:
        client = server.async_client()
        for value in (1, -1, 2):
            reply = await within(client(row(value)), WARM_S)
            assert action(reply) == value * (2 if value > 0 else 3)
    warnings = [r.getMessage() for r in caplog.records if r.name == "aioinfer"]
    assert len(warnings) == 1
    assert "cannot be captured" in warnings[0]


async def test_noise_where_capturing_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A capture that fails leaves random numbers, memory and streams as they were."""

    def reads(x: torch.Tensor) -> torch.Tensor:
        noisy = x + torch.randn_like(x)
        return noisy if noisy.sum().item() > 0 else noisy * 1

    model = TensorDictModule(reads, in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(model, device="cuda", cuda_graphs=True) as server:
        client = server.async_client()
        replies = [await within(client(row(0)), WARM_S) for _ in range(5)]
    assert len({tuple(reply["action"].tolist()) for reply in replies}) == 5
    assert "cannot be captured" in caplog.text
    assert "test_gpu.py" in caplog.text
    assert torch.randn(3, device="cuda").isfinite().all()
    async with InferenceServer(policy(), device="cuda", cuda_graphs=True) as server:
        for value in range(3):
            reply = await within(server.async_client()(row(value)), WARM_S)
            torch.testing.assert_close(reply["action"], expected(row(value)), rtol=1e-4, atol=1e-5)


async def test_noise_is_new_with_every_replay() -> None:
    """A graph does not repeat the random numbers it was captured with."""
    model = TensorDictModule(Noise(), in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(model, device="cuda", cuda_graphs=True) as server:
        client = server.async_client()
        replies = [await within(client(row(0)), WARM_S) for _ in range(10)]
    assert len({tuple(reply["action"].tolist()) for reply in replies}) == 10


async def test_a_caller_that_computes_meanwhile() -> None:
    """What callers and trainers have queued on their stream is done before it is read."""
    model = TensorDictModule(nn.Linear(3, 3), in_keys=["observation"], out_keys=["action"])
    large = torch.ones(2048, 2048, device="cuda")

    def late(value: float) -> torch.Tensor:
        """A tensor that the device has not computed yet, when this returns."""
        busy = large
        for _ in range(20):
            busy = busy @ large / 2048
        return busy[0, :3] * 0 + value

    async with InferenceServer(model, device="cuda", output_device="cuda") as server:
        client = server.async_client()
        await within(client(row(1)), WARM_S)
        for value in range(1, 6):
            weights = {"weight": torch.diag(late(value)), "bias": late(0)}
            await within(
                server.aupdate_model(lambda m, w=weights: m.module.load_state_dict(w)), WARM_S
            )
            weights["weight"].zero_()  # a trainer goes on
            asked = TensorDict({"observation": late(2)})
            reply = await within(client(asked), WARM_S)
            assert reply["action"].tolist() == [2 * value] * 3


@pytest.mark.parametrize("graphs", [False, True])
async def test_weights_that_are_sent(graphs: bool) -> None:
    """Both slots have graphs of their own: every reply is of the version that it names."""
    scheme = InProcessWeightSyncScheme()
    trainer = TensorDictModule(nn.Linear(3, 3), in_keys=["observation"], out_keys=["action"])
    trainer.to("cuda")

    def set_to(value: float) -> TensorDictModule:
        with torch.no_grad():
            trainer.module.weight.fill_(0)
            trainer.module.bias.fill_(value)
        return trainer

    scheme.init_on_sender(model=set_to(0))
    model = copy.deepcopy(trainer)
    options: dict[str, Any] = {"cuda_graphs": True, "example": row(0)} if graphs else {}
    async with InferenceServer(model, device="cuda", weight_sync=scheme, **options) as server:
        over = False
        replies: list[TensorDictBase] = []

        async def actor() -> None:
            client = server.async_client()
            while not over:
                replies.append(await client(row(1)))

        actors = [asyncio.create_task(actor()) for _ in range(8)]
        first = server.policy_version
        for value in range(1, 21):
            await within(scheme.asend(model=set_to(value)), WARM_S)
        over = True
        await within(asyncio.gather(*actors))
        last = await within(server.async_client()(row(1)))
    scheme.close()
    assert last["action"].tolist() == [20] * 3
    for reply in replies:
        assert set(reply["action"].tolist()) == {reply["policy_version"].item() - first}


@pytest.mark.parametrize("graphs", [False, True])
async def test_seeds(graphs: bool) -> None:
    """The same actions for the same seed and step, alone and in a crowd, to the last bit."""
    model = TensorDictModule(
        nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3), Noise()),
        in_keys=["observation"],
        out_keys=["action"],
    )
    async with InferenceServer(
        model, device="cuda", cuda_graphs=graphs, fixed_batch=True, max_batch_size=16
    ) as server:

        async def episode(seed: int | None) -> list[list[float]]:
            client = server.async_client()
            client.set_seed(seed)
            return [(await client(row(step)))["action"].tolist() for step in range(10)]

        alone = await within(episode(3), WARM_S)
        crowd = await within(asyncio.gather(*map(episode, (1, None, 3, None, 2))), WARM_S)
    assert crowd[2] == alone
    assert all(other != alone for i, other in enumerate(crowd) if i != 2)


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    "options", [{"cuda_graphs": True}, {"collate_fn": torch.stack}], ids=["graphs", "collate_fn"]
)
async def test_replies_that_stay(options: dict[str, Any]) -> None:
    """``output_device`` leaves them on the device, done and not to be overwritten."""
    async with InferenceServer(policy(), device="cuda", output_device="cuda", **options) as server:
        client = server.async_client()
        asked = [row(value) for value in range(20)]
        replies = [await within(client(td), WARM_S) for td in asked]
    for td, reply in zip(asked, replies, strict=True):
        assert reply["action"].device.type == "cuda"
        torch.testing.assert_close(reply["action"].cpu(), expected(td), rtol=1e-4, atol=1e-5)


async def test_requests_on_the_device() -> None:
    """A caller of the same process need not bring its observation to the host."""
    async with InferenceServer(policy(), device="cuda") as server:
        asked = row(2)
        reply = await within(server.async_client()(asked.to("cuda")), WARM_S)
        torch.testing.assert_close(reply["action"].cpu(), expected(asked), rtol=1e-4, atol=1e-5)


async def test_two_replicas() -> None:
    """Two on one device, each with queues of its own."""
    async with InferenceServer(
        policy(), devices=["cuda:0", "cuda:0"], cuda_graphs=True, max_batch_size=4
    ) as server:
        clients = [server.async_client() for _ in range(16)]
        for value in range(20):
            asked = [row(value + i) for i in range(16)]
            pairs = zip(clients, asked, strict=True)
            replies = await within(asyncio.gather(*(c(td) for c, td in pairs)), WARM_S)
            for td, reply in zip(asked, replies, strict=True):
                torch.testing.assert_close(reply["action"], expected(td), rtol=1e-4, atol=1e-5)


async def test_processes() -> None:
    """Frames through shared memory, and bytes that are joined, reach the device as they were."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((-1, -2, -3)).unsqueeze(-1)

    model = TensorDictModule(mean, in_keys=["observation"], out_keys=["action"])
    transport = MPTransport()
    async with InferenceServer(model, transport, device="cuda", cuda_graphs=True) as server:
        client = server.async_client()
        for side in (4, 84):
            for value in range(8):
                frames = torch.full((3, 4, side, side), value, dtype=torch.uint8)
                reply = await within(client(TensorDict({"observation": frames}, [3])), WARM_S)
                assert reply["action"].flatten().tolist() == [value] * 3


async def test_out_of_memory() -> None:
    """A batch that needs more than the device has is divided."""
    per_row = torch.cuda.get_device_properties(0).total_memory // 10

    def greedy(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + torch.empty(x.shape[0] * per_row, dtype=torch.uint8, device=x.device)[0] * 0

    model = TensorDictModule(greedy, in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(model, device="cuda", max_batch_size=32) as server:
        client = server.async_client()
        for _ in range(2):
            found = await outcomes(*(client(row(value)) for value in range(32)))
            assert [action(reply) for reply in found] == [2 * value for value in range(32)]
    torch.cuda.empty_cache()


DIES = """
import asyncio
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from aioinfer import InferenceServer, ServerDiedError

table = torch.zeros(4, device="cuda")
policy = TensorDictModule(lambda x: table[x], in_keys=["index"], out_keys=["action"])

async def main():
    async with InferenceServer(policy, device="cuda") as server:
        client = server.async_client()
        await client(TensorDict({"index": torch.tensor(1)}))
        asked = [client.submit(TensorDict({"index": torch.tensor(i)})) for i in (1, 2, 10**6)]
        found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)
        assert {type(error) for error in found} == {ServerDiedError}, found
        assert "the device failed" in str(found[0]), found
    print("closed")

asyncio.run(main())
"""


def test_a_device_that_dies() -> None:
    """A kernel that asserts ends the server, in a process that has lost its device with it."""
    done = subprocess.run(
        [sys.executable, "-c", DIES], capture_output=True, text=True, timeout=100, check=False
    )
    assert "closed" in done.stdout, done.stderr
