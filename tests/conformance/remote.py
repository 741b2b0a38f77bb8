"""A cluster of this process, for what the links to a real one share."""

from __future__ import annotations

import itertools
from typing import Any

from aioinfer.transports.channel import no_server
from aioinfer.transports.remote import Found, RemoteTransport
from aioinfer.transports.rpc import RpcHub

_servers: dict[bytes, Found] = {}
_names = itertools.count()


class LocalTransport(RemoteTransport):
    """Serves the actors of this process as if they were elsewhere."""

    def _host_of_this_process(self) -> str:
        return "127.0.0.1"

    async def _publish(self, address: tuple[str, int] | None, hub: RpcHub | None) -> None:
        _servers[self._secret] = Found(next(_names), address, None if hub is None else hub.exchange)

    async def _withdraw(self) -> None:
        _servers.pop(self._secret, None)

    async def _find(self) -> Found:
        found: Any = _servers.get(self._secret)
        if found is None:
            raise no_server()
        return found
