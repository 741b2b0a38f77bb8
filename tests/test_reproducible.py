"""``fixed_batch`` and seeds: what an actor gets does not depend on the others."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import InThread, action, outcomes, row, rows, sampling, within
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ModelError, MPTransport
from aioinfer.testing import PuppetExecutor, RecordingModel


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """Odd widths, which leave a remainder in every vectorised kernel."""
    layers = (nn.Linear(7, 33), nn.SiLU(), nn.Linear(33, 5), nn.Sigmoid())
    return nn.Sequential(*layers), (7,)


def cnn() -> tuple[nn.Module, tuple[int, ...]]:
    layers = (nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 9, 3), nn.Tanh(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(9 * 8 * 8, 5), nn.Softmax(-1)), (3, 24, 24)


def policy(network: nn.Module) -> TensorDictModule:
    return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


@pytest.fixture(autouse=True)
def _same_networks() -> Iterator[None]:
    before = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(before)


async def in_crowds(
    model: Any, asked: TensorDict, crowds: list[int], **options: Any
) -> list[TensorDictBase]:
    """What the one that asks ``asked`` gets, among so many others before and behind it."""
    answers = []
    puppet = PuppetExecutor()
    async with InferenceServer(
        model, executor=puppet, min_batch_size=1, timeout=0.0, **options
    ) as server:
        client = server.async_client()

        def submit(count: int) -> list[Any]:
            shape = asked["observation"].shape
            return [
                client.submit(TensorDict({"observation": torch.randn(shape)})) for _ in range(count)
            ]

        with puppet:
            for crowd in crowds:
                others = submit(crowd // 2)
                answer = client.submit(asked)
                others += submit(crowd - crowd // 2)
                await puppet.submitted()
                puppet.run_next()
                answers.append(await within(answer))
                await outcomes(*others)
    return answers


class TestFixedBatch:
    """``fixed_batch=True``: one size, so that company changes nothing."""

    @pytest.mark.parametrize("largest", [12, 16, 24])
    @pytest.mark.parametrize("network", [mlp, cnn])
    async def test_company_does_not_change_a_bit(
        self, network: Callable[[], tuple[nn.Module, tuple[int, ...]]], largest: int
    ) -> None:
        """Alone, among others and at any place in the batch, a row gets the same bits."""
        net, shape = network()
        asked = TensorDict({"observation": torch.randn(shape)})
        crowds = list(range(largest))
        answers = await in_crowds(
            policy(net), asked, crowds, fixed_batch=True, max_batch_size=largest
        )
        assert len({answer["action"].numpy().tobytes() for answer in answers}) == 1

    @pytest.mark.parametrize("fixed", [True, False])
    async def test_it_is_the_size_that_is_fixed(self, fixed: bool) -> None:
        """The policy sees one size, with it; without, as many as there are crowds."""
        model = RecordingModel()
        answers = await in_crowds(model, row(3), [0, 1, 5, 9], fixed_batch=fixed, max_batch_size=10)
        assert model.batch_sizes == ([16] * 4 if fixed else [1, 2, 6, 10])
        assert [action(answer) for answer in answers] == [6] * 4

    async def test_a_culprit_is_found(self) -> None:
        """A bad request fails alone, and its search keeps to the size."""
        model = RecordingModel()
        model.fail_when(lambda td: bool((td["observation"] < 0).any()))
        async with InferenceServer(model, fixed_batch=True, max_batch_size=16) as server:
            client = server.async_client()
            found = await outcomes(*(client(row(value)) for value in (1, 2, -1, 3)))
        assert [isinstance(outcome, ModelError) for outcome in found] == [False, False, True, False]
        assert set(model.batch_sizes) == {16}

    def test_leaves_no_choice_of_sizes(self) -> None:
        """Both arguments at once contradict each other."""
        with pytest.raises(ValueError, match="fixed_batch=True leaves no choice of batch_sizes"):
            InferenceServer(RecordingModel(), fixed_batch=True, batch_sizes=[64])

    def test_several_threads_are_warned_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CPU kernels that several threads share divide a batch at places of their own."""
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        with pytest.warns(RuntimeWarning, match=r"fixed_batch.*set_num_threads\(1\)"):
            InferenceServer(RecordingModel(), fixed_batch=True)


