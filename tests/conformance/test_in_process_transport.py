"""``transport=None`` keeps what every link keeps, wherever its callers are."""

from __future__ import annotations

from helpers import doubling

from aioinfer import InferenceClient, InferenceServer

from .hooks import InBackground
from .loops import OnAnyLoop, OnTheServersLoop
from .suite import TransportConformance


class TestOnTheServersLoop(TransportConformance, OnTheServersLoop, OnAnyLoop):
    """Callers on the server's own event loop, and threads."""

    def transport(self) -> None:
        return None

    def test_the_natural_client(self):
        """``client()`` is for coroutines."""
        assert type(InferenceServer(doubling()).client()) is InferenceClient


class TestOnAnotherLoop(InBackground, TransportConformance):
    """Callers on another event loop than the server's, and threads."""

    def transport(self) -> None:
        return None
