"""Schemes of TorchRL as a server's weight_sync, with real senders: untorn, and rightly named."""

from __future__ import annotations

import contextlib
import copy
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer, resource_tracker
from typing import Any

import pytest
import torch
from helpers import InThread, row, wait_until
from tensordict import TensorDict
from torchrl.weight_update import (
    MultiProcessWeightSyncScheme,
    RayWeightSyncScheme,
    RPCWeightSyncScheme,
    SharedMemWeightSyncScheme,
)

from aioinfer import InferenceServer, ProcessInferenceServer

with warnings.catch_warnings():  # it warns of a class of its own, which init_on_sender imports
    warnings.simplefilter("ignore", DeprecationWarning)
    import torchrl.collectors  # noqa: F401

from .models import Uniform
from .suite import check

pytestmark = [pytest.mark.xdist_group("torchrl"), pytest.mark.timeout(90)]

# Its helper process outlives the tests; it is no leak of ours.
resource_tracker.ensure_running()

FORK = multiprocessing.get_context("fork")
BOTH = pytest.mark.parametrize(
    "kind", [SharedMemWeightSyncScheme, MultiProcessWeightSyncScheme], ids=["shared", "queues"]
)


@contextlib.contextmanager
def in_thread(scheme: Any) -> Iterator[Any]:
    with InferenceServer(Uniform(), weight_sync=copy.copy(scheme)) as server:
        yield server


@contextlib.contextmanager
def in_process(scheme: Any) -> Iterator[Any]:
    with ProcessInferenceServer(Uniform, ctx=FORK, weight_sync=copy.copy(scheme)) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_helpers_left(nothing_left: None) -> Iterator[None]:
    """End the thread with which multiprocessing hands out descriptors."""
    yield
    resource_sharer.stop()


EITHER = pytest.mark.parametrize("serving", [in_thread, in_process])


@contextlib.contextmanager
def sender(kind: Any, model: Uniform) -> Iterator[Any]:
    """A sender as TorchRL's documentation makes one; it does not share the trainer's storage."""
    scheme = kind()
    scheme.init_on_sender(
        # In shared memory beforehand, or a queue's thread moves it there while send() writes to it.
        weights=TensorDict.from_module(model).data.clone().share_memory_(),
        devices=[torch.device("cpu")],
        model_id="policy",
    )
    try:
        yield scheme
    finally:
        scheme.shutdown()


def weights(value: float) -> TensorDict:
    return TensorDict.from_module(Uniform(value=value)).data.clone()


@BOTH
@EITHER
def test_no_response_is_torn(kind: Any, serving: Callable[..., Any]) -> None:
    """1: of 10,000 responses under continuous updates, each is one whole version, its own."""
    with sender(kind, Uniform()) as scheme, serving(scheme) as server:
        client = server.sync_client()
        assert check(client(row(1)), 0) == 0
        scheme.connect()
        over = threading.Event()

        def train() -> int:
            version = 0
            while not over.is_set():
                version += 1
                scheme.send(weights(version))
            return version

        def act() -> int:
            client, seen = server.sync_client(), 0
            for _ in range(10_000 // 64 + 1):
                for answer in [client.submit(row(1)) for _ in range(16)]:
                    seen = check(answer.result(30), seen)
            return seen

        training = InThread(train)
        actors = [InThread(act) for _ in range(4)]
        try:
            for actor in actors:
                actor.thread.join(60)
            seen = [actor.result() for actor in actors]
        finally:
            over.set()
        last = training.result()
        assert 0 < max(seen) <= last
        assert check(client(row(1)), 0) == last == server.policy_version


def test_what_was_not_sent_is_not_served() -> None:
    """2: even where the sender shares the trainer's storage, an unsent step is not served."""
    # Or TorchRL's queue moves it there, on a thread of its own, and what is written then is lost.
    model = Uniform().share_memory()
    scheme = SharedMemWeightSyncScheme()
    scheme.init_on_sender(model=model, devices=[torch.device("cpu")], model_id="policy")
    with in_thread(scheme) as server:
        scheme.connect()
        client = server.sync_client()
        model.set_to(5)
        assert check(client(row(1)), 0) == 0
        scheme.send(model.set_to(1))
        model.set_to(6)
        assert check(client(row(1)), 0) == 1
    scheme.shutdown()


def _train_and_die(scheme: Any, leaves: int) -> None:
    """Send one version, write so many leaves of the next into what is shared, and die of it."""
    scheme.connect()
    scheme.send(weights(1))
    shared = scheme.shared_transport.unique_weights[0]
    for name, tensor in list(weights(2).flatten_keys(".").items())[:leaves]:
        shared.get(tuple(name.split("."))).copy_(tensor)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("leaves", [0, 3, 8])
def test_a_trainer_that_is_killed(leaves: int) -> None:
    """5: killed before it has told of its weights, however many were written: none is served."""
    scheme = SharedMemWeightSyncScheme()
    scheme.init_on_sender(
        weights=weights(0).share_memory_(),
        devices=[torch.device("cpu")],
        model_id="policy",
        ctx=FORK,
    )
    with in_thread(scheme) as server:
        process = FORK.Process(target=_train_and_die, args=(scheme, leaves))
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        client = server.sync_client()
        for _ in range(20):
            assert check(client(row(1)), 0) == 1
    scheme.shutdown()


def test_no_sender_yet() -> None:
    """8: a server starts, serves and closes without its sender; a later start finds it."""
    with sender(SharedMemWeightSyncScheme, Uniform()) as scheme:
        server = InferenceServer(Uniform(), weight_sync=scheme)
        with server:
            assert check(server.sync_client()(row(1)), 0) == 0
        with server:
            scheme.connect()
            scheme.send(weights(1))
            assert check(server.sync_client()(row(1)), 0) == 1
        with server:
            wait_until(lambda: server._link._connected.is_set())
            scheme.send(weights(2))
            assert check(server.sync_client()(row(1)), 1) == 2


def test_what_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    """4: weights that the policy does not take are refused, and the sender does not hang."""
    model = Uniform()
    with sender(SharedMemWeightSyncScheme, model) as scheme, in_thread(scheme) as server:
        scheme.connect()
        server.update_model(
            lambda policy: policy.weights.append(torch.nn.Parameter(torch.zeros(1)))
        )
        with caplog.at_level(logging.WARNING, "aioinfer"):
            scheme.send(weights(3))
        assert "'weights.8'" in caplog.text
        assert server.policy_version == 1


def test_a_sender_that_does_not_wait() -> None:
    """A scheme whose sender may overwrite what is read is refused."""
    with pytest.raises(ValueError, match="sync=False"):
        InferenceServer(Uniform(), weight_sync=SharedMemWeightSyncScheme(sync=False))


@pytest.mark.parametrize("kind", [RayWeightSyncScheme, RPCWeightSyncScheme])
def test_a_receiver_that_does_not_wait(kind: Any) -> None:
    """A scheme whose sender calls a method of the receiver's actor is refused."""
    with pytest.raises(ValueError, match=f"of a {kind.__name__} is an actor .* use a scheme of"):
        InferenceServer(Uniform(), weight_sync=kind())
