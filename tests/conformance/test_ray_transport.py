"""RayTransport keeps what every link keeps: the server in the driver, its clients beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from rays import nothing_left as nothing_left
from rays import start_ray

from aioinfer import RayTransport
from aioinfer.transports import ray as rays

from .hooks import InBackground
from .suite import TransportConformance
from .test_remote_transport import OnConnections

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def relays() -> list[Any]:
    """Relays that no transport uses: making one for each test would take minutes."""
    start_ray()
    return []


class OnRay(OnConnections):
    """What differs where requests travel through a Ray cluster."""

    kind: Any

    @pytest.fixture(autouse=True)
    def _use_relays_again(
        self, relays: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        make, used = rays._new_relay, []

        def take(ray: Any) -> Any:
            used.append(relays.pop() if relays else make(ray))
            return used[-1]

        monkeypatch.setattr(rays, "_new_relay", take)
        yield
        relays += used

    def transport(self) -> RayTransport:
        return RayTransport(self.kind)


class TestDirect(OnRay, InBackground, TransportConformance):
    """Direct connections; what both event loops do with them is in ``test_remote_transport.py``."""

    pytestmark = [pytest.mark.event_loop("uvloop")]
    kind = "direct"


class TestRpc(OnRay, InBackground, TransportConformance):
    """Calls of the relay."""

    pytestmark = [pytest.mark.event_loop("asyncio")]
    kind = "rpc"
