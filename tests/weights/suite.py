"""What every scheme must do, whoever is at its two ends.

A scheme's tests are a class that inherits :class:`SchemeConformance` and says in :meth:`scheme`
what it is about. The numbers in the docstrings are those of the list that this library was built
to; what cannot be shown for every scheme is in the scheme's own file.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import InThread, row, until, wait_until, within
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import (
    InferenceServer,
    ProcessInferenceServer,
    Staged,
    WeightSyncError,
    WeightSyncScheme,
)
from aioinfer.weights.slots import Slots, Source

from .models import Everything, Uniform, everything_of

RESPONSES = 10_000


class Torn(AssertionError):
    """A response was not computed by one whole version, or not by the one it says."""


def check(reply: Any, seen: int) -> int:
    """Return the version of a reply of a :class:`Uniform`, which must be whole."""
    low, high, version = reply["low"].item(), reply["high"].item(), reply["policy_version"].item()
    if not low == high == version:
        raise Torn(f"{low} to {high}, said to be version {version}")
    if version < seen:
        raise Torn(f"version {version} after {seen}")
    return version


class Hooks:
    """What a scheme's tests say about it."""

    def scheme(self, **options: Any) -> WeightSyncScheme:
        """A new scheme."""
        raise NotImplementedError

    def trainer_of(self, scheme: WeightSyncScheme) -> WeightSyncScheme:
        """The object through which a trainer sends to the servers of ``scheme``."""
        return scheme

    @contextlib.contextmanager
    def trainer(self, scheme: WeightSyncScheme, **init: Any) -> Iterator[WeightSyncScheme]:
        """A trainer that has begun, in this process."""
        trainer = self.trainer_of(scheme)
        trainer.init_on_sender(**init)
        try:
            yield trainer
        finally:
            trainer.close()

    @contextlib.contextmanager
    def server(
        self, make: Callable[[], nn.Module], scheme: WeightSyncScheme, **options: Any
    ) -> Iterator[Any]:
        """A server that runs, for threads."""
        with InferenceServer(make(), weight_sync=scheme, **options) as server:
            yield server

    def joined(self, trainer: WeightSyncScheme) -> None:
        """Wait until the trainer knows of the server."""
        trainer.connect(10)

    def bombard(self, scheme: Any, *, wait: str, responses: int = RESPONSES) -> None:
        """Ask while a trainer sends as fast as it can, and check every response."""
        model = Uniform()
        over = threading.Event()
        with self.trainer(scheme, model=model) as trainer, self.server(Uniform, scheme) as server:
            self.joined(trainer)

            def train() -> int:
                version = 0
                while not over.is_set():
                    version += 1
                    trainer.send(model=model.set_to(version), version=version, wait=wait)
                report = trainer.send(model=model.set_to(version + 1))
                assert report.ok
                return version + 1

            def act() -> int:
                client, seen, rounds = server.sync_client(), 0, responses // 64 + 1
                while rounds > 0 or not seen:  # until there were updates meanwhile
                    rounds -= 1
                    answers = [client.submit(row(1)) for _ in range(16)]
                    for answer in answers:
                        seen = check(answer.result(30), seen)
                return seen

            training = InThread(train)
            actors = [InThread(act) for _ in range(4)]
            try:
                for actor in actors:
                    actor.thread.join(50)
                seen = [actor.result() for actor in actors]
            finally:
                over.set()
            last = training.result()
            assert max(seen) > 0
            # 10: nothing starves, and the last version arrives.
            assert check(server.sync_client()(row(1)), 0) == last


