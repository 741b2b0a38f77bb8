"""What every scheme must do whose ends are in different processes, when these come and go.

Shared by the schemes as :mod:`suite` is, and numbered alike. Processes are forked, so a trainer can
be given a scheme, and told where it is to die, without either being pickled.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import pickle
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from helpers import InThread, row, stop, wait_until, within

from aioinfer import InferenceServer, ProcessInferenceServer, WeightSyncError, WeightSyncScheme

from .models import Uniform
from .suite import Hooks, check

FORK = multiprocessing.get_context("fork")
LEAVES = 4


def small(value: float = 0.0) -> Uniform:
    """A model whose leaves travel one by one with a scheme of :meth:`Ends.in_leaves`."""
    return Uniform(leaves=LEAVES, numel=16, value=value)


class Death(NamedTuple):
    """Where a trainer is killed: as it is about to call ``method`` of ``owner``."""

    owner: type
    method: str
    calls: int = 1
    """For the how-manieth time."""
    sent: int = 1
    """How many versions are sent whole before; calls count from the last but one on."""

    def await_(self) -> None:
        """Kill this process once it gets there."""
        original, counted = getattr(self.owner, self.method), itertools.count(1)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if next(counted) == self.calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(self.owner, self.method, dying)


def train(scheme: WeightSyncScheme, first: int, death: Death | None = None) -> None:
    """Send two versions, and perhaps die of it."""
    if death is not None and not death.sent:
        death.await_()
    model = small()
    scheme.init_on_sender(model=model)
    scheme.connect(10)
    assert scheme.send(model=model.set_to(first)).applied
    if death is not None:
        death.await_()
    assert scheme.send(model=model.set_to(first + 1)).applied
    scheme.close()


class Ends(Hooks):
    """What a scheme's tests say about its ends."""

    deaths: Sequence[Death] = ()
    """Everywhere that a trainer may die while it connects and sends."""

    def in_leaves(self, **options: Any) -> WeightSyncScheme:
        """A scheme that divides the weights of :func:`small` into their leaves."""
        raise NotImplementedError

    def at_rest(self) -> bool:
        """Whether nothing is being ended in this process, so that it can be forked."""
        return True


class TrainersElsewhere(Ends):
    """The trainer in a process of its own."""

    @pytest.mark.parametrize("mode", ["slots", "inplace"])
    def test_a_trainer_that_is_killed(self, mode: Any) -> None:
        """5: wherever it dies, the last whole version stays; a new trainer goes on above it."""
        scheme, seen = self.in_leaves(mode=mode), 0
        with self.server(small, scheme) as server:
            client = server.sync_client()
            for death in self.deaths:
                process = FORK.Process(target=train, args=(scheme, seen + 1, death))
                process.start()
                process.join(20)
                assert process.exitcode == -signal.SIGKILL, death
                seen += death.sent
                with self.trainer(scheme, model=small(-1)) as trainer:
                    trainer.connect(20)  # by now the server has noticed that the other one is gone
                    assert check(client(row(1)), 0) == seen, death
                    report = trainer.send(model=small(seen + 1))
                    assert (report.version, len(report.applied)) == (seen + 1, 1), death
                    seen = check(client(row(1)), seen)
                wait_until(self.at_rest)
            assert server.stats().weights_refused == 0

    def test_a_trainer_in_another_process(self) -> None:
        """What another process sends is served; after it has ended, too, and after the next."""
        scheme = self.scheme()
        with self.server(small, scheme) as server:
            client = server.sync_client()
            for first in (1, 3):
                process = FORK.Process(target=train, args=(scheme, first))
                process.start()
                process.join(20)
                assert process.exitcode == 0
                assert check(client(row(1)), 0) == first + 1


