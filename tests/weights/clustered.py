"""What the schemes of clusters are tested with: servers and trainers in other processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import PATIENCE_S, InThread, row, wait_until, within
from torch import nn

from aioinfer import InferenceServer, InferenceTransport, WeightSyncError, WeightSyncScheme
from aioinfer.weights.snapshots import Snapshot, SnapshotSender

from .models import Uniform
from .suite import Hooks, SchemeConformance, Torn, check

# -- in actors --------------------------------------------------------------


class Host:
    """Runs a server."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._server: Any = None

    def start(
        self,
        make: Callable[[], nn.Module],
        scheme: WeightSyncScheme,
        transport: InferenceTransport,
        options: dict[str, Any],
    ) -> int:
        """Start a server; return the id of this process."""
        self._server = InferenceServer(make(), transport, weight_sync=scheme, **options)
        self._server.start()
        return os.getpid()

    def stop(self) -> None:
        self._server.shutdown()

    def read(self, name: str) -> Any:
        """A property of the server."""
        return getattr(self._server, name)

    def stats(self) -> Any:
        return self._server.stats()


class Trainer:
    """Trains."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._model = Uniform()

    def begin(self, scheme: WeightSyncScheme, version: int) -> int:
        """Become the sender; return the id of this process."""
        self._scheme = scheme
        scheme.init_on_sender(model=self._model.set_to(version), version=version)
        scheme.connect(10)
        return os.getpid()

    def send(self, version: int) -> Any:
        return self._scheme.send(model=self._model.set_to(version), version=version)

    def send_for_ever(self) -> None:
        """Send as fast as it can, on a thread."""

        def run() -> None:
            version = 1
            while True:
                version += 1
                model = self._model.set_to(version)
                self._scheme.send(model=model, version=version, wait="none")

        threading.Thread(target=run, daemon=True).start()

    def end(self) -> None:
        self._scheme.close()


# -- in the driver ----------------------------------------------------------


class Hosted:
    """A server in an actor, as its driver sees it.

    Args:
        call: calls a method of the host and waits for what it returns.
        transport: the link to the server.
    """

    def __init__(self, call: Callable[..., Any], transport: InferenceTransport) -> None:
        self._call = call
        self.sync_client = transport.sync_client

    @property
    def policy_version(self) -> int:
        return self._call("read", "policy_version")

    def stats(self) -> Any:
        return self._call("stats")


class Cast:
    """The actors that the tests of a module share, and a transport to the host."""

    transport: InferenceTransport

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the :class:`Host`, and wait."""
        raise NotImplementedError

    def train(self, method: str, *args: Any) -> Any:
        """Call a method of the :class:`Trainer`, and wait."""
        raise NotImplementedError

    @contextlib.contextmanager
    def serving(
        self, make: Callable[[], nn.Module], scheme: WeightSyncScheme, **options: Any
    ) -> Iterator[Hosted]:
        """A server in the host."""
        transport = pickle.loads(pickle.dumps(self.transport))  # with nothing left of earlier ones
        self.call("start", make, scheme, transport, options)
        try:
            yield Hosted(self.call, transport)
        finally:
            self.call("stop")


class OneSnapshot(SnapshotSender):
    """Writes new weights over those that are being read."""

    def _filled(self, weights: Any, version: int) -> Snapshot:
        if not self._snapshots:
            return super()._filled(weights, version)
        (snapshot,) = self._snapshots
        snapshot.version = version
        for target, source in zip(snapshot.tensors, weights.tensors, strict=True):
            target.copy_(source)
        return snapshot


class ThroughAnActor(SchemeConformance):
    """The server in an actor, the trainer in the driver."""

    cast: Cast

    @pytest.fixture(autouse=True)
    def _cast(self, cast: Cast) -> None:
        self.cast = cast

    def server(self, make: Any, scheme: Any, **options: Any) -> Any:
        return self.cast.serving(make, scheme, **options)

    # These say nothing about processes, and are held by the class whose server is in the driver.
    test_a_careless_scheme = None
    test_arguments = None
    test_awaitable = None
    test_a_cancelled_send = None
    test_receiving_without_a_server = None
    test_compiled_models = None
    test_lazy_modules = None
    test_ties_travel_once = None

    def test_a_trainer_in_an_actor(self) -> None:
        """A trainer in an actor sends to servers in the driver and in another actor."""
        scheme, cast = self.scheme(), self.cast
        with (
            InferenceServer(Uniform(), weight_sync=scheme) as server,
            self.server(Uniform, scheme) as other,
        ):
            cast.train("begin", scheme, 3)
            wait_until(lambda: (server.policy_version, other.policy_version) == (3, 3))
            for version in range(4, 8):
                report = cast.train("send", version)
                assert report.ok
                assert len(report.applied) == 2
                assert check(server.sync_client()(row(1)), 0) == version
                assert check(other.sync_client()(row(1)), 0) == version
            cast.train("end")


