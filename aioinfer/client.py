"""The actor's end: clients for coroutines and for threads.

A client checks and describes the request, stamps its deadline, and leaves the way to the
server to its transport. It owns what its caller waits on: the transport resolves that once,
and a caller that stops waiting says so, so that nothing is computed for it in vain.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from tensordict.nn import InteractionType

import aioinfer.arguments as arguments
from aioinfer.errors import ServerClosedError
from aioinfer.request import GivenUp, Request, Source
from aioinfer.seeding import Stream
from aioinfer.signature import describe

if TYPE_CHECKING:
    from aioinfer.transports.base import InferenceTransport


class _Client:
    """What both kinds of client share."""

    _competes = False

    def __init__(self, transport: InferenceTransport) -> None:
        self._transport = transport
        self._send = transport.send
        self._exchange = transport.exchange
        self._source = Source(competes=self._competes and transport.in_process)
        self._stream: Stream | None = None
        transport.join(self._source)
        # The batcher waits for clients that may still ask; one that is gone will not.
        self._finalizer = weakref.finalize(self, _leave, transport, self._source)
        self._finalizer.atexit = False

    def __reduce__(self) -> Any:
        return _again, (type(self), self._transport, self._stream)

    def set_seed(self, seed: int | Sequence[int] | None) -> None:
        """Make what the policy samples for this client reproducible.

        From now on the random numbers of its k-th request, row by row, depend on ``seed`` and k
        alone, and not on what else is in the batch (see :doc:`/reproducibility`). Give every
        client a seed of its own, and let one actor at a time use it.

        Args:
            seed: an int, or several, such as ``(run, actor)``; ``None`` draws from torch's own
                generators again.

        Raises:
            TypeError: ``seed`` is something else.
        """
        self._stream = None if seed is None else Stream(seed)

    def close(self) -> None:
        """Say that this client will not ask again, so that no batch waits for it.

        Dropping the last reference does the same. Calling a closed client still works.
        """
        self._finalizer()

    def _request(
        self,
        td: TensorDictBase,
        timeout: float | None,
        priority: int,
        interaction_type: InteractionType | str | None,
        handle: Any,
    ) -> Request:
        mode = None if interaction_type is None else arguments.mode(interaction_type)
        if self._stream is not None:
            td = self._stream.attach(td)
        data, rows, batched, signature = describe(td, mode)
        if timeout is not None:
            timeout = arguments.duration("timeout", timeout)
        if priority:
            arguments.priority(priority)
        return Request(data, rows, batched, signature, timeout, priority, self._source, handle)


class InferenceClient(_Client):
    """Sends requests from coroutines: ``await client(td)``.

    Get one from :meth:`InferenceServer.client` or from a transport. A client may be shared
    by many coroutines and have many requests in flight.

    Args:
        transport: the link to the server.
    """

    async def __call__(
        self,
        td: TensorDictBase,
        *,
        timeout: float | None = None,
        priority: int = 0,
        interaction_type: InteractionType | str | None = None,
    ) -> TensorDictBase:
        """Send one request and await its answer. Cancelling the await withdraws the request.

        Args:
            td: batch size ``[]`` (one row) or ``[K]`` (K rows). Its tensors must not be
                written to until the answer is here.
            timeout: seconds from now until :class:`TimeoutError`; ``None`` waits for ever.
            priority: larger is served sooner.
            interaction_type: the sampling mode of the forward, e.g. ``"deterministic"``;
                ``None`` leaves it to the policy.

        Returns:
            The policy's output for these rows, with the request's own batch size.

        Raises:
            TimeoutError: no answer in time.
            InvalidRequestError: the request cannot be served.
            ModelError: the policy failed on it.
            ServerClosedError: no server is running.
            ServerDiedError: the server went away.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[TensorDictBase] = loop.create_future()
        request = self._request(td, timeout, priority, interaction_type, future)
        self._send(request, loop)
        if timeout is not None:
            return await self._within(request, loop, timeout)
        try:
            return await future
        except asyncio.CancelledError:
            self._transport.give_up(request, GivenUp.CANCELLED)
            raise

    def submit(
        self,
        td: TensorDictBase,
        *,
        timeout: float | None = None,
        priority: int = 0,
        interaction_type: InteractionType | str | None = None,
        block: bool = True,
    ) -> asyncio.Future[TensorDictBase]:
        """Send one request and return a future of its answer, without waiting.

        Cancelling the future withdraws the request. See :meth:`__call__` for the arguments.

        Args:
            block: where the queue is full, true lets the request wait for room (it counts
                against nobody's memory but the caller's own), false refuses it.

        Raises:
            QueueFullError: the queue is full and ``block`` is false.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[TensorDictBase] = loop.create_future()
        request = self._request(td, timeout, priority, interaction_type, future)
        self._send(request, loop, block=block)
        timer = None if timeout is None else self._arm(request, loop, timeout)

        def settled(future: asyncio.Future[TensorDictBase]) -> None:
            if timer is not None:
                timer.cancel()
            if future.cancelled():
                self._transport.give_up(request, GivenUp.CANCELLED)

        future.add_done_callback(settled)
        return future

    async def _within(
        self, request: Request, loop: asyncio.AbstractEventLoop, timeout: float
    ) -> TensorDictBase:
        timer = self._arm(request, loop, timeout)
        future: asyncio.Future[TensorDictBase] = request.handle
        try:
            return await future
        except asyncio.CancelledError:
            self._transport.give_up(request, GivenUp.CANCELLED)
            raise
        finally:
            timer.cancel()

    def _arm(self, request: Request, loop: asyncio.AbstractEventLoop, timeout: float) -> Any:
        def expire() -> None:
            if not request.handle.done():
                request.handle.set_exception(_late(timeout))
                self._transport.give_up(request, GivenUp.TIMED_OUT)

        assert request.deadline is not None
        return self._transport.clock.call_at(loop, request.deadline, expire)


class SyncInferenceClient(_Client):
    """Sends requests from threads: ``client(td)`` blocks the calling thread only.

    One client may be shared by many threads. Never call it from a coroutine: it would block
    that coroutine's event loop.

    Args:
        transport: the link to the server.
    """

    _competes = True

    def __call__(
        self,
        td: TensorDictBase,
        *,
        timeout: float | None = None,
        priority: int = 0,
        interaction_type: InteractionType | str | None = None,
    ) -> TensorDictBase:
        """Send one request and wait for its answer.

        Arguments, result and errors are those of :meth:`InferenceClient.__call__`.
        """
        exchange = self._exchange
        if exchange and timeout is None and not priority and interaction_type is None:
            answer: TensorDictBase | None = exchange(td, self._source)
            if answer is not None:
                return answer
        waiter = self._transport.waiter()
        request = self._request(td, timeout, priority, interaction_type, waiter)
        self._send(request, None)
        try:
            answered = waiter.wait(timeout)
        except BaseException:  # KeyboardInterrupt
            self._transport.give_up(request, GivenUp.CANCELLED)
            raise
        if not answered:
            assert timeout is not None
            self._transport.give_up(request, GivenUp.TIMED_OUT)
            raise _late(timeout)
        answer = waiter.result()
        return answer

    def submit(
        self,
        td: TensorDictBase,
        *,
        timeout: float | None = None,
        priority: int = 0,
        interaction_type: InteractionType | str | None = None,
        block: bool = True,
    ) -> concurrent.futures.Future[TensorDictBase]:
        """Send one request and return a future of its answer.

        Cancelling the future withdraws the request. See :meth:`__call__` for the arguments.

        Args:
            block: where the queue is full, true waits for room, false refuses the request.

        Raises:
            QueueFullError: the queue is full and ``block`` is false.
            TimeoutError: ``timeout`` passed while waiting for room.
        """
        future: concurrent.futures.Future[TensorDictBase] = concurrent.futures.Future()
        request = self._request(td, timeout, priority, interaction_type, future)
        if block:
            before = self._transport.clock()
            if not self._transport.wait_for_room(request.rows, timeout):
                assert timeout is not None
                raise _late(timeout)
            if timeout is not None:
                request.timeout = max(0.0, timeout - (self._transport.clock() - before))
        self._send(request, None, block=block)
        timer = None if timeout is None else self._arm(request, timeout)

        def settled(future: concurrent.futures.Future[TensorDictBase]) -> None:
            if timer is not None:
                timer.cancel()
            if future.cancelled():
                self._transport.give_up(request, GivenUp.CANCELLED)

        future.add_done_callback(settled)
        return future

    def _arm(self, request: Request, timeout: float) -> Any:
        def expire() -> None:
            try:
                request.handle.set_exception(_late(timeout))
            except concurrent.futures.InvalidStateError:
                return
            self._transport.give_up(request, GivenUp.TIMED_OUT)

        assert request.deadline is not None
        try:
            return self._transport.call_at(request.deadline, expire)
        except ServerClosedError:  # closing; the request is answered before it ends
            return None


def _again(kind: type[_Client], transport: InferenceTransport, stream: Stream | None) -> _Client:
    client = kind(transport)
    client._stream = stream
    return client


def _leave(transport: InferenceTransport, source: Source) -> None:
    source.closed = True
    transport.leave(source)


def _late(timeout: float) -> TimeoutError:
    return TimeoutError(f"no answer within timeout={timeout} s of the submission")
