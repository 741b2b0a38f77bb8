"""``compile=True`` and ``example``: what runs before the first request, and what if it cannot."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from helpers import action, outcomes, row, rows, sampling, within
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ModelError
from aioinfer.testing import RecordingModel


class Backend:
    """A compiler that counts what it compiles, and may refuse to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.compiled = 0
        self.error = error

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.compiled += 1
        if self.error is not None:
            raise self.error
        return graph.forward


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "aioinfer"]


def policy() -> TensorDictModule:
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


def one_layer() -> TensorDictModule:
    """A policy whose module has no length, of which a compiled one makes an error."""
    return TensorDictModule(nn.Linear(3, 3), in_keys=["observation"], out_keys=["action"])


class WholeTensorDict(nn.Module):
    """A policy that takes and returns TensorDicts."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(3, 3)

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"action": self.network(td["observation"])}, td.batch_size)


@pytest.mark.parametrize("make", [policy, one_layer, WholeTensorDict])
async def test_gives_what_the_policy_gives(make: Any) -> None:
    """Compiled, for batches of any size, and after new weights."""
    backend, model = Backend(), make()
    async with InferenceServer(model, compile={"backend": backend}, max_batch_size=8) as server:
        client = server.async_client()
        for _ in range(2):
            for values in ([1], [1, 2, 3], [5, 6, 7, 8, 9]):
                asked = rows(values)
                reply = await within(client(asked))
                with torch.no_grad():
                    expected = model(asked.clone())["action"]
                torch.testing.assert_close(reply["action"], expected)
            compiled = backend.compiled
            halves = {key: leaf / 2 for key, leaf in model.state_dict().items()}
            await within(server.aupdate_model(lambda m, h=halves: m.load_state_dict(h)))
    assert backend.compiled == compiled >= 1  # new weights compile nothing anew


async def test_an_example_compiles_before_the_first_request() -> None:
    """With the sizes known, no request waits for the compiler."""
    backend = Backend()
    async with InferenceServer(
        policy(),
        compile={"backend": backend, "dynamic": False},
        batch_sizes=[1, 4],
        max_batch_size=4,
        example=row(0),
    ) as server:
        assert backend.compiled == 2
        client = server.async_client()
        await within(client(row(1)))
        await within(client(rows([1, 2, 3])))
    assert backend.compiled == 2


async def test_an_example_without_a_compiler() -> None:
    """The policy has run in all sizes before it is asked, on the thread that will run it."""
    model = RecordingModel()
    async with InferenceServer(
        model, batch_sizes=[2, 8], max_batch_size=8, example=row(3)
    ) as server:
        assert model.batch_sizes == [8, 2]
        await within(server.async_client()(row(1)))
        assert len(model.threads) == 1
        assert server.stats().rows == 1


async def test_an_example_for_every_replica() -> None:
    """Each of them is warmed up."""
    seen: list[int] = []

    class Policy(nn.Module):
        def forward(self, td: TensorDictBase) -> TensorDictBase:
            seen.append(td.batch_size[0])
            return td

    async with InferenceServer(Policy(), devices=["cpu", "cpu"], example=row(3)):
        assert sorted(seen) == [1, 1, 2, 2]


async def test_an_example_that_fails() -> None:
    """The server does not start, says why, and can be started again."""
    model = RecordingModel()
    model.fail_when(lambda td: True)
    server = InferenceServer(model, example=row(3))
    with pytest.raises(ValueError, match="told to fail"):
        await server.__aenter__()
    model.fail_when(None)
    async with server:
        assert action(await within(server.async_client()(row(1)))) == 2


async def test_an_example_too_large_for_the_memory() -> None:
    """The limit is learnt before the first request."""
    model = RecordingModel()
    model.fail_when(lambda td: td.batch_size[0] > 4, lambda: torch.OutOfMemoryError("CUDA out"))
    async with InferenceServer(
        model, batch_sizes=[2, 4, 16], max_batch_size=16, example=row(3)
    ) as server:
        await within(server.async_client()(rows(range(9))))
    assert model.batch_sizes[:3] == [16, 4, 2]
    assert max(model.batch_sizes[3:]) <= 4


def test_an_example_is_one_row() -> None:
    """Several rows are refused."""
    with pytest.raises(ValueError, match="example must be one row"):
        InferenceServer(policy(), example=rows([1, 2]))


async def test_what_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """One warning says why, and it is not tried again."""
    backend = Backend(NotImplementedError("no such instruction"))
    async with InferenceServer(policy(), compile={"backend": backend}) as server:
        client = server.async_client()
        for value in range(3):
            assert (await within(client(row(value))))["action"].shape == (3,)
    assert backend.compiled == 1
    (warning,) = _warnings(caplog)
    assert "cannot be compiled" in warning
    assert "no such instruction" in warning


async def test_a_bad_request_is_not_blamed_on_the_compiler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It fails alone, and the compiled policy serves on."""
    backend = Backend()
    async with InferenceServer(policy(), compile={"backend": backend}) as server:
        client = server.async_client()
        (error,) = await outcomes(client(row(1, width=5)))
        assert isinstance(error, ModelError)
        for value in range(3):
            await within(client(row(value)))
        assert backend.compiled >= 1
    assert not _warnings(caplog)


async def test_sampling_modes_and_seeds() -> None:
    """Both work; those forwards run uncompiled, and compile nothing anew."""
    backend, model = Backend(), sampling()
    async with InferenceServer(model, compile={"backend": backend}) as server:
        client, seeded = server.async_client(), server.async_client()
        for _ in range(4):
            assert action(await within(client(row(3), interaction_type="deterministic"))) == 3
        found = []
        for _ in range(2):
            seeded.set_seed(1)
            found.append(action(await within(seeded(row(0)))))
        assert found[0] == found[1]
    assert backend.compiled == 0


@pytest.mark.parametrize("value", [1, None, "max-autotune"])
def test_arguments(value: Any) -> None:
    """``compile`` is a bool or a dict."""
    with pytest.raises(TypeError, match="compile must be a bool, or a dict"):
        InferenceServer(policy(), compile=value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_the_real_compiler() -> None:
    """Torch's own compiler gives what the policy gives."""
    model = policy()
    async with InferenceServer(
        model, compile=True, batch_sizes=[4], max_batch_size=4, example=row(0)
    ) as server:
        reply = await within(server.async_client()(rows([1, 2, 3])), 60.0)
    with torch.no_grad():
        expected = model(rows([1, 2, 3]))["action"]
    torch.testing.assert_close(reply["action"], expected)
