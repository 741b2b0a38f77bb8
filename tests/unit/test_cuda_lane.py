"""The queues of a CUDA device: on which stream everything is done, and what waits for what."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from helpers import action, row, within
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceServer
from aioinfer.devices import assembly
from aioinfer.devices.staging import CudaLane


class Queues(FakeCuda):
    """And as much as queues work."""

    def __init__(self) -> None:
        super().__init__("default", "copies in", "forwards", "copies out")
        self.default = self.now

    def Event(self, *, blocking: bool) -> Any:
        cuda = self
        assert blocking, "a thread that waits would spin"

        class Event:
            of = "nothing"

            def record(self, stream: Any) -> None:
                self.of = str(stream)

            def synchronize(self) -> None:
                cuda.calls.append(f"the thread waits for {self.of}")

        return Event()

    def set_device(self, device: torch.device) -> None:
        self.calls.append(f"the device is {device}")

    def set_stream(self, stream: Any) -> None:
        self.now = stream

    def default_stream(self, device: torch.device) -> Any:
        return self.default


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Queues:
    """Let servers on the CPU use the queues of a device that does nothing."""
    fake = Queues()

    def lane(place: torch.device) -> CudaLane:
        made = CudaLane(place, fake)
        made.pinned = lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)
        return made

    monkeypatch.setattr(assembly, "_lane", lane)
    return fake


def policy(cuda: Queues) -> Any:
    def forward(td: TensorDictBase) -> TensorDictBase:
        cuda.calls.append(f"forward on {cuda.now}")
        return TensorDict({"action": td["observation"] * 2}, td.batch_size)

    return forward


BEGIN = ["the device is cpu", "forwards waits for default"]


async def test_a_batch(cuda: Queues) -> None:
    """The forward waits for its copy, the copy back for the forward, and a thread for that."""
    async with InferenceServer(policy(cuda), device="cpu", output_device="cpu") as server:
        client = server.async_client()
        for value in (1, 2):
            assert action(await within(client(row(value)))) == 2 * value
    batch = [
        "forwards waits for copies in",
        "forward on forwards",
        "copies out waits for forwards",
        "the thread waits for copies out",
    ]
    assert cuda.calls == [*BEGIN, *batch, *batch]


async def test_replies_that_stay(cuda: Queues) -> None:
    """They are given out when the forward is over."""
    async with InferenceServer(policy(cuda), device="cpu") as server:
        assert action(await within(server.async_client()(row(1)))) == 2
    assert cuda.calls == [
        *BEGIN,
        "forwards waits for copies in",
        "forward on forwards",
        "the thread waits for forwards",
    ]


async def test_what_is_not_queued(cuda: Queues) -> None:
    """It runs on the same stream."""

    async with InferenceServer(
        policy(cuda), device="cpu", output_device="cpu", collate_fn=torch.stack
    ) as server:
        clients = [server.async_client() for _ in range(3)]
        await within(asyncio.gather(*(client(row(1)) for client in clients)))
    assert cuda.calls == [*BEGIN, "forward on forwards"]


async def test_every_start_has_a_thread_of_its_own(cuda: Queues) -> None:
    """Which is made the device's."""
    server = InferenceServer(policy(cuda), device="cpu", output_device="cpu")
    for _ in range(2):
        cuda.calls.clear()
        async with server:
            await within(server.async_client()(row(1)))
        assert cuda.calls[:2] == BEGIN