class OneOfEach(Hooks):
    """What is shown once: meeting, being lost, being killed."""

    def careless(self) -> WeightSyncScheme:
        """A scheme whose sender is a :class:`OneSnapshot`."""
        raise NotImplementedError

    def test_a_careless_sender(self) -> None:
        """1: the torn-read test fails for a sender that writes into what is being read."""
        with pytest.raises(Torn):
            self.bombard(self.careless(), wait="none")

    def test_two_senders_at_once(self) -> None:
        """9: a second sender of the same scheme is refused, until the first has ended."""
        scheme = self.scheme()
        scheme.init_on_sender(model=Uniform())
        other = self.trainer_of(scheme)
        with pytest.raises(WeightSyncError, match="another sender of this scheme is at work"):
            other.init_on_sender(model=Uniform())
        scheme.close()
        other.init_on_sender(model=Uniform())
        other.close()

    async def test_two_senders_on_an_event_loop(self) -> None:
        """9: on a loop, which is not blocked, it is the second one's calls that are refused."""
        scheme = self.scheme()
        scheme.init_on_sender(model=Uniform())
        await within(scheme.asend(model=Uniform()))
        other = self.trainer_of(scheme)
        other.init_on_sender(model=Uniform())
        with pytest.raises(WeightSyncError, match="another sender of this scheme is at work"):
            await within(other.asend(model=Uniform()))
        with pytest.raises(WeightSyncError, match="another sender of this scheme is at work"):
            await within(other.aconnect())
        await other.aclose()
        await scheme.aclose()

    def test_a_ticket(self) -> None:
        """A receiver that was made apart finds the sender by its ticket, which hides its secret."""
        sender, receiver = self.scheme(), self.scheme()
        ticket = sender.init_on_sender(model=Uniform(value=3), version=3)
        ticket = pickle.loads(pickle.dumps(ticket))
        assert repr(ticket.address._secret) not in repr(ticket)
        receiver.init_on_receiver(ticket)
        with InferenceServer(Uniform(), weight_sync=receiver) as server:
            assert check(server.sync_client()(row(1)), 0) == 3
        sender.close()

    def test_a_scheme_that_is_forgotten(self) -> None:
        """A sender that nobody refers to any more ends by itself (a fixture checks its threads)."""
        scheme = self.scheme()
        scheme.init_on_sender(model=Uniform())
        del scheme

    def test_who_does_not_know_the_secret(self) -> None:
        """Who does not know it is told nothing, and learns nothing."""
        scheme: Any = self.scheme()
        scheme.init_on_sender(model=Uniform(value=3), version=3)
        stranger: Any = self.trainer_of(scheme)
        stranger._address._secret = bytes(32)
        with InferenceServer(Uniform(), weight_sync=stranger) as server:
            assert check(server.sync_client()(row(1)), 0) == 0
        assert not scheme._sender.peers
        scheme.close()

    def test_nothing_to_pull_through(self, caplog: pytest.LogCaptureFixture) -> None:
        """Weights that cannot be made available are sent to each receiver by itself."""
        model, scheme = Uniform(leaves=3, numel=300_000), self.scheme()

        def full(snapshot: Any) -> None:
            raise MemoryError("full")

        with (
            self.trainer(scheme, model=model) as trainer,
            InferenceServer(Uniform(leaves=3, numel=300_000), weight_sync=scheme) as server,
        ):
            trainer._sender._export = full
            self.joined(trainer)
            assert trainer.send(model=model.set_to(1)).ok
            assert check(server.sync_client()(row(1)), 0) == 1
            # What is refused before it was read does not get in the way of what comes next.
            for _ in range(9):
                server.update_model(lambda model: None)
            report = trainer.send(model=model.set_to(11))
            assert (report.ok, report.version) == (True, 11)
            assert check(server.sync_client()(row(1)), 0) == 11
        assert "sent to each receiver by itself: MemoryError" in caplog.text

    def test_what_cannot_be_pulled(self) -> None:
        """A receiver that cannot pull says so, and is told of the newest weights again."""
        model, scheme = Uniform(), self.scheme()
        with (
            self.trainer(scheme, model=model) as trainer,
            InferenceServer(Uniform(), weight_sync=scheme) as server,
        ):
            self.joined(trainer)
            export = trainer._sender._export
            trainer._sender._export = lambda snapshot: b"nowhere"
            report = trainer.send(model=model.set_to(1))
            assert len(report.gone) == 1
            assert check(server.sync_client()(row(1)), 0) == 0
            trainer._sender._export = export
            wait_until(lambda: server.policy_version == 1)
            assert check(server.sync_client()(row(1)), 0) == 1

    def test_a_sender_that_ends_while_it_is_read(self) -> None:
        """A pull that would never end does with the sender; the next one's weights are taken."""
        model, scheme = Uniform(), self.scheme()
        with InferenceServer(Uniform(), weight_sync=scheme) as server:
            pull, begun = server._link._pull, threading.Event()

            async def never(*args: Any) -> None:
                begun.set()
                await asyncio.get_running_loop().create_future()

            with self.trainer(scheme, model=model) as trainer:
                self.joined(trainer)
                server._link._pull = never
                sending = InThread(trainer.send, model=model.set_to(1))
                assert begun.wait(PATIENCE_S)
                trainer._sender.close()
                assert len(sending.result().gone) == 1
            server._link._pull = pull
            with self.trainer(scheme, model=model.set_to(2), version=2):
                wait_until(lambda: server.policy_version == 2)
                assert check(server.sync_client()(row(1)), 0) == 2

    def test_a_trainer_that_is_killed(self, cast: Cast) -> None:
        """5: killed while it sends, its last whole version stays; a new one goes on above it."""
        scheme = self.scheme()
        with InferenceServer(Uniform(), weight_sync=scheme) as server:
            client = server.sync_client()
            pid = cast.train("begin", scheme, 1)
            cast.train("send_for_ever")
            wait_until(lambda: check(client(row(1)), 0) > 10)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not server._link._offered.is_set(), "the end to be noticed")
            last = check(client(row(1)), 0)
            assert last == server.policy_version
            model = Uniform()
            with self.trainer(scheme, model=model) as trainer:
                self.joined(trainer)
                report = trainer.send(model=model.set_to(last + 1))
                assert (report.version, len(report.applied)) == (last + 1, 1)
                assert check(client(row(1)), last) == last + 1

    def test_a_server_that_is_killed(self, cast: Cast) -> None:
        """6: a stopped server times out, a killed one is gone; others are served, nobody hangs."""
        model, scheme = Uniform(), self.scheme()
        with contextlib.ExitStack() as stack:
            trainer = stack.enter_context(self.trainer(scheme, model=model))
            other = stack.enter_context(InferenceServer(Uniform(), weight_sync=scheme))
            pid = cast.call("start", Uniform, scheme, cast.transport, {})
            wait_until(lambda: len(trainer._sender.peers) == 2)
            assert len(trainer.send(model=model.set_to(1)).applied) == 2
            (stopped,) = {peer.name for peer in trainer._sender.peers} - {other._weights.name}
            os.kill(pid, signal.SIGSTOP)
            try:
                for version in range(2, 20):
                    model.set_to(version)
                    report = trainer.send(model=model, timeout=0.2 if version == 2 else 0.05)
                    assert stopped in report.timed_out
                wait_until(lambda: other.policy_version == 19)
                assert check(other.sync_client()(row(1)), 0) == 19
                assert len(trainer._sender._snapshots) <= 4  # two read, the newest, a spare
                sending = InThread(trainer.send, model=model.set_to(20))
                wait_until(lambda: any(20 in peer.deliveries for peer in trainer._sender.peers))
            finally:
                os.kill(pid, signal.SIGKILL)
            report = sending.result()
            assert report.gone == (stopped,)
            assert len(report.applied) == 1
            assert trainer.send(model=model.set_to(60), version=60).ok
            assert check(other.sync_client()(row(1)), 0) == 60