class SchemeConformance(Hooks):
    """Everything that holds for every scheme."""

    pytestmark = [pytest.mark.timeout(60)]

    # -- 1, 10: whole versions, rightly named -------------------------------

    def test_the_documented_usage(self) -> None:
        """TorchRL's usage, with only the import line changed, serves what was sent."""
        torch.manual_seed(0)
        training_model, inference_model = linear(), linear()
        weight_sync = self.scheme()
        with (
            self.trainer(weight_sync, model=training_model) as trainer,
            self.server(lambda: inference_model, weight_sync) as server,
        ):
            self.joined(trainer)
            client = server.sync_client()
            assert client(row(1))["policy_version"] == 0
            report = trainer.send(model=training_model)
            assert report.ok
            assert len(report.applied) == 1
            reply = client(row(1))
            assert reply["policy_version"] == report.version == 1
            with torch.no_grad():
                expected = training_model.module(torch.ones(3))
            torch.testing.assert_close(reply["action"], expected)

    def test_no_response_is_torn(self) -> None:
        """1: of 10,000 responses under continuous updates, each is one whole version, its own."""
        self.bombard(self.scheme(), wait="none")

    def test_no_response_is_torn_inplace(self) -> None:
        """1: nor with one copy of the weights."""
        self.bombard(self.scheme(mode="inplace"), wait="applied", responses=RESPONSES // 10)

    def test_a_careless_scheme(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """1: the two tests above fail for a scheme that writes into what serves, in passing."""
        monkeypatch.setattr(Slots, "publish", publish_carelessly)
        with pytest.raises(Torn):
            self.bombard(self.scheme(), wait="none")

    # -- 2: only what was sent ----------------------------------------------

    def test_what_was_not_sent_is_not_served(self) -> None:
        """2: changing the trainer's model, which is also the server's, changes nothing."""
        model, scheme = Uniform(), self.scheme()
        with (
            self.trainer(scheme, model=model) as trainer,
            self.server(lambda: model, scheme) as server,
        ):
            self.joined(trainer)
            client = server.sync_client()
            model.set_to(5)
            assert check(client(row(1)), 0) == 0
            trainer.send(model=model.set_to(1))
            model.set_to(6)
            assert check(client(row(1)), 0) == 1
            trainer.send(weights=TensorDict.from_module(model.set_to(2)))
            model.set_to(7)
            assert check(client(row(1)), 0) == 2

    def test_any_form_of_weights(self) -> None:
        """Weights may be a model, a state dict, or a TensorDict."""
        model, scheme = Uniform(), self.scheme()
        with (
            self.trainer(scheme, weights=model.state_dict()) as trainer,
            self.server(Uniform, scheme) as server,
        ):
            self.joined(trainer)
            client = server.sync_client()
            for version, form in enumerate([nn.Module, dict, TensorDict, "state_dict"], 1):
                model.set_to(version)
                weights = {
                    nn.Module: lambda: model,
                    dict: lambda: {n: p.detach().clone() for n, p in model.named_parameters()},
                    TensorDict: lambda: TensorDict.from_module(model).data.clone(),
                    "state_dict": model.state_dict,
                }[form]()
                assert trainer.send(weights).ok
                assert check(client(row(1)), 0) == version

    # -- 3, 4: what does not fit --------------------------------------------

    @pytest.mark.parametrize(
        ("fault", "says"),
        [
            ("missing", "'weights.7' .* is missing"),
            ("extra", "'more' .* is not known"),
            ("shape", r"'weights.7' .* shape \[7\]"),
            ("dtype", "'weights.7' .* float64"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, fault: str, says: str) -> None:
        """3, 4: a missing or extra name, a wrong shape or dtype in the last leaf: both ends."""
        model, scheme = Uniform().set_to(0), self.scheme()
        wrong = dict(model.set_to(9).state_dict())
        last = "weights.7"
        if fault == "missing":
            del wrong[last]
        elif fault == "extra":
            wrong["more"] = torch.ones(1)
        else:
            wrong[last] = torch.ones(7) if fault == "shape" else wrong[last].double()
        with self.server(Uniform, scheme) as server:
            client = server.sync_client()
            # The trainer's own manifest is right: nothing is sent.
            with self.trainer(scheme, model=model) as trainer:
                self.joined(trainer)
                with pytest.raises(WeightSyncError, match=says):
                    trainer.send(wrong)
                assert check(client(row(1)), 0) == 0
            # The trainer's own is as wrong: the server refuses, and writes nothing.
            with self.trainer(scheme, weights=wrong) as trainer:
                self.joined(trainer)
                report = trainer.send(wrong)
                assert not report.ok
                assert report.applied == ()
                (why,) = report.refused.values()
                assert re.search(says, why)
                assert check(client(row(1)), 0) == 0
            assert server.stats().weights_refused == 1
            with self.trainer(scheme, model=model) as trainer:
                self.joined(trainer)
                assert trainer.send(model=model.set_to(3), version=3).ok
                assert check(client(row(1)), 0) == 3

    def test_casting_and_parts(self) -> None:
        """Another dtype and a part of the weights are taken where that was asked for."""
        model, scheme = Uniform(), self.scheme(cast=True, partial=True)
        with self.trainer(scheme, model=model) as trainer, self.server(Uniform, scheme) as server:
            self.joined(trainer)
            client = server.sync_client()
            trainer.send({n: t.double() for n, t in model.set_to(1).state_dict().items()})
            assert check(client(row(1)), 0) == 1
            for leaf in range(3):  # each time into the other slot
                trainer.send({f"weights.{leaf}": torch.full((512,), 9.0)})
            reply = client(row(1))
            assert (reply["low"], reply["high"], reply["policy_version"]) == (1, 9, 4)
            trainer.send({f"weights.{leaf}": torch.full((512,), 5.0) for leaf in range(8)})
            assert check(client(row(1)), 0) == 5

    def test_not_finite(self) -> None:
        """Where it was asked for, NaN and infinity are refused before anything is sent."""
        model, scheme = Uniform(), self.scheme(require_finite=True)
        with self.trainer(scheme, model=model) as trainer, self.server(Uniform, scheme) as server:
            self.joined(trainer)
            with torch.no_grad():
                model.weights[7][100] = torch.nan
            with pytest.raises(WeightSyncError, match="'weights.7'"):
                trainer.send(model=model)
            assert trainer.send(model=model.set_to(1)).version == 1
            assert check(server.sync_client()(row(1)), 0) == 1

    # -- 7, 8: coming late --------------------------------------------------

    def test_no_sender_yet(self) -> None:
        """8: the initial weights are served until there is a sender; its newest come with it."""
        scheme = self.scheme()
        with self.server(Uniform, scheme) as server:
            client = server.sync_client()
            assert check(client(row(1)), 0) == 0
            with self.trainer(scheme, model=Uniform(value=5), version=5) as trainer:
                self.joined(trainer)
                wait_until(lambda: server.policy_version == 5)
                assert check(client(row(1)), 0) == 5
                trainer.send(model=Uniform(value=6))
                assert check(client(row(1)), 5) == 6

    def test_a_late_joiner(self) -> None:
        """8: the first response of a server that comes late is of the newest version."""
        model, scheme = Uniform(), self.scheme()
        with self.trainer(scheme, model=model) as trainer:
            for version in range(1, 4):
                assert trainer.send(model=model.set_to(version)).applied == ()
            model.set_to(100)
            with self.server(Uniform, scheme) as server:
                assert check(server.sync_client()(row(1)), 0) == 3
                assert server.policy_version == 3

    def test_a_server_that_is_started_again(self) -> None:
        """7: it catches up with what it missed."""
        model, scheme = Uniform(), self.scheme()
        with self.trainer(scheme, model=model) as trainer:
            for version in (2, 4, 6):
                with self.server(Uniform, scheme) as server:
                    self.joined(trainer)
                    assert check(server.sync_client()(row(1)), 0) == version - 2
                    trainer.send(model=model.set_to(version - 1))
                    assert check(server.sync_client()(row(1)), 0) == version - 1
                wait_until(lambda: not trainer.send(model=model.set_to(0), wait="none").pending)
                trainer.close()
                trainer.init_on_sender(model=model.set_to(version), version=version)

    # -- 9: versions --------------------------------------------------------

    def test_versions(self) -> None:
        """9: versions only ever rise; the skipped ones are counted."""
        model, scheme = Uniform(), self.scheme()
        with self.trainer(scheme, model=model) as trainer, self.server(Uniform, scheme) as server:
            self.joined(trainer)
            client = server.sync_client()
            assert trainer.send(model=model.set_to(4), version=4).ok
            for version in (4, 3, -1):
                with pytest.raises(ValueError, match="above 4"):
                    trainer.send(model=model, version=version)
            assert check(client(row(1)), 0) == 4
            assert trainer.send(model=model.set_to(5)).version == 5
            assert check(client(row(1)), 4) == 5
            stats = server.stats()
            assert (stats.weight_updates, stats.weights_skipped) == (2, 3)
            assert stats.policy_staleness == 0

    def test_a_sender_that_is_started_again(self) -> None:
        """9: it has a new epoch, and goes on above the old one."""
        model, scheme = Uniform(), self.scheme()
        epochs = []
        with self.server(Uniform, scheme) as server:
            client, seen = server.sync_client(), 0
            for _ in range(3):
                trainer = self.trainer_of(scheme)
                epochs.append(trainer.init_on_sender(model=model).epoch)
                self.joined(trainer)
                for _ in range(2):
                    report = trainer.send(model=model.set_to(seen + 1))
                    assert report.ok
                    assert report.version == seen + 1
                    seen = check(client(row(1)), seen)
                trainer.close()
        assert epochs == sorted(set(epochs))
        assert seen == 6

    def test_two_threads_send(self) -> None:
        """9: two threads may send at once; each version is whole, and the last one arrives."""
        scheme = self.scheme()
        with (
            self.trainer(scheme, model=Uniform()) as trainer,
            self.server(Uniform, scheme) as server,
        ):
            self.joined(trainer)
            lock, versions = threading.Lock(), iter(range(1, 1000))

            def train() -> int:
                model = Uniform()
                for _ in range(50):
                    with lock:
                        version = next(versions)
                        model.set_to(version)
                        trainer.send(model=model, version=version, wait="none")
                return version

            threads = [InThread(train) for _ in range(2)]
            last = max(thread.result() for thread in threads)
            wait_until(lambda: server.policy_version == last)
            assert check(server.sync_client()(row(1)), 0) == last == 100

    # -- 11 to 14: whatever a model is made of ------------------------------

    def test_everything_arrives(self) -> None:
        """11: batch norm, buffers that are not persistent, scalars, integers, extra state."""
        model, scheme = Everything(), self.scheme()
        with (
            self.trainer(scheme, model=model) as trainer,
            self.server(Everything, scheme) as server,
        ):
            self.joined(trainer)
            client = server.sync_client()
            for seed in range(1, 4):  # each time into the other slot
                report = trainer.send(model=model.change(seed))
                assert report.ok, report
                expected = everything_of(model)
                model.change(100)
                assert torch.equal(client(row(1))["all"], expected)

    def test_ties_travel_once(self) -> None:
        """12: tied parameters are one tensor, in the manifest and in the slots."""
        model, scheme = Everything(), self.scheme()
        with self.trainer(scheme, model=model) as trainer:
            ticket = pickle.loads(pickle.dumps(trainer._own_ticket))
            names = [leaf.name for leaf in ticket.manifest.leaves]
            assert "first.weight" in names
            assert "second.weight" not in names
            assert ticket.manifest.ties == (("second.weight", "first.weight"),)
            assert ticket.manifest.extra == ("extra._extra_state",)
            saved = {
                n: t.clone() if torch.is_tensor(t) else t for n, t in model.state_dict().items()
            }
            saved["second.weight"][0] += 1
            with pytest.raises(WeightSyncError, match="one tensor"):
                trainer.send(saved)

    def test_lazy_modules(self) -> None:
        """13: a module without weights yet is refused at either end, with what to do."""
        lazy = nn.Sequential(nn.LazyLinear(3))
        scheme = self.scheme()
        with pytest.raises(WeightSyncError, match="'0.weight' .* call the model once"):
            self.trainer_of(scheme).init_on_sender(model=lazy)
        with pytest.raises(WeightSyncError, match="call the model once"):
            InferenceServer(lazy, weight_sync=scheme)

    def test_compiled_models(self) -> None:
        """14: new weights for a compiled policy compile nothing anew, and are used."""
        frames = 0

        def backend(graph: Any, inputs: Any) -> Any:
            nonlocal frames
            frames += 1
            return graph.forward

        torch._dynamo.reset()
        training = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        network = torch.compile(
            nn.Sequential(nn.Linear(3, 3), nn.Tanh()), backend=backend, dynamic=False
        )
        policy = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
        outer = TensorDictModule(training, in_keys=["observation"], out_keys=["action"])
        scheme = self.scheme()
        try:
            with (
                self.trainer(scheme, model=outer) as trainer,
                InferenceServer(policy, weight_sync=scheme) as server,
            ):
                self.joined(trainer)
                client = server.sync_client()
                client(row(1))
                compiled = frames
                for seed in range(4):
                    with torch.no_grad():
                        training[0].weight.fill_(seed / 10)
                    assert trainer.send(model=outer).ok
                    with torch.no_grad():
                        expected = training(torch.ones(1, 3))[0]
                    torch.testing.assert_close(client(row(1))["action"], expected)
                assert frames == compiled == 1
        finally:
            torch._dynamo.reset()

    # -- calls --------------------------------------------------------------

    def test_arguments(self) -> None:
        """Wrong arguments are refused, and name what is allowed."""
        model = Uniform()
        with pytest.raises(ValueError, match="mode"):
            self.scheme(mode="both")
        with pytest.raises(TypeError, match="cast"):
            self.scheme(cast=1)
        scheme = self.scheme()
        with pytest.raises(RuntimeError, match="init_on_sender"):
            scheme.send(model=model)
        with pytest.raises(RuntimeError, match="init_on_sender"):
            scheme.connect()
        with pytest.raises(TypeError, match="nothing to send"):
            scheme.init_on_sender()
        with pytest.raises(TypeError, match="both"):
            scheme.init_on_sender(model=model, weights=model.state_dict())
        with pytest.raises(TypeError, match="version"):
            scheme.init_on_sender(model=model, version=1.5)
        with pytest.raises(TypeError, match="weight_sync"):
            InferenceServer(model, weight_sync="shared")
        with pytest.raises(WeightSyncError, match="nn.Module"):
            InferenceServer(lambda td: td, weight_sync=scheme)
        with self.trainer(scheme, model=model) as trainer:
            with pytest.raises(RuntimeError, match="already"):
                trainer.init_on_sender(model=model)
            with pytest.raises(TypeError, match="nothing to send"):
                trainer.send()
            with pytest.raises(TypeError, match="must be"):
                trainer.send(3)
            with pytest.raises(TypeError, match="tensors"):
                trainer.send({"weights.0": 3})
            with pytest.raises(ValueError, match="wait"):
                trainer.send(model=model, wait="long")
            with pytest.raises(ValueError, match="timeout"):
                trainer.send(model=model, timeout=-1)
            with pytest.raises(TypeError, match="version"):
                trainer.send(model=model, version="2")
            with pytest.raises(TimeoutError, match="no receiver"):
                trainer.connect(0.0)
            assert trainer.send(model=model).version == 1

    async def test_awaitable(self) -> None:
        """On an event loop: a server of that loop, ``asend``, ``aconnect``, ``aclose``."""
        scheme, model = self.scheme(), Uniform()
        trainer = self.trainer_of(scheme)
        trainer.init_on_sender(model=model)
        async with InferenceServer(Uniform(), weight_sync=scheme) as server:
            await within(trainer.aconnect())
            client = server.async_client()
            seen = 0
            for version in range(1, 20):
                sending = asyncio.ensure_future(trainer.asend(model=model.set_to(version)))
                await asyncio.sleep(0)
                model.set_to(-1)  # it was copied before it first waited
                for reply in await within(asyncio.gather(*[client(row(1)) for _ in range(20)])):
                    seen = check(reply, seen)
                report = await within(sending)
                assert report.ok
                assert (report.version, len(report.applied)) == (version, 1)
            assert check(await within(client(row(1))), seen) == 19
            sent = [trainer.asend(model=model.set_to(version)) for version in range(20, 30)]
            for report in await within(asyncio.gather(*sent)):
                assert report.ok
            assert check(await within(client(row(1))), 19) == 29
        await trainer.aclose()

    async def test_a_cancelled_send(self) -> None:
        """A cancelled ``asend`` ends at once, and its weights arrive nevertheless."""
        scheme, model = self.scheme(), Uniform()
        trainer = self.trainer_of(scheme)
        trainer.init_on_sender(model=model)
        async with InferenceServer(Uniform(), weight_sync=scheme) as server:
            await within(trainer.aconnect())
            sending = asyncio.ensure_future(trainer.asend(model=model.set_to(1)))
            await asyncio.sleep(0)
            sending.cancel()
            await within(asyncio.gather(sending, return_exceptions=True))
            report = await within(trainer.asend(model=model.set_to(2)))
            assert report.ok
            assert check(await within(server.async_client()(row(1))), 0) == 2
        await trainer.aclose()

    async def test_receiving_without_a_server(self) -> None:
        """Who has no server receives weights, whole, and applies them when it likes."""
        scheme, model, mine = self.scheme(), Uniform(), Uniform()
        trainer = self.trainer_of(scheme)
        trainer.init_on_sender(model=model)
        with pytest.raises(RuntimeError, match="init_on_receiver"):
            await scheme.receive()
        scheme.init_on_receiver(model=mine)
        await within(scheme.aconnect())
        await within(trainer.aconnect())
        assert await scheme.receive(timeout=0.0) is None
        for version in (1, 2):
            receiving = asyncio.ensure_future(scheme.receive())
            sending = asyncio.ensure_future(trainer.asend(model=model.set_to(version)))
            staged = await within(receiving)
            assert type(staged) is Staged
            assert staged.version == version
            assert {value.item() for t in staged.weights.values() for value in t} == {version}
            assert mine.weights[0][0] == version - 1
            staged.apply()
            report = await within(sending)
            assert report.ok
            assert len(report.applied) == 1
            assert {value.item() for t in mine.parameters() for value in t} == {version}
        report = await within(trainer.asend(model=model.set_to(3), wait="staged"))
        assert len(report.staged) == 1
        report = await within(trainer.asend(model=model.set_to(4), timeout=0.01))
        assert len(report.timed_out) == 1
        await until(lambda: scheme._mailbox[0].version == 4)
        staged = await within(scheme.receive(timeout=0.0))
        assert staged is not None
        assert staged.version == 4  # the newest counts
        assert await scheme.receive(timeout=0.0) is None
        await trainer.aclose()
        await scheme.aclose()

    # -- 15: old weights; ten thousand updates ------------------------------

    def test_what_is_known_to_be_newer(self) -> None:
        """15: a server knows of versions that it could not take, and how far it is behind."""
        scheme, model = self.scheme(), Uniform()
        with self.server(Uniform, scheme, max_staleness=1) as server:
            client = server.sync_client()
            with self.trainer(scheme, model=Uniform(leaves=7)) as trainer:
                self.joined(trainer)
                assert trainer.send(model=Uniform(leaves=7)).refused
                assert check(client(row(1)), 0) == 0
                assert server.stats().policy_staleness == 1
                assert trainer.send(model=Uniform(leaves=7)).refused
                with pytest.raises(WeightSyncError, match="max_staleness=1"):
                    client(row(1))
            with self.trainer(scheme, model=model) as trainer:
                self.joined(trainer)
                assert trainer.send(model=model.set_to(3), version=3).ok
                assert check(client(row(1)), 0) == 3
                assert server.stats().policy_staleness == 0

    def test_nothing_grows(self) -> None:
        """15: 10,000 updates leave no memory, descriptors, threads or segments behind."""
        model, scheme = Uniform(leaves=2, numel=16), self.scheme()
        with (
            self.trainer(scheme, model=model) as trainer,
            self.server(lambda: Uniform(leaves=2, numel=16), scheme) as server,
        ):
            self.joined(trainer)
            client = server.sync_client()
            check(client(row(1)), 0)
            for version in range(1, 101):
                trainer.send(model=model.set_to(version))
            before = footprints(server)
            for version in range(101, 10_001):
                trainer.send(model=model.set_to(version), wait="none")
            assert trainer.send(model=model.set_to(10_001)).ok
            assert check(client(row(1)), 0) == 10_001
            after = footprints(server)
        for now, then in zip(after, before, strict=True):
            assert now[0] <= then[0]
            assert now[1] <= then[1]
            assert now[2] - then[2] < 10 << 20


def publish_carelessly(
    self: Slots, source: Source, version: int, *, epoch: int = 0, **how: Any
) -> int:
    """Write into what serves, leaf by leaf, as a background thread of another library does."""
    slot = self.current
    self._check_newer(version, epoch)
    targets = self._targets(source, slot, cast=False, partial=False)
    for leaf in range(len(targets)):
        alone = [target if index == leaf else None for index, target in enumerate(targets)]
        source.copy_into(alone, whole=False)
        time.sleep(0.001)  # a forward comes between, with certainty
    slot.version, self.epoch = version, epoch
    return 0


class InAProcess(Hooks):
    """The server in a process of its own."""

    @contextlib.contextmanager
    def server(
        self, make: Callable[[], nn.Module], scheme: WeightSyncScheme, **options: Any
    ) -> Iterator[Any]:
        server = ProcessInferenceServer(
            make, ctx=multiprocessing.get_context("fork"), weight_sync=scheme, **options
        )
        with server:
            yield server


class ThroughAProcess(InAProcess, SchemeConformance):
    """The server in a process of its own, the trainer in its parent."""


def footprints(server: Any) -> list[tuple[int, int, int]]:
    """Threads, descriptors, and bytes: of this process, and of the server's if it has its own."""
    pids = {os.getpid(), getattr(server, "pid", os.getpid())}
    found = []
    for pid in sorted(pids):
        with open(f"/proc/{pid}/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        threads = len(os.listdir(f"/proc/{pid}/task"))
        found.append((threads, len(os.listdir(f"/proc/{pid}/fd")), resident))
    return found


def linear() -> TensorDictModule:
    return TensorDictModule(nn.Linear(3, 3), in_keys=["observation"], out_keys=["action"])
