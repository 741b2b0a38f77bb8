"""What servers have in common that run in several actors of a cluster.

Which cluster that is, how actors are started on it and how one is called is up to subclasses.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import Any, Self, TypeVar

import anyio
import torch

import aioinfer.arguments as arguments
from aioinfer.blocking import new_event_loop
from aioinfer.errors import ServerClosedError, ServerDiedError
from aioinfer.hosting.base import ANSWER_S, Answer, HostedServer, rebuilt
from aioinfer.intake import running_loop
from aioinfer.stats import ServerStats
from aioinfer.transports.replicated import ReplicatedTransport

T = TypeVar("T")

SILENCE_S = 10.0
"""Seconds after which a replica that owes an answer must show that it lives, and in which."""


class ReplicatedServer(HostedServer):
    """Runs an :class:`InferenceServer` in each of several actors.

    Args:
        transport: the link to all of them.
        start_timeout: seconds in which all of them must be ready.
    """

    def __init__(self, transport: ReplicatedTransport, start_timeout: float) -> None:
        self._transport = transport
        self._start_timeout = arguments.duration("start_timeout", start_timeout)
        self._replicas: dict[int, Any] = {}
        """The actors, by number; ``None`` for one that has died."""

    @property
    def transport(self) -> ReplicatedTransport:
        """The link to all replicas; it can be sent to actors, before or after the start."""
        return self._transport

    # -- what the cluster does ----------------------------------------------

    @abc.abstractmethod
    async def _open(self) -> None:
        """Start the replicas, and wait until all of them serve."""

    @abc.abstractmethod
    async def _end(self) -> None:
        """End the replicas that there are; they have closed, if they could."""

    @abc.abstractmethod
    async def _send(self, replica: Any, what: str, *args: Any) -> Answer:
        """Ask an actor that runs a :class:`~aioinfer.hosting.replica.Replica`.

        Raises:
            Exception: it has ended.
        """

    # -- questions ----------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether it was started and not closed since."""
        return bool(self._replicas)

    async def astats(self, *, reset: bool = False) -> dict[int, ServerStats]:
        """Return what each replica that lives did, by its number.

        Raises:
            ServerClosedError: the server is not running.
            ServerDiedError: all replicas have died.
        """
        return await self._ask("stats", reset)

    def stats(self, *, reset: bool = False) -> dict[int, ServerStats]:
        """Return what each replica did; :meth:`astats` for threads."""
        return blocking(self.astats(reset=reset))

    async def aload_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[int, int]:
        """Load weights into every replica, between two batches; into those to come, if any do.

        Args:
            state_dict: as the policy's own ``load_state_dict`` takes it.

        Returns:
            The version of each replica's policy from now on.

        Raises:
            RuntimeError: the policy does not take them.
            ServerClosedError: the server is not running.
            ServerDiedError: all replicas have died.
        """
        return await self._load(dict(state_dict))

    async def _load(self, state_dict: dict[str, torch.Tensor]) -> dict[int, int]:
        return await self._ask("load_state_dict", state_dict)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[int, int]:
        """Load weights into every replica; :meth:`aload_state_dict` for threads."""
        return blocking(self.aload_state_dict(state_dict))

    async def _ask(self, what: str, *args: Any) -> dict[int, Any]:
        """What each replica answers that lives."""
        if not self.is_alive:
            raise ServerClosedError("this server is not running; start it first")
        numbers = sorted(self._replicas)  # they are there in the order in which they were ready
        calls = [self._call(number, what, *args) for number in numbers]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        answers: dict[int, Any] = {}
        for number, outcome in zip(numbers, outcomes, strict=True):
            if isinstance(outcome, ServerDiedError):
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            answers[number] = outcome
        if not answers:
            raise ServerDiedError("all replicas have died")
        return answers

    async def _call(self, number: int, what: str, *args: Any) -> Any:
        replica = self._replicas.get(number)
        if replica is None:
            raise ServerDiedError(f"replica {number} has died")
        try:
            worked, answer = await self._answer_of(replica, what, *args)
        except Exception as error:
            self._lost(number, replica)
            reason = str(error) or type(error).__name__
            raise ServerDiedError(f"replica {number} has died: {reason}") from error
        if not worked:
            raise rebuilt(answer)
        return answer

    def _lost(self, number: int, replica: Any) -> None:
        """An actor has died, or gives no sign of life."""
        if self._replicas.get(number) is replica:
            self._replicas[number] = None  # some clusters end whoever calls a dead actor again

    async def _answer_of(self, replica: Any, what: str, *args: Any) -> Answer:
        """What it answers, however long that takes, as long as it shows that it lives."""
        # The call of an actor that was killed may never end. A start has a timeout of its own, and
        # building a policy may take all of a replica's attention.
        patience = None if what == "serve" else SILENCE_S
        asked = asyncio.ensure_future(self._send(replica, what, *args))
        try:
            while not (await asyncio.wait([asked], timeout=patience))[0]:
                try:
                    await asyncio.wait_for(self._send(replica, "ping"), SILENCE_S)
                except TimeoutError:
                    raise TimeoutError(f"it gave no sign of life for {SILENCE_S} s") from None
            return asked.result()
        finally:
            asked.cancel()

    # -- life ---------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self.is_alive:
            raise RuntimeError("this server is already running; close it before starting it again")
        within = asyncio.timeout(self._start_timeout)
        try:
            async with within:
                await self._open()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._end()
            if isinstance(error, TimeoutError) and within.expired():
                raise ServerDiedError(
                    f"the replicas were not ready within start_timeout={self._start_timeout} s"
                ) from None
            raise
        return self

    def start(self) -> Self:
        """Start the replicas and wait until all of them serve.

        Returns:
            The server itself.

        Raises:
            RuntimeError: it is already running.
            ServerDiedError: a replica ended, or they were not ready in time.
            Exception: what the policy factory raised; its ``__cause__`` shows where.
        """
        return blocking(self.__aenter__())

    async def aclose(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Close all replicas; harmless if it is closed.

        Args:
            timeout: seconds to drain; ``None`` for as long as the accepted requests take.
            drain: whether requests accepted so far are still answered.
        """
        if timeout is not None:
            timeout = arguments.duration("timeout", timeout)
        try:
            with contextlib.suppress(ServerClosedError, ServerDiedError, TimeoutError):
                async with asyncio.timeout(None if timeout is None else timeout + ANSWER_S):
                    await self._close_all(timeout, drain)
        finally:
            with anyio.CancelScope(shield=True):
                await self._end()

    async def _close_all(self, timeout: float | None, drain: bool) -> None:
        await self._ask("close", timeout, drain)

    def shutdown(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Close all replicas; :meth:`aclose` for threads."""
        blocking(self.aclose(timeout, drain=drain))


def blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread, and wait for it.

    Raises:
        RuntimeError: an event loop runs in this thread.
    """
    if running_loop() is not None:
        coroutine.close()
        raise RuntimeError(
            "called on an event loop, which this would block; await the method whose name begins "
            "with `a`, or use `async with`"
        )
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(coroutine)
