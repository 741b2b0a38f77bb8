"""The link for actors and servers on Monarch meshes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import logging
import os
import re
import secrets
import sys
from typing import Any

import aioinfer.arguments as arguments
from aioinfer.errors import ServerDiedError
from aioinfer.transports.channel import no_server
from aioinfer.transports.direct import PendingChannel
from aioinfer.transports.endpoint import TlsFactory
from aioinfer.transports.remote import ConnectionKind, Found, RemoteTransport
from aioinfer.transports.rpc import RpcCarrier, RpcHub

_log = logging.getLogger("aioinfer")

SETTINGS = {
    "HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY": "100ms",
    "HYPERACTOR_MESH_GET_ACTOR_STATE_MAX_IDLE": "1s",
}
"""What Monarch reads from the environment when it is first imported, and with which the end of a
process is noticed within a second, where it takes ten by default."""

MEETING_TIMEOUT_S = 30.0
"""Seconds in which the process in which a transport was made must say where its server is."""

_late = "monarch" in sys.modules and not SETTINGS.keys() <= os.environ.keys()
# The actors of this program inherit them, even if it has itself imported Monarch before.
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)


class MonarchTransport(RemoteTransport):
    """Serves Monarch actors, and the program that drives them, on one host or many.

    Transport and clients can be sent to actors, before or after the server starts. The server may
    run in the driver or in an actor, on any event loop. Requests travel on a direct connection to
    it, which is authenticated by a secret in the handle; see :doc:`/monarch`.

    Create it once, in an actor or driver that outlives its use: there server and clients find
    each other.

    Args:
        connection: ``"direct"`` for a TCP connection of each event loop and each thread to the
            server, ``"rpc"`` for calls of Monarch endpoints, in which what is asked at the same
            time travels together; ``"auto"`` for the first, and the second where it cannot be
            made.
        host: the address at which the server listens, and at which the actors reach it. ``None``
            for loopback where Monarch itself stays on the host, and otherwise for the address by
            which Monarch knows the server's process.
        port: the port it listens at; 0 for any that is free.
        tls: makes the TLS context of each side; ``None`` for no TLS. It is called with
            ``ssl.Purpose.CLIENT_AUTH`` in the server's process and with
            ``ssl.Purpose.SERVER_AUTH`` in its clients', and must be picklable.
        log_faults: whether a fault that reaches this program, such as an actor that was killed,
            is logged. Monarch ends the program otherwise, by a :class:`KeyboardInterrupt`, unless
            it has set ``monarch.actor.unhandled_fault_hook`` itself.

    Raises:
        ImportError: Monarch is not installed.
    """

    def __init__(
        self,
        connection: ConnectionKind = "auto",
        *,
        host: str | None = None,
        port: int = 0,
        tls: TlsFactory | None = None,
        log_faults: bool = True,
    ) -> None:
        arguments.flag("log_faults", log_faults)
        require_monarch(type(self).__name__)
        super().__init__(connection, host=host, port=port, tls=tls)
        self._key = secrets.token_bytes(16)
        desks, office = _desks(), self._office()
        self._meeting = self._place()
        # It must be done before this process ends, or nobody will hear of that.
        office.later(desks.desk, office, self._meeting)
        desks.vacate(self._key)
        if log_faults:
            _log_faults()

    def _start(self) -> None:
        super()._start()
        self._announced: Any = None
        self._withdrawal: asyncio.Future[Any] | None = None
        # Of the actor that this was made in or sent to: threads have no context of their own.
        self._home = contextvars.copy_context()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_key": self._key, "_meeting": self._meeting}

    def _office(self) -> Any:
        return _posts().office(self._home)

    def _place(self) -> Any:
        return _posts().place(self._home)

    async def _desk(self, office: Any) -> Any:
        return await _desks().desk(office, self._place())

    async def _ask(
        self, office: Any, endpoint: str, *args: Any, timeout: float | None = MEETING_TIMEOUT_S
    ) -> Any:
        """Call the desk of whoever made this.

        Raises:
            ServerDiedError: it has gone.
        """
        try:
            async with asyncio.timeout(timeout):
                meeting = await _desks().desk(office, self._meeting)
                return await office.call(meeting, endpoint, *args)
        except Exception as error:
            raise ServerDiedError(
                "the actor by which server and clients find each other has gone; who made "
                f"this {type(self).__name__} must outlive its use"
            ) from error

    def _host_of_this_process(self) -> str:
        context = importlib.import_module("monarch.actor").context
        return _host_in(str(self._home.copy().run(context).actor_instance.proc_id))

    async def _publish(self, address: tuple[str, int] | None, hub: RpcHub | None) -> None:
        desks, office = _desks(), self._office()
        await self._withdraw()  # of a loop that was closed under its server
        name = secrets.token_bytes(16)
        server = desks.Announced(name, address, await self._desk(office), hub is not None)
        desks.alive.add(name)
        if hub is not None:
            desks.hubs[name] = hub
        try:
            if self._key in desks.meetings:
                may = await desks.announce(office, self._key, server)
            else:
                may = await self._ask(office, "announce", self._key, server)
        except BaseException:
            desks.forget(name)
            raise
        if not may:
            desks.forget(name)
            raise RuntimeError(
                f"this {type(self).__name__} already serves a server, in another process; "
                "a transport serves one server at a time"
            )
        self._announced = server, office

    async def _withdraw(self) -> None:
        if self._announced is None:
            return
        desks = _desks()
        (server, office), self._announced = self._announced, None
        desks.forget(server.name)
        # Nothing is waited for yet: if an actor is stopped, its loop may not come back to this.
        if self._key in desks.meetings:
            desks.withdraw(self._key, server.name)
        else:
            withdrawal = self._ask(office, "withdraw", self._key, server.name)
            self._withdrawal = asyncio.ensure_future(withdrawal)

    async def _close(self) -> None:
        await super()._close()
        withdrawal, self._withdrawal = self._withdrawal, None
        if withdrawal is not None:
            with contextlib.suppress(Exception):  # the meeting point has gone, and everybody knows
                await withdrawal

    async def _find(self) -> Found:
        desks, office = _desks(), self._office()
        if self._key in desks.meetings:
            server = desks.meetings[self._key]
        else:
            server = await self._ask(office, "find", self._key)
        if server is None:
            raise no_server()
        exchange = desks.Exchanger(office, server) if server.callable else None
        return Found(server.name, server.address, exchange)

    async def _served(self) -> None:
        """Return once there is, or may be, a server.

        Raises:
            ServerDiedError: who made this transport has gone.
        """
        await self._ask(self._office(), "stay", self._key, timeout=None)

    async def _call(self, channel: PendingChannel, found: Found) -> RpcCarrier:
        desk = None
        try:
            desk = await self._desk(self._office())
        except Exception as error:  # Monarch spawns nothing in a process in which an actor failed
            _log.info("the server will not notice at once if this process ends: %s", error)
        carrier = await super()._call(channel, found)
        exchanger: Any = found.exchange
        if desk is not None:
            exchanger.watched(carrier.id, desk)
        if _late:
            _log.warning(
                "Monarch was imported before aioinfer and without %s: calls to a server whose "
                "process has ended may fail only after ten seconds",
                ", ".join(SETTINGS),
            )
        return carrier


def _host_in(process: str) -> str:
    """The host in what Monarch calls a process: loopback unless other hosts can reach it."""
    found = re.search(r"([a-z]+)://(?:\[([^\]]*)\]|([^:,]*))", process)
    if found is None or found[1] in ("ipc", "unix", "inproc", "local"):
        return "127.0.0.1"
    return found[2] or found[3]


def require_monarch(who: str) -> None:
    """Import what needs Monarch.

    Raises:
        ImportError: Monarch is not installed; the message says what to install.
    """
    try:
        importlib.import_module("monarch.actor")
    except ImportError as error:
        raise ImportError(f"{who} needs Monarch: pip install 'aioinfer[monarch]'") from error


def _log_faults() -> None:
    actor = importlib.import_module("monarch.actor")
    if actor.unhandled_fault_hook.__module__.startswith("monarch."):  # nobody has set another
        actor.unhandled_fault_hook = _log_fault  # type: ignore[attr-defined]


def _log_fault(failure: Any) -> None:
    _log.warning("Monarch reports a fault that nobody handled: %s", failure.report())


def _posts() -> Any:
    return importlib.import_module("aioinfer.transports.monarch_post")


def _desks() -> Any:
    return importlib.import_module("aioinfer.transports.monarch_desk")
