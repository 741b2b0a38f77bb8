"""What the links to a cluster share keeps what every link keeps, on connections and in calls."""

from __future__ import annotations

import array
import fcntl
import gc
import select
import termios

import pytest
from helpers import InThread, action, row

from aioinfer import InferenceServer, ServerDiedError
from aioinfer.testing import RecordingModel, settle
from aioinfer.transports.direct import PendingChannel, StreamCarrier
from aioinfer.transports.listener import StreamPeer
from aioinfer.transports.remote import RemoteTransport
from aioinfer.transports.rpc import RpcCarrier

from .hooks import InBackground, both_loops
from .loops import NewLoop, OnAnyLoop, OnTheServersLoop
from .remote import LocalTransport
from .suite import TransportConformance
from .test_mp_transport import OnSockets, SocketLink


class RemoteLink(SocketLink):
    """A link of which both ends are in this process."""

    transport: RemoteTransport

    async def told(self) -> None:
        await settle()  # who was cancelled just now has not said so yet
        await super().told()

    def _everything_is_read(self) -> bool:
        carriers = []
        for channel in self.transport._channels():
            if isinstance(channel, PendingChannel):
                if not channel._connected.done():
                    return False
                carriers.append(channel._carrier)
        return all(self._is_read(carrier) for carrier in carriers) and self._has_read()

    def _is_read(self, carrier: object) -> bool:
        if isinstance(carrier, StreamCarrier):
            return not carrier._unsent and not carrier._transport.get_write_buffer_size()
        if isinstance(carrier, RpcCarrier):
            hub = self.transport._hub
            peer = None if hub is None else hub._peers.get(carrier.id)
            return not carrier._unsent and (peer is None or peer._done == carrier._number)
        return True

    def _has_read(self) -> bool:
        listener = self.transport._listener
        if listener is None or listener._server is None:
            return True
        if listener.half_open or select.select(listener._server.sockets, [], [], 0)[0]:
            return False
        return not any(_unread(peer) for peer in list(listener.peers))


def _unread(peer: StreamPeer) -> int:
    descriptor = peer._transport.get_extra_info("socket").fileno()
    if descriptor < 0:
        return 0
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


class OnConnections(OnSockets):
    """Direct connections."""

    def transport(self) -> LocalTransport:
        return LocalTransport("direct")

    def link(self, server: InferenceServer) -> RemoteLink:
        return RemoteLink(server)


class InCalls(OnConnections):
    """Calls in place of connections."""

    def transport(self) -> LocalTransport:
        return LocalTransport("rpc")


quietly = pytest.mark.filterwarnings(
    *[f"ignore:unclosed {what}:ResourceWarning" for what in ("transport", "resource", "<socket")]
)
"""Event loops say so of every connection that they were closed over, and rightly so."""


class ClosedUnder(OnTheServersLoop):
    """What a loop that is closed takes along."""

    test_a_loop_that_is_closed_under_the_server = quietly(
        OnTheServersLoop.test_a_loop_that_is_closed_under_the_server
    )

    @both_loops
    @quietly
    def test_a_loop_that_is_closed_during_a_forward(
        self, new_loop: NewLoop, logged_errors: list[str]
    ):
        """Threads that wait when the loop is closed are told once the forward ends."""
        model = RecordingModel()
        server = InferenceServer(model, self.transport())
        link = self.link(server)
        sync_client = link.sync_client()
        loop = new_loop()
        loop.run_until_complete(server.__aenter__())
        with model.held():
            waiting = [InThread(sync_client, row(0))]
            loop.run_until_complete(model.entered())
            waiting.append(InThread(sync_client, row(1)))
            loop.run_until_complete(link.queued(1))
            loop.close()
        for thread in waiting:
            with pytest.raises(ServerDiedError):
                thread.result()
        with server:
            assert action(sync_client(row(3))) == 6
        gc.collect()
        assert all("Task was destroyed" in error for error in logged_errors)
        logged_errors.clear()


class ClosedOver(OnAnyLoop):
    """What a loop that is closed takes along."""

    test_a_loop_of_callers_that_is_closed = quietly(OnAnyLoop.test_a_loop_of_callers_that_is_closed)


class TestDirectOnTheServersLoop(OnConnections, TransportConformance, ClosedUnder, ClosedOver):
    """Callers on the server's own event loop, and threads."""


class TestDirectOnAnotherLoop(OnConnections, InBackground, TransportConformance, ClosedOver):
    """Callers on another event loop than the server's, and threads."""


class CallsClosedUnder(OnTheServersLoop):
    """An event loop that is no more can answer no call that it was given; a relay does."""

    test_a_loop_that_ends_without_closing = None
    test_two_event_loops_one_after_the_other = None
    test_a_loop_that_is_closed_under_the_server = None
    test_a_loop_that_is_closed_during_a_forward = None


class CallsClosedOver(OnAnyLoop):
    """A loop that is closed without ending its tasks leaves calls behind."""

    @both_loops
    @quietly
    def test_a_loop_of_callers_that_is_closed(self, new_loop: NewLoop, logged_errors: list[str]):
        """A loop that is closed while its answer is on the way is no trouble to the server."""
        super().test_a_loop_of_callers_that_is_closed(new_loop)
        gc.collect()
        assert all("Task was destroyed" in error for error in logged_errors)
        logged_errors.clear()


class TestCallsOnTheServersLoop(CallsClosedUnder, InCalls, TransportConformance, CallsClosedOver):
    """Callers on the server's own event loop, and threads."""


class TestCallsOnAnotherLoop(InCalls, InBackground, TransportConformance, CallsClosedOver):
    """Callers on another event loop than the server's, and threads."""
