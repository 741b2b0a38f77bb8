"""What the links to actors of a cluster share: a direct connection where one can be made.

The cluster brings server and clients together and, where they cannot connect to each other,
carries their calls. Which cluster that is, is up to subclasses.
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
from typing import Any, Literal, NamedTuple, get_args

from aioinfer.errors import InferenceError, ServerDiedError
from aioinfer.intake import Intake
from aioinfer.request import Request, Source
from aioinfer.transports import direct
from aioinfer.transports.channel import OnLoop
from aioinfer.transports.channeled import ChannelTransport
from aioinfer.transports.direct import Carrier, PendingChannel
from aioinfer.transports.endpoint import Endpoint, TlsFactory, new_secret
from aioinfer.transports.listener import Listener
from aioinfer.transports.rpc import Exchange, RpcCarrier, RpcHub
from aioinfer.transports.sockets import RemoteWaiter, ThreadChannel

ConnectionKind = Literal["auto", "direct", "rpc"]


class Found(NamedTuple):
    """A server that runs, as its clients find it."""

    server: Any
    """Equal for the same server, and different for the next one."""
    address: tuple[str, int] | None
    """Where it listens; ``None`` if it does not."""
    exchange: Exchange | None
    """How to call it; ``None`` if that is not possible."""


class RemoteTransport(ChannelTransport):
    """A link to the actors of a cluster.

    It can be pickled, and so can its clients, before or after the server starts.

    Args:
        connection: ``"direct"`` for a TCP connection of each event loop and each thread to the
            server, ``"rpc"`` for calls through the cluster, in which what is asked at the same
            time travels together; ``"auto"`` for the first, and the second where it cannot be
            made.
        host: the address at which the server listens, and at which the actors reach it. ``None``
            for the one by which the cluster knows the server's host.
        port: the port it listens at; 0 for any that is free.
        tls: makes the TLS context of each side; ``None`` for no TLS. It is called with
            ``ssl.Purpose.CLIENT_AUTH`` in the server's process and with
            ``ssl.Purpose.SERVER_AUTH`` in its clients', and must be picklable.
    """

    def __init__(
        self,
        connection: ConnectionKind = "auto",
        *,
        host: str | None = None,
        port: int = 0,
        tls: TlsFactory | None = None,
    ) -> None:
        kinds = get_args(ConnectionKind)
        if connection not in kinds:
            raise ValueError(f"connection must be one of {kinds}, got {connection!r}")
        if host is not None and not isinstance(host, str):
            raise TypeError(f"host must be a str or None, got {host!r}")
        if isinstance(port, bool) or not isinstance(port, int):
            raise TypeError(f"port must be an int, got {port!r}")
        if not 0 <= port < 1 << 16:
            raise ValueError(f"port must be between 0 and 65535, got {port}")
        if tls is not None and not callable(tls):
            raise TypeError(
                f"tls must be a function that makes an ssl.SSLContext, or None, got {tls!r}"
            )
        self._connection = connection
        self._secret = new_secret()
        self._host, self._port, self._tls = host, port, tls
        self._start()

    def _start(self) -> None:
        """Begin, here or where it was sent to."""
        super().__init__()
        self._listener: Listener | None = None
        self._hub: RpcHub | None = None
        self._unreachable: Any = None
        """The server that was found to be so, from this process."""

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("_connection", "_secret", "_host", "_port", "_tls")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # -- what the cluster does ----------------------------------------------

    @abc.abstractmethod
    def _host_of_this_process(self) -> str:
        """The address by which the cluster knows this host."""

    @abc.abstractmethod
    async def _publish(self, address: tuple[str, int] | None, hub: RpcHub | None) -> None:
        """Let clients find the server of this process; on its event loop.

        Args:
            address: where it listens, if it does.
            hub: takes the calls of clients; ``None`` if none are to be made.

        Raises:
            RuntimeError: the transport serves a server in another process.
        """

    @abc.abstractmethod
    async def _withdraw(self) -> None:
        """Let nobody find it any more; on its event loop. The hub is closed."""

    @abc.abstractmethod
    async def _find(self) -> Found:
        """Find the server, from any event loop of any process.

        Raises:
            ServerClosedError: there is none.
            ServerDiedError: the cluster cannot say.
        """

    # -- used by clients ----------------------------------------------------

    def _new_loop_channel(self, loop: asyncio.AbstractEventLoop) -> OnLoop:
        return PendingChannel(loop, self._connect)

    async def _ready_channel(self, loop: asyncio.AbstractEventLoop) -> OnLoop:
        channel = self._loop_channel(loop)
        assert isinstance(channel, PendingChannel)
        await channel.ready()
        return channel

    async def _connect(self, channel: PendingChannel) -> Carrier:
        found = await self._find()
        while (endpoint := self._direct(found)) is not None:
            try:
                return await direct.connect(endpoint, channel)
            except OSError as error:  # TimeoutError is one
                found = await self._not_reached(endpoint, found, error)
        return await self._call(channel, found)

    async def _call(self, channel: PendingChannel, found: Found) -> RpcCarrier:
        """Carry a channel in calls."""
        if found.exchange is None:
            raise ServerDiedError(
                "the server takes direct connections only, and this transport makes none"
            )
        return await RpcCarrier(channel, found.exchange).open()

    def _new_thread_channel(self) -> ThreadChannel:
        background = self._background_loop()
        found = background.call(self._find)
        while (endpoint := self._direct(found)) is not None:
            try:
                return direct.connect_thread(endpoint)
            except OSError as error:
                found = background.call(self._not_reached, endpoint, found, error)
        borrowed: Any = _Borrowed(self)
        channel: ThreadChannel = borrowed
        return channel

    def _direct(self, found: Found) -> Endpoint | None:
        """Where to connect to; ``None`` to call instead."""
        if self._connection == "rpc" or found.address is None:
            return None
        if found.server == self._unreachable and found.exchange is not None:
            return None
        return Endpoint(*found.address, self._secret, self._tls)

    async def _not_reached(self, endpoint: Endpoint, found: Found, why: OSError) -> Found:
        """What to try next."""
        again = await self._find()
        if again.server != found.server:  # it was closed and another one started
            return again
        if self._connection == "direct" or found.exchange is None:
            reason = str(why) or type(why).__name__
            raise ServerDiedError(f"the server at {endpoint} cannot be reached: {reason}") from why
        self._unreachable = found.server
        return found

    # -- used by the server -------------------------------------------------

    async def attach(self, intake: Intake) -> None:
        if self._intake is not None and not self._intake.loop.is_closed():
            raise RuntimeError(
                f"this {type(self).__name__} already serves a server; "
                "a transport serves one server at a time"
            )
        if self._listener is not None:  # of a loop that was closed under its server
            self._listener.forget()
        address = None
        self._hub = None if self._connection == "direct" else RpcHub(intake)
        self._listener = None
        if self._connection != "rpc":
            host = self._host_of_this_process() if self._host is None else self._host
            self._listener = Listener(
                intake, self._secret, host=host, port=self._port, tls=self._tls
            )
            endpoint = await self._listener.open()
            address = endpoint.host, endpoint.port
        self._intake = intake
        try:
            await self._publish(address, self._hub)
        except BaseException:
            self._intake = None
            await self._close()
            raise

    async def detach(self) -> None:
        if self._intake is not None:
            self._intake = None
            await self._close()

    async def _close(self) -> None:
        if self._hub is not None:
            await self._hub.close()
        try:
            await self._withdraw()
        finally:
            if self._listener is not None:
                await self._listener.close()
            self._hub = self._listener = None


class _Borrowed:
    """The conversation of a thread, held by the channel of the background loop."""

    def __init__(self, transport: RemoteTransport) -> None:
        self._transport = transport
        self._background = transport._background_loop()
        self._channel: OnLoop | None = None
        self._answer: concurrent.futures.Future[Any]

    @property
    def gone(self) -> InferenceError | None:
        return None if self._channel is None else self._channel.gone

    def exchange(self, td: Any, source: Source) -> Any:
        return None

    def send(self, request: Request, *, block: bool) -> None:
        waiter: RemoteWaiter = request.handle
        request.handle = self._answer = concurrent.futures.Future()
        waiter.channel = self  # type: ignore[assignment]

        async def send() -> None:
            self._channel = await self._transport._ready_channel(self._background.loop)
            self._channel.send(request, block=block)

        self._background.call(send)

    def wait(self, waiter: RemoteWaiter, timeout: float | None) -> bool:
        answer = self._answer
        if not concurrent.futures.wait([answer], timeout).done:
            return False
        error = answer.exception()
        if error is None:
            waiter.set_result(answer.result())
        else:
            waiter.set_exception(error)
        return True

    def look(self) -> None:
        """What comes is taken by the background loop."""

    def leave(self, source: Source) -> None:
        """Its clients are those of the background loop's channel."""

    def forget(self) -> None:
        """The background loop's channel is forgotten of itself."""
