"""A server in a process of its own: actors, trainer and policy do not share one interpreter."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Self

import anyio
import anyio.to_thread
import torch

import aioinfer.arguments as arguments
from aioinfer.clock import MonotonicClock
from aioinfer.errors import ServerClosedError, ServerDiedError
from aioinfer.hosting.base import ANSWER_S, HostedServer, check, rebuilt
from aioinfer.hosting.process_child import READY, send, serve
from aioinfer.stats import ServerStats
from aioinfer.transports.mp import MPTransport

_clock = MonotonicClock()

_JOIN_S = 5.0
"""Seconds that a process has to end, once it has nothing left to do."""


class ProcessInferenceServer(HostedServer):
    """Runs an :class:`InferenceServer` in a child process, which builds the policy itself.

    Use it as ``with``, as ``async with``, or through :meth:`start` and :meth:`shutdown`. It can
    be started again. The child ends with this process, however that ends, and leaves Ctrl-C to
    it.

    Args:
        policy_factory: called in the child without arguments; returns the policy. It must be
            picklable unless the start method is fork.
        transport: the link that is served; ``None`` for a new :class:`MPTransport`.
        ctx: the multiprocessing context the child is made with. ``None`` for the transport's or,
            if that has none either, for spawn, as forking a process that has used torch's
            threads is not safe.
        start_timeout: seconds in which the child must be ready.
        **options: what :class:`InferenceServer` takes besides; ``own_loop`` is true unless given.
    """

    def __init__(
        self,
        policy_factory: Callable[[], Any],
        transport: MPTransport | None = None,
        *,
        ctx: Any = None,
        start_timeout: float = 120.0,
        **options: Any,
    ) -> None:
        if transport is not None and not isinstance(transport, MPTransport):
            raise TypeError(f"transport must be an MPTransport or None, got {transport!r}")
        check(policy_factory, options)
        self._factory = policy_factory
        self._transport = MPTransport() if transport is None else transport
        self._ctx: Any = ctx or self._transport.ctx or multiprocessing.get_context("spawn")
        self._start_timeout = arguments.duration("start_timeout", start_timeout)
        self._options = options
        self._process: Any = None
        self._control: Connection | None = None
        self._ended = -1  # readable once the child has ended
        self._questions = itertools.count(READY + 1)
        self._lock = threading.RLock()  # one question at a time

    # -- clients ------------------------------------------------------------

    @property
    def transport(self) -> MPTransport:
        """The link that is served."""
        return self._transport

    # -- questions ----------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The child's process id; ``None`` while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the child runs."""
        return self._process is not None and self._process.is_alive()

    @property
    def policy_version(self) -> int:
        """The version that serves now."""
        version: int = self._ask("policy_version")
        return version

    def stats(self, *, reset: bool = False) -> ServerStats:
        """Return what the server did, as :meth:`InferenceServer.stats` does.

        Raises:
            ServerClosedError: it is not running.
            ServerDiedError: the process has ended; the message says how.
        """
        stats: ServerStats = self._ask("stats", reset)
        return stats

    async def astats(self, *, reset: bool = False) -> ServerStats:
        """Return what the server did; the awaitable :meth:`stats`."""
        return await anyio.to_thread.run_sync(lambda: self.stats(reset=reset))

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> int:
        """Load weights between two batches, and wait until that is done.

        Args:
            state_dict: as the policy's own ``load_state_dict`` takes it.

        Returns:
            The policy's version from now on.

        Raises:
            RuntimeError: the policy does not take them.
            ServerClosedError: the server is not running.
            ServerDiedError: the process has ended; the message says how.
        """
        version: int = self._ask("load_state_dict", dict(state_dict))
        return version

    async def aload_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> int:
        """Load weights between two batches; the awaitable :meth:`load_state_dict`."""
        return await anyio.to_thread.run_sync(self.load_state_dict, state_dict)

    def _ask(self, what: str, *args: Any, within: float | None = None) -> Any:
        """The child's answer; :class:`TimeoutError` if there is none ``within`` seconds."""
        with self._lock:
            control = self._control
            if control is None:
                raise ServerClosedError("this server is not running; start it first")
            question = next(self._questions)
            try:
                send(control, (question, what, args))
                found = self._answer_to(question, control, within)
            except (EOFError, OSError) as error:
                raise self._died() from error
        if found is None:
            raise TimeoutError(f"the server's process did not answer within {within} s")
        worked, answer = found
        if not worked:
            raise rebuilt(answer)
        return answer

    def _answer_to(
        self, question: int, control: Connection, within: float | None
    ) -> tuple[bool, Any] | None:
        """Whether it worked, and what the child answers; ``None`` if it did not in time.

        Raises:
            EOFError: the child has ended.
        """
        until = None if within is None else _clock() + within
        while True:
            left = None if until is None else max(0.0, until - _clock())
            ready = connection.wait([control, self._ended], left)
            if not ready:
                return None
            if control not in ready:
                raise EOFError
            answered, worked, answer = pickle.loads(control.recv_bytes())
            if answered == question:  # else the answer to who was interrupted, or out of time
                return worked, answer

    def _died(self) -> ServerDiedError:
        process = self._process
        process.join(_JOIN_S)
        return ServerDiedError(f"the server's process {process.pid} {_end_of(process.exitcode)}")

    # -- life ---------------------------------------------------------------

    def start(self) -> Self:
        """Start the process and wait until it serves.

        Returns:
            The server itself.

        Raises:
            RuntimeError: it is already running.
            ServerDiedError: the process ended, or was not ready in time.
            Exception: what the policy factory raised; its ``__cause__`` shows where.
        """
        with self._lock:
            if self.is_alive:
                raise RuntimeError(
                    "this server is already running; close it before starting it again"
                )
            self._forget()
            ours, theirs = self._ctx.Pipe()
            process = self._ctx.Process(
                target=serve,
                args=(theirs, os.getpid(), self._factory, self._transport, self._options),
                name="ProcessInferenceServer",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._process, self._control = process, ours
            self._ended = _end_descriptor(process)
            answered = False
            try:
                found = self._answer_to(READY, ours, self._start_timeout)
                if found is None:
                    raise ServerDiedError(
                        f"the server's process was not ready within start_timeout="
                        f"{self._start_timeout} s"
                    )
                worked, answer = found
                answered = True
                if not worked:
                    raise rebuilt(answer)
            except BaseException as error:
                died = isinstance(error, EOFError | OSError)
                failure = self._died() if died else error
                if not died and not answered:  # too late, or Ctrl-C: it has nothing to finish
                    process.kill()
                self._forget()
                raise failure from (error if died else error.__cause__)
        return self

    def shutdown(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Close the server and end its process; harmless if it is closed.

        Args:
            timeout: seconds to drain; ``None`` for as long as the accepted requests take, and,
                if the process is stopped (SIGSTOP), until it is continued.
            drain: whether requests accepted so far are still answered.
        """
        if timeout is not None:
            timeout = arguments.duration("timeout", timeout)
        with self._lock:
            try:
                if self._control is not None:
                    # A child that is stopped, or stuck in a forward, does not even answer.
                    within = None if timeout is None else timeout + ANSWER_S
                    with contextlib.suppress(ServerDiedError, TimeoutError):
                        self._ask("close", timeout, drain, within=within)
            finally:
                self._forget()

    def _forget(self) -> None:
        """End the process, if it has not ended, and let go of it."""
        control, self._control = self._control, None
        if control is not None:
            control.close()
        process, self._process = self._process, None
        if process is None:
            return
        process.join(_JOIN_S)
        if process.is_alive():
            process.kill()
            process.join()
        if self._ended != process.sentinel:
            os.close(self._ended)
        self._ended = -1
        process.close()

    async def aclose(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Close the server and end its process; the awaitable :meth:`shutdown`."""
        await anyio.to_thread.run_sync(lambda: self.shutdown(timeout, drain=drain))

    async def __aenter__(self) -> Self:
        try:
            return await anyio.to_thread.run_sync(self.start, abandon_on_cancel=True)
        except anyio.get_cancelled_exc_class():
            process = self._process
            if process is not None:
                process.kill()  # so that start() ends at once
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise


def _end_of(code: int | None) -> str:
    if code is None:
        return "does not answer"
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by signal {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _end_descriptor(process: Any) -> int:
    """What is readable once the process has ended."""
    # The sentinel of a forked process, like the pipe to it, may have been inherited by another
    # one that a thread forked at the wrong moment; then it stays open for as long as that lives.
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(ProcessLookupError):
            return os.pidfd_open(process.pid)
    sentinel: int = process.sentinel
    return sentinel