class Ours(Ends):
    """Ends that do not depend on what kind of server there is."""

    async def test_a_trainer_in_another_process_than_the_loop(self) -> None:
        """A server of the running loop serves what another process sends, and goes on meanwhile."""
        scheme = self.scheme()
        async with InferenceServer(small(), weight_sync=scheme) as server:
            client, seen = server.async_client(), 0
            process = FORK.Process(target=train, args=(scheme, 1))
            process.start()
            while seen < 2:
                seen = check(await within(client(row(1))), seen)
                await asyncio.sleep(0)
            await asyncio.to_thread(process.join, 20)
            assert process.exitcode == 0

    def test_a_server_that_is_killed(self) -> None:
        """6: a stopped one times out, a killed one is gone; no send hangs, others are served."""
        model, scheme = Uniform(), self.scheme()
        with self.trainer(scheme, model=model) as trainer:
            process = ProcessInferenceServer(Uniform, ctx=FORK, weight_sync=scheme)
            with process, InferenceServer(Uniform(), weight_sync=scheme) as other:
                wait_until(lambda: len(trainer._sender.peers) == 2)
                assert len(trainer.send(model=model.set_to(1)).applied) == 2
                stop(process.pid)
                for version in range(2, 50):
                    model.set_to(version)
                    report = trainer.send(model=model, timeout=0.2 if version == 2 else 0.02)
                    assert len(report.timed_out) >= 1
                os.kill(process.pid, signal.SIGKILL)
                wait_until(lambda: len(trainer._sender.peers) == 1)
                assert trainer.send(model=model.set_to(60), version=60).ok
                assert check(other.sync_client()(row(1)), 0) == 60
                self.check_sender(trainer)
                # 7: started again, it catches up.
                process.shutdown()
                with process:
                    assert check(process.sync_client()(row(1)), 0) == 60

    def check_sender(self, trainer: Any) -> None:
        """After a receiver that was stuck: what a sender may still hold."""

    def test_a_server_killed_during_a_send(self) -> None:
        """6: a send that waits for a server which is killed ends, and says so."""
        model, scheme = Uniform(), self.scheme()
        with (
            self.trainer(scheme, model=model) as trainer,
            ProcessInferenceServer(Uniform, ctx=FORK, weight_sync=scheme) as process,
        ):
            trainer.connect(10)
            stop(process.pid)
            sending = InThread(trainer.send, model=model.set_to(1))
            wait_until(lambda: any(peer.deliveries for peer in trainer._sender.peers))
            os.kill(process.pid, signal.SIGKILL)
            report = sending.result()
            assert len(report.gone) == 1
            assert not report.ok

    def test_two_senders_at_once(self) -> None:
        """9: a second sender of the same scheme is refused, in this process or another."""
        scheme = self.scheme()
        with (
            self.trainer(scheme, model=Uniform()),
            pytest.raises(WeightSyncError, match="another sender"),
        ):
            pickle.loads(pickle.dumps(scheme)).init_on_sender(model=Uniform())

    def test_a_ticket(self) -> None:
        """A receiver that was made apart finds the sender by its ticket, which keeps its secret."""
        sender, receiver = self.scheme(), self.scheme()
        ticket = sender.init_on_sender(model=Uniform(value=3), version=3)
        ticket = pickle.loads(pickle.dumps(ticket))
        assert ticket.address.token.hex() not in repr(ticket)
        assert repr(ticket.address.token) not in repr(ticket)
        receiver.init_on_receiver(ticket)
        with InferenceServer(Uniform(), weight_sync=receiver) as server:
            assert check(server.sync_client()(row(1)), 0) == 3
        sender.close()

    def test_who_does_not_know_the_token(self) -> None:
        """A process that does not know the token is told nothing, and learns nothing."""
        scheme: Any = self.scheme()
        scheme.init_on_sender(model=Uniform(value=3), version=3)
        stranger = pickle.loads(pickle.dumps(scheme))
        stranger._address = stranger._address._replace(token=bytes(32))
        with InferenceServer(Uniform(), weight_sync=stranger) as server:
            assert check(server.sync_client()(row(1)), 0) == 0
        assert not scheme._sender.peers
        scheme.close()

    def test_a_scheme_that_is_forgotten(self) -> None:
        """A sender that nobody refers to any more ends by itself (the test checks what is left)."""
        scheme = self.scheme()
        scheme.init_on_sender(model=Uniform())
        del scheme
