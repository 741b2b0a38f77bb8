"""TorchRL's documented usage works with only the import line changed, and gives its answers."""

from __future__ import annotations

import ast
import concurrent.futures
import importlib
import textwrap
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from tensordict.nn import TensorDictModule

import aioinfer

# The whole file in one worker: importing torchrl takes seconds.
pytestmark = [pytest.mark.xdist_group("torchrl"), pytest.mark.timeout(60)]

TORCHRL = "torchrl.modules.inference_server"
BOTH = pytest.mark.parametrize("served_by", [TORCHRL, "aioinfer"])

# From the reference page "Inference Server" of TorchRL 0.14. Its "..." is filled in with what
# actors do there: they call the client in a loop.
DOCUMENTED = """
    from tensordict.nn import TensorDictModule
    from {module} import (
        InferenceServer,
        ThreadingTransport,
    )
    import torch.nn as nn
    import concurrent.futures

    policy = TensorDictModule(
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)),
        in_keys=["observation"],
        out_keys=["action"],
    )

    transport = ThreadingTransport()
    server = InferenceServer(policy, transport, max_batch_size=32)
    server.start()
    client = transport.client()

    # actor threads call client(td) -- batched automatically
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        {actors}

    server.shutdown()
"""


@pytest.fixture
def library(served_by: str) -> ModuleType:
    return importlib.import_module(served_by)


def _policy() -> TensorDictModule:
    torch.manual_seed(0)
    return TensorDictModule(
        torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)),
        in_keys=["observation"],
        out_keys=["action"],
    )


def _observations(actor: int, steps: int = 5) -> torch.Tensor:
    return torch.randn(steps, 8, generator=torch.Generator().manual_seed(actor))


@BOTH
def test_the_documented_snippet(served_by: str):
    """The snippet of TorchRL's reference page runs as it stands, imported from either."""
    snippet = textwrap.dedent(DOCUMENTED).format(
        module=served_by, actors="replies = list(pool.map(actor, range(16)))"
    )
    names: dict[str, Any] = {}

    def actor(number: int) -> list[Any]:
        return [
            names["client"](TensorDict({"observation": observation}))
            for observation in _observations(number)
        ]

    names["actor"] = actor
    exec(compile(ast.parse(snippet), "the documented snippet", "exec"), names)
    assert len(names["replies"]) == 16
    for number, replies in enumerate(names["replies"]):
        with torch.no_grad():
            expected = names["policy"].module(_observations(number))
        for reply, action in zip(replies, expected, strict=True):
            assert reply.batch_size == torch.Size([])
            torch.testing.assert_close(reply["action"], action)


@BOTH
def test_the_context_manager(library: ModuleType):
    """``with InferenceServer(...)`` and ``server.client()``, as in TorchRL's docstring."""
    policy = TensorDictModule(torch.nn.Linear(4, 2), in_keys=["obs"], out_keys=["act"])
    transport = library.ThreadingTransport()
    with library.InferenceServer(policy, transport, max_batch_size=8) as server:
        assert server.is_alive
        result = server.client()(TensorDict({"obs": torch.randn(4)}))
    assert result["act"].shape == torch.Size([2])
    assert not server.is_alive


@BOTH
def test_submit(library: ModuleType):
    """``client.submit(td)`` returns a future with ``result()``."""
    policy = _policy()
    transport = library.ThreadingTransport()
    with library.InferenceServer(model=policy, transport=transport) as server:
        assert server is not None
        futures = [
            transport.client().submit(TensorDict({"observation": observation}))
            for observation in _observations(1)
        ]
        replies = [future.result(timeout=10) for future in futures]
    with torch.no_grad():
        torch.testing.assert_close(
            torch.stack([reply["action"] for reply in replies]), policy.module(_observations(1))
        )


@BOTH
def test_the_same_arguments(library: ModuleType):
    """TorchRL's keyword arguments mean the same: sizes, timeout, collate_fn, devices, version."""
    server = library.InferenceServer(
        _policy(),
        library.ThreadingTransport(),
        max_batch_size=8,
        min_batch_size=2,
        timeout=0.05,
        collate_fn=lazy_stack,
        device="cpu",
        output_device="cpu",
        policy_version=3,
        policy_version_key="version",
    )
    with server:
        clients = [server.client() for _ in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            replies = list(
                pool.map(lambda client: client(TensorDict({"observation": torch.ones(8)})), clients)
            )
        for reply in replies:
            assert reply["version"] == 3
            assert reply["version"].dtype == torch.int64
            torch.testing.assert_close(reply["action"], replies[0]["action"])


@BOTH
def test_updates_and_stats(library: ModuleType):
    """``update_model``, ``policy_version`` and ``stats(reset=...)``, by TorchRL's names."""
    policy = _policy()
    server = library.InferenceServer(policy, library.ThreadingTransport())
    request = TensorDict({"observation": torch.ones(8)})

    def zero(model: torch.nn.Module) -> str:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return "zeroed"

    with server:
        client = server.client()
        before = client(request)
        assert before["policy_version"] == server.policy_version == 0
        assert server.update_model(zero) == "zeroed"
        after = client(request)
        assert after["policy_version"] == server.policy_version == 1
        assert before["action"].abs().sum() > 0
        assert after["action"].tolist() == [0, 0, 0, 0]
        server.update_model(zero, mark_weight_update=False)
        assert server.policy_version == 1
        names = {
            *("requests", "batches", "requests_per_s", "batches_per_s", "avg_batch_size"),
            *("p50_queue_ms", "p95_queue_ms", "p50_forward_ms", "p95_forward_ms"),
            *("policy_version", "weight_updates"),
        }
    stats = server.stats(reset=True)
    assert names <= set(stats)
    assert (stats["requests"], stats["weight_updates"], stats["policy_version"]) == (2, 1, 1)
    assert server.stats()["requests"] == 0
    assert server.stats()["policy_version"] == 1


@BOTH
def test_starting_twice(library: ModuleType):
    """A second ``start()`` is a RuntimeError, a second ``shutdown()`` is harmless."""
    server = library.InferenceServer(_policy(), library.ThreadingTransport())
    assert server.start() is server
    with pytest.raises(RuntimeError, match="already running"):
        server.start()
    server.shutdown()
    server.shutdown()


def test_side_by_side():
    """Both libraries give the same answers to the same 16 actors."""
    theirs = importlib.import_module(TORCHRL)
    policy = _policy()

    def answers(library: ModuleType) -> torch.Tensor:
        transport = library.ThreadingTransport()
        server = library.InferenceServer(policy, transport, max_batch_size=16)
        server.start()

        def actor(number: int) -> torch.Tensor:
            client = transport.client()
            return torch.stack(
                [
                    client(TensorDict({"observation": observation}))["action"]
                    for observation in _observations(number, steps=20)
                ]
            )

        try:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                return torch.stack(list(pool.map(actor, range(16))))
        finally:
            server.shutdown()

    torch.testing.assert_close(answers(aioinfer), answers(theirs))