class TestSeeds:
    """``client.set_seed``: what a policy samples depends on seed and step alone."""

    async def episode(self, client: Any, steps: int = 4) -> list[Any]:
        return [action(await within(client(row(0)))) for _ in range(steps)]

    async def test_the_same_seed_gives_the_same_actions(self) -> None:
        """Alone or in a crowd without seeds, on asyncio and threads: bit by bit the same."""
        async with InferenceServer(sampling(), fixed_batch=True, max_batch_size=16) as server:
            alone = server.async_client()
            alone.set_seed(7)
            expected = await self.episode(alone)
            assert len(set(expected)) == len(expected)

            again, crowd = server.async_client(), server.async_client()
            again.set_seed(7)
            episodes = await asyncio.gather(
                self.episode(again), *(self.episode(crowd) for _ in range(5))
            )
            assert episodes[0] == expected
            assert all(episode != expected for episode in episodes[1:])
            thread = server.sync_client()
            thread.set_seed(7)
            assert await InThread(lambda: [action(thread(row(0))) for _ in range(4)]) == expected

    async def test_many_seeds_at_once(self) -> None:
        """Clients with seeds share batches, and each keeps to its own."""
        async with InferenceServer(sampling(), fixed_batch=True, max_batch_size=16) as server:
            together = []
            for _ in range(2):
                clients = [server.async_client() for _ in range(8)]
                for actor, client in enumerate(clients):
                    client.set_seed((3, actor))
                together.append(await asyncio.gather(*(self.episode(c) for c in clients)))
            assert together[0] == together[1]
            assert len({tuple(episode) for episode in together[0]}) == 8
            assert server.stats().avg_batch_size > 1
            one = server.async_client()
            one.set_seed((3, 5))
            assert await self.episode(one) == together[0][5]

    async def test_rows_of_one_request_differ(self) -> None:
        """Each of K rows samples for itself, and a request larger than a batch too."""
        async with InferenceServer(sampling(), max_batch_size=4) as server:
            found = []
            for _ in range(2):
                client = server.async_client()
                client.set_seed(1)
                found.append(action(await within(client(rows([0] * 10)))))
        assert found[0] == found[1]
        assert len(set(found[0])) == 10

    async def test_sampling_modes(self) -> None:
        """A seed does not stand in the way of a request that asks for the mean."""
        async with InferenceServer(sampling()) as server:
            client = server.async_client()
            client.set_seed(1)
            reply = await within(client(row(3), interaction_type="deterministic"))
            assert action(reply) == 3
            assert action(await within(client(row(3), interaction_type="random"))) != 3

    async def test_without_a_seed_again(self) -> None:
        """``None`` goes back to torch's generator."""
        async with InferenceServer(sampling()) as server:
            client = server.async_client()
            client.set_seed(1)
            client.set_seed(None)
            torch.manual_seed(5)
            first = await self.episode(client)
            torch.manual_seed(5)
            assert await self.episode(client) == first

    async def test_a_policy_that_cannot_be_seeded_says_so(self) -> None:
        """Nothing is drawn from elsewhere unnoticed; clients without a seed are served."""

        def beta(x: torch.Tensor) -> torch.Tensor:
            return torch.distributions.Beta(x + 1, x + 1).sample()

        model = TensorDictModule(beta, in_keys=["observation"], out_keys=["action"])
        async with InferenceServer(model) as server:
            client, seeded = server.async_client(), server.async_client()
            seeded.set_seed(1)
            well, error = await outcomes(client(row(1)), seeded(row(1)))
            assert 0 <= action(well) <= 1
            assert isinstance(error, ModelError)
            assert isinstance(error.__cause__, NotImplementedError)

    async def test_processes(self) -> None:
        """The seed goes with a client that is sent to another process, and with its requests."""
        transport = MPTransport()
        async with InferenceServer(sampling(), [transport]) as server:
            client = server.async_client()
            client.set_seed(9)
            expected = await self.episode(client)
            client.set_seed(9)
            assert await self.episode(client, 2) == expected[:2]
            copy = pickle.loads(pickle.dumps(client))
            assert await self.episode(copy, 2) == expected[2:]
