"""A server on a Monarch mesh: one replica per process, and clients that use all of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import torch

import aioinfer.arguments as arguments
from aioinfer.blocking import new_event_loop
from aioinfer.errors import ServerClosedError, ServerDiedError
from aioinfer.intake import running_loop
from aioinfer.process import rebuilt
from aioinfer.server import InferenceServer
from aioinfer.stats import ServerStats
from aioinfer.transports.endpoint import TlsFactory
from aioinfer.transports.monarch import MonarchTransport, require_monarch
from aioinfer.transports.remote import ConnectionKind
from aioinfer.transports.replicated import ReplicatedTransport

if TYPE_CHECKING:
    from aioinfer.client import InferenceClient, SyncInferenceClient

T = TypeVar("T")

_STOP_S = 10.0
"""Seconds that the processes have to end, once they have nothing left to do."""
_ANSWER_S = 1.0
"""Seconds beyond its own timeout that a replica has to say that it has closed."""


class MonarchInferenceServer:
    """Runs an :class:`InferenceServer` in each process of a mesh, and spreads clients over them.

    Use it as ``async with``, as ``with``, or through :meth:`start` and :meth:`shutdown`. Requests
    go to the least loaded of as few replicas as have room for them. Those of a replica that dies
    are answered by another one; a replica that has died is not replaced.

    Args:
        policy_factory: called in each process without arguments; returns the policy. It must be
            picklable. ``monarch.actor.current_rank()`` says which process it is.
        proc_mesh: the processes; they stay when the server is closed. ``None`` to start some on
            this host.
        per_host: how many, as ``spawn_procs(per_host=...)`` takes it; ``None`` for one. They end
            with the server.
        device: as of :class:`InferenceServer`, or a function of the replica's number, such as
            ``"cuda:{}".format``.
        room: rows that one replica has room for, before a second one is used too; ``None`` for
            what the replicas themselves find, from what their forwards cost.
        retry: whether requests of a replica that dies are sent to another one.
        connection: as of :class:`MonarchTransport`.
        host: as of :class:`MonarchTransport`.
        tls: as of :class:`MonarchTransport`.
        log_faults: as of :class:`MonarchTransport`.
        start_timeout: seconds in which all replicas must be ready.
        **options: what :class:`InferenceServer` takes besides.

    Raises:
        ImportError: Monarch is not installed.
    """

    def __init__(
        self,
        policy_factory: Callable[[], Any],
        proc_mesh: Any = None,
        *,
        per_host: Mapping[str, int] | None = None,
        device: Any = None,
        room: int | None = None,
        retry: bool = True,
        connection: ConnectionKind = "auto",
        host: str | None = None,
        tls: TlsFactory | None = None,
        log_faults: bool = True,
        start_timeout: float = 120.0,
        **options: Any,
    ) -> None:
        if not callable(policy_factory):
            raise TypeError(f"policy_factory must be callable, got {policy_factory!r}")
        if proc_mesh is not None and per_host is not None:
            raise ValueError(f"per_host={per_host!r} is for when no proc_mesh is given")
        require_monarch(type(self).__name__)
        if not callable(device):
            arguments.device("device", device)
        InferenceServer(_nothing, **options)  # refuses a wrong option here and now
        self._factory = policy_factory
        self._procs = proc_mesh
        self._per_host = {"replicas": 1} if per_host is None else dict(per_host)
        self._own_procs = proc_mesh is None
        self._device = device
        self._options = options
        self._start_timeout = arguments.duration("start_timeout", start_timeout)
        if proc_mesh is None:
            count = math.prod(arguments.count("per_host", n) for n in self._per_host.values())
        else:
            count = proc_mesh.size()
        self._transports = [
            MonarchTransport(connection, host=host, tls=tls, log_faults=log_faults)
            for _ in range(count)
        ]
        self._replicas: list[Any] = []
        self._transport = ReplicatedTransport(
            dict(enumerate(self._transports)), room=room, retry=retry
        )

    # -- clients ------------------------------------------------------------

    @property
    def transport(self) -> ReplicatedTransport:
        """The link to all replicas; it can be sent to actors, before or after the start."""
        return self._transport

    def client(self) -> InferenceClient | SyncInferenceClient:
        """Return a new client for coroutines."""
        return self._transport.client()

    def async_client(self) -> InferenceClient:
        """Return a new client for coroutines."""
        return self._transport.async_client()

    def sync_client(self) -> SyncInferenceClient:
        """Return a new client for threads."""
        return self._transport.sync_client()

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
        return _blocking(self.astats(reset=reset))

    async def aload_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[int, int]:
        """Load weights into every replica that lives, between two batches.

        Args:
            state_dict: as the policy's own ``load_state_dict`` takes it.

        Returns:
            The version of each replica's policy from now on.

        Raises:
            RuntimeError: the policy does not take them.
            ServerClosedError: the server is not running.
            ServerDiedError: all replicas have died.
        """
        return await self._ask("load_state_dict", dict(state_dict))

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[int, int]:
        """Load weights into every replica; :meth:`aload_state_dict` for threads."""
        return _blocking(self.aload_state_dict(state_dict))

    async def _ask(self, what: str, *args: Any) -> dict[int, Any]:
        """What each replica answers that lives."""
        if not self._replicas:
            raise ServerClosedError("this server is not running; start it first")
        calls = [self._call(number, what, *args) for number in range(len(self._replicas))]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        answers: dict[int, Any] = {}
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ServerDiedError):
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            answers[number] = outcome
        if not answers:
            raise ServerDiedError("all replicas have died")
        return answers

    async def _call(self, number: int, what: str, *args: Any) -> Any:
        replica = self._replicas[number]
        if replica is None:
            raise ServerDiedError(f"replica {number} has died")
        try:
            worked, answer = await replica.ask.call_one(what, *args)
        except Exception as error:
            self._replicas[number] = None  # whoever calls a dead actor again is ended by Monarch
            raise ServerDiedError(f"replica {number} has died: {error}") from error
        if not worked:
            raise rebuilt(answer)
        return answer

    # -- life ---------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._replicas:
            raise RuntimeError("this server is already running; close it before starting it again")
        actor = importlib.import_module("monarch.actor")
        replica = importlib.import_module("aioinfer.monarch_replica").Replica
        if self._own_procs:
            self._procs = actor.this_host().spawn_procs(per_host=self._per_host)
        procs = self._procs.flatten("replica")
        self._replicas = [
            procs.slice(replica=number).spawn("aioinfer_replica", replica)
            for number in range(len(self._transports))
        ]
        try:
            async with asyncio.timeout(self._start_timeout):
                calls = [self._serve(number) for number in range(len(self._replicas))]
                await asyncio.gather(*calls)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._end()
            if isinstance(error, TimeoutError):
                raise ServerDiedError(
                    f"the replicas were not ready within start_timeout={self._start_timeout} s"
                ) from None
            raise
        return self

    async def _serve(self, number: int) -> None:
        device = self._device(number) if callable(self._device) else self._device
        options = {"device": device, **self._options}
        await self._call(number, "serve", self._factory, self._transports[number], options)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

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
                async with asyncio.timeout(None if timeout is None else timeout + _ANSWER_S):
                    await self._ask("close", timeout, drain)
        finally:
            with anyio.CancelScope(shield=True):
                await self._end()

    async def _end(self) -> None:
        replicas, self._replicas = self._replicas, []
        with contextlib.suppress(Exception):  # they have ended already
            async with asyncio.timeout(_STOP_S):
                if self._own_procs and replicas:
                    await self._procs.stop()
                else:
                    for replica in replicas:
                        if replica is not None:
                            await replica.stop()
        if self._own_procs:
            self._procs = None

    def start(self) -> Self:
        """Start the replicas and wait until all of them serve.

        Returns:
            The server itself.

        Raises:
            RuntimeError: it is already running.
            ServerDiedError: a replica ended, or they were not ready in time.
            Exception: what the policy factory raised; its ``__cause__`` shows where.
        """
        return _blocking(self.__aenter__())

    def shutdown(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Close all replicas; :meth:`aclose` for threads."""
        _blocking(self.aclose(timeout, drain=drain))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()


def _nothing(td: Any) -> Any:
    return td


def _blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    if running_loop() is not None:
        coroutine.close()
        raise RuntimeError(
            "called on an event loop, which this would block; await the method whose name begins "
            "with `a`, or use `async with`"
        )
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(coroutine)
