"""Where transports hand requests to the server: stamps, wake-ups, room, and the end."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from aioinfer import InferenceServer
from aioinfer.batching import ANY_NUMBER
from aioinfer.errors import (
    InferenceError,
    InvalidRequestError,
    QueueFullError,
    ServerClosedError,
    ServerDiedError,
)
from aioinfer.intake import Intake, Notice
from aioinfer.request import GivenUp, Request, Source
from aioinfer.signature import Signature, describe
from aioinfer.testing import ManualClock, PuppetExecutor, RecordingModel, settle


class Door:
    """An intake, and what the server behind it would see."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        max_queue_size: int = 100,
        admit: Callable[[Signature], None] = lambda signature: None,
    ) -> None:
        self.clock = ManualClock(50.0)
        self.wakes = 0
        self.woken_on: set[int] = set()
        self.refusals = 0
        self.queued = 0
        self.admitted: list[Signature] = []
        self._admit = admit
        self.intake = Intake(
            loop,
            self.clock,
            wake=self._wake,
            admit=self._check,
            refused=self._refused,
            queued_rows=lambda: self.queued,
            max_queue_size=max_queue_size,
        )

    def _wake(self) -> None:
        self.wakes += 1
        self.woken_on.add(threading.get_ident())

    def _check(self, signature: Signature) -> None:
        self.admitted.append(signature)
        self._admit(signature)

    def _refused(self) -> None:
        self.refusals += 1

    def send(self, request: Request | None = None, *, block: bool = True) -> Request:
        request = make_request() if request is None else request
        self.intake.submit(request, block=block)
        return request


def make_request(
    rows: int | None = None,
    *,
    timeout: float | None = None,
    priority: int = 0,
    name: str = "observation",
) -> Request:
    td = TensorDict({name: torch.zeros(2)})
    data, count, batched, signature = describe(td if rows is None else td.expand(rows), None)
    return Request(data, count, batched, signature, timeout, priority, Source(), None)


@pytest.fixture
async def door() -> Door:
    return Door(asyncio.get_running_loop())


class TestSubmitting:
    """An append, and a stamp."""

    async def test_requests_are_pending_in_order(self, door: Door) -> None:
        """What was submitted waits, first come first."""
        requests = [door.send() for _ in range(5)]
        assert list(door.intake.pending) == requests
        assert [door.intake.take() for _ in requests] == requests

    async def test_requests_are_stamped_with_the_servers_clock(self, door: Door) -> None:
        """Submission time and deadline are on the server's clock, from this moment."""
        door.clock.advance(5.0)
        request = door.send(make_request(timeout=2.0))
        assert (request.submitted_at, request.deadline) == (55.0, 57.0)
        assert door.send().deadline is None

    async def test_rows_pending_are_counted(self, door: Door) -> None:
        """Rows, not requests, however they come and go."""
        door.send()
        large = door.send(make_request(4))
        door.send(make_request(1))
        assert door.intake.pending_rows == 6
        door.intake.take()
        assert door.intake.take() is large
        assert door.intake.pending_rows == 1
        door.intake.put_back(large)
        assert (door.intake.pending_rows, door.intake.pending[0]) == (5, large)


class TestWaking:
    """One wake-up per batch, and only if the server sleeps."""

    async def test_a_sleeping_server_is_woken_once(self, door: Door) -> None:
        """Of many arrivals the first wakes it, the others find it awake."""
        assert door.intake.sleep_until(1)
        for _ in range(10):
            door.send()
        await settle()
        assert door.wakes == 1

    async def test_arrivals_below_the_number_asked_for_do_not_wake(self, door: Door) -> None:
        """The server sleeps through arrivals that do not matter."""
        assert door.intake.sleep_until(3)
        door.send()
        door.send()
        await settle()
        assert door.wakes == 0
        door.send()
        await settle()
        assert door.wakes == 1

    @pytest.mark.parametrize(
        "special",
        [{"rows": 2}, {"rows": 1}, {"timeout": 1.0}, {"priority": 1}, {"priority": -1}],
        ids=str,
    )
    async def test_a_special_request_always_wakes(
        self, door: Door, special: dict[str, Any]
    ) -> None:
        """Several rows, a deadline or a priority may change any decision."""
        door.intake.sleep_until(100)
        door.send(make_request(**special))
        await settle()
        assert door.wakes == 1

    async def test_a_busy_server_is_not_woken(self, door: Door) -> None:
        """During a forward nothing wakes the loop; the end of the forward will."""
        assert door.intake.sleep_until(ANY_NUMBER)
        for _ in range(5):
            door.send()
        door.send(make_request(timeout=1.0))
        door.intake.give_up(make_request(), GivenUp.CANCELLED)
        await settle()
        assert door.wakes == 0

    async def test_going_to_sleep_fails_when_enough_have_arrived(self, door: Door) -> None:
        """An arrival between the decision and the sleep is not slept through."""
        door.send()
        await settle()
        door.wakes = 0
        assert not door.intake.sleep_until(1)
        door.send()
        await settle()
        assert door.wakes == 0  # it is awake, and knows
        assert door.intake.sleep_until(3)

    async def test_arrivals_during_a_forward_do_not_keep_it_awake(self, door: Door) -> None:
        """However many wait outside, a busy server may sleep."""
        for _ in range(5):
            door.send()
        assert door.intake.sleep_until(ANY_NUMBER)

    async def test_another_thread_wakes_it_on_its_own_loop(self, door: Door) -> None:
        """The wake-up runs on the server's loop, whoever submits."""
        door.intake.sleep_until(1)
        await asyncio.to_thread(door.send)
        await settle()
        assert door.wakes == 1
        assert door.woken_on == {threading.get_ident()}

    async def test_many_threads_lose_nothing(self, door: Door) -> None:
        """Requests of many threads all arrive, and the server is woken for them."""
        door.intake.sleep_until(1)

        def submit() -> None:
            for _ in range(100):
                door.send()

        await asyncio.gather(*[asyncio.to_thread(submit) for _ in range(4)])
        await settle()
        assert len(door.intake.pending) == 400
        assert door.wakes >= 1

    async def test_a_notice_wakes_a_sleeping_server(self, door: Door) -> None:
        """Whoever joins, leaves or gives up may change the decision."""
        request, source = make_request(), Source()
        for tell, what, about in (
            (lambda: door.intake.join(source), Notice.JOINED, source),
            (lambda: door.intake.leave(source), Notice.LEFT, source),
            (lambda: door.intake.give_up(request, GivenUp.TIMED_OUT), Notice.GIVEN_UP, request),
        ):
            door.wakes = 0
            door.intake.sleep_until(100)
            tell()
            await settle()
            assert door.wakes == 1
            assert door.intake.notices.popleft() == (what, about)
        assert request.given_up is GivenUp.TIMED_OUT


class TestAdmission:
    """Signatures are checked once."""

    async def test_each_signature_is_checked_once(self, door: Door) -> None:
        """The second request that looks alike is not checked again."""
        for _ in range(3):
            door.send(make_request(name="a"))
            door.send(make_request(name="b"))
        assert [signature.keys for signature in door.admitted] == [("a",), ("b",)]

    async def test_what_is_refused_is_refused_again(self) -> None:
        """A signature that was refused stays refused, is counted, and is never pending."""

        def admit(signature: Signature) -> None:
            if "a" in signature.keys:
                raise InvalidRequestError("no a")

        door = Door(asyncio.get_running_loop(), admit=admit)
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="no a"):
                door.send(make_request(name="a"))
        door.send(make_request(name="b"))
        assert door.refusals == 2
        assert len(door.intake.pending) == 1

    async def test_changing_looks_do_not_fill_memory(self, door: Door) -> None:
        """The memory of what was admitted is bounded."""
        request = make_request()
        most = 0
        for i in range(10_000):
            request.signature = Signature((f"x{i}",), (None,), None, True, None)
            door.send(request)
            door.intake.take()
            if i % 100 == 0:
                most = max(most, len(door.intake._admitted))
        assert most < 5000


class TestRoom:
    """``max_queue_size``, counted in rows."""

    async def test_a_full_queue_refuses_who_does_not_want_to_wait(self) -> None:
        """``block=False`` is refused with the numbers, and counted."""
        door = Door(asyncio.get_running_loop(), max_queue_size=4)
        door.queued = 4
        with pytest.raises(QueueFullError, match="max_queue_size=4") as caught:
            door.send(block=False)
        assert "holds 4" in str(caught.value)
        assert "block=False" in str(caught.value)
        assert (door.refusals, len(door.intake.pending)) == (1, 0)

    async def test_a_full_queue_takes_who_wants_to_wait(self) -> None:
        """Everybody else waits outside: that is the backpressure."""
        door = Door(asyncio.get_running_loop(), max_queue_size=4)
        door.queued = 4
        door.send()
        assert len(door.intake.pending) == 1

    async def test_what_is_pending_counts(self) -> None:
        """A burst that the server has not seen yet fills the queue, too."""
        door = Door(asyncio.get_running_loop(), max_queue_size=4)
        door.queued = 1
        door.send(make_request(2), block=False)
        door.send(block=False)
        with pytest.raises(QueueFullError):
            door.send(block=False)

    async def test_k_rows_need_room_for_k(self) -> None:
        """A request of more rows than are free is refused, a smaller one is not."""
        door = Door(asyncio.get_running_loop(), max_queue_size=4)
        door.queued = 2
        with pytest.raises(QueueFullError):
            door.send(make_request(3), block=False)
        door.send(make_request(2), block=False)

    async def test_an_empty_queue_takes_any_size(self) -> None:
        """A request larger than the queue is possible when nobody else waits."""
        door = Door(asyncio.get_running_loop(), max_queue_size=4)
        door.send(make_request(9), block=False)
        with pytest.raises(QueueFullError):
            door.send(make_request(9), block=False)

    async def test_waiting_ends_at_once_where_there_is_room(self, door: Door) -> None:
        """No waiting without need."""
        assert door.intake.wait_for_room(1, 0.0)

    async def test_waiting_ends_in_vain_after_its_timeout(self, door: Door) -> None:
        """No room in time is False, not an error and not for ever."""
        door.queued = 100
        assert not await asyncio.to_thread(door.intake.wait_for_room, 1, 0.0)

    async def test_room_that_was_made_ends_the_wait(self, door: Door) -> None:
        """Threads that wait for room go on when there is some."""
        door.queued = 100
        waiting = asyncio.create_task(asyncio.to_thread(door.intake.wait_for_room, 2, 30.0))
        await until(lambda: door.intake._room_wanted == 1)
        door.queued = 99
        door.intake.made_room()
        await settle()
        assert not waiting.done()  # not enough
        door.queued = 98
        door.intake.made_room()
        assert await waiting

    async def test_closing_ends_the_wait(self, door: Door) -> None:
        """Nobody waits for room in a closed server."""
        door.queued = 100
        waiting = asyncio.create_task(asyncio.to_thread(door.intake.wait_for_room, 1, 30.0))
        await until(lambda: door.intake._room_wanted == 1)
        door.intake.close(lambda: ServerClosedError("closed"))
        await waiting
        assert door.intake._room_wanted == 0


class TestClosing:
    """Nothing is accepted that would not be answered."""

    async def test_a_closed_intake_refuses(self, door: Door) -> None:
        """Every caller gets an error of its own, and nothing is left pending."""
        door.intake.close(lambda: ServerClosedError("closed for the night"))
        errors: list[InferenceError] = []
        for request in (make_request(), make_request(3)):
            with pytest.raises(ServerClosedError, match="for the night") as caught:
                door.send(request)
            errors.append(caught.value)
        assert errors[0] is not errors[1]
        assert (len(door.intake.pending), door.intake.pending_rows) == (0, 0)
        assert door.refusals == 2

    async def test_what_was_accepted_before_stays(self, door: Door) -> None:
        """Closing takes nothing away."""
        request = door.send()
        door.intake.close(lambda: ServerClosedError("closed"))
        assert list(door.intake.pending) == [request]

    async def test_a_request_that_slipped_in_is_taken_back(self, door: Door) -> None:
        """Closing between check and append: the request is refused, not forgotten."""

        class Closing(deque[Request]):
            def append(self, request: Request) -> None:
                door.intake.close(lambda: ServerClosedError("closed"))
                super().append(request)

        door.intake.pending = Closing()
        with pytest.raises(ServerClosedError):
            door.send()
        assert not door.intake.pending

    async def test_a_request_that_the_server_took_is_answered_and_not_refused(
        self, door: Door
    ) -> None:
        """Closing after the server took the request: exactly one of the two answers it."""
        taken = []

        class Draining(deque[Request]):
            def append(self, request: Request) -> None:
                door.intake.close(lambda: ServerClosedError("closed"))
                taken.append(request)  # appended, and at once taken by the closing server

        door.intake.pending = Draining()
        request = door.send()
        assert taken == [request]
        assert door.refusals == 0

    async def test_another_request_is_not_taken_back_in_its_place(self, door: Door) -> None:
        """Only the late request itself is removed, however alike the others look."""
        early = door.send()
        door.intake.close(lambda: ServerClosedError("closed"))
        with pytest.raises(ServerClosedError):
            door.send()
        assert list(door.intake.pending) == [early]


class TestDeadLoop:
    """The server's event loop was closed under it."""

    @pytest.fixture
    def dead(self) -> Door:
        loop = asyncio.new_event_loop()
        door = Door(loop)
        loop.close()
        return door

    def test_every_request_is_told(self, dead: Door) -> None:
        """The first request finds out, and the later ones know."""
        for _ in range(3):
            with pytest.raises(ServerDiedError, match="event loop"):
                dead.send()

    def test_giving_up_and_leaving_do_not_raise(self, dead: Door) -> None:
        """Cleaning up after a server that died is not an error of its own."""
        for tell in (
            lambda: dead.intake.give_up(make_request(), GivenUp.CANCELLED),
            lambda: dead.intake.leave(Source()),
            lambda: dead.intake.join(Source()),
        ):
            dead.intake.sleep_until(1)
            tell()


class TestBehindTheDoor:
    """What a full queue means for a running server."""

    async def test_requests_that_do_not_fit_make_the_batch_leave(self) -> None:
        """Requests that wait outside a full queue do not keep the loop spinning: since nobody
        can join any more, the batch leaves.
        """
        puppet = PuppetExecutor()
        async with InferenceServer(
            RecordingModel(),
            timeout=60.0,
            min_batch_size=8,
            max_queue_size=4,
            clock=ManualClock(),
            executor=puppet,
        ) as server:
            with puppet:
                client = server.async_client()
                answers = [
                    client.submit(TensorDict({"observation": torch.ones(1)})) for _ in "1" * 8
                ]
                await settle()
                assert puppet.batch_sizes == [4]
                puppet.run_next()
                await settle()
                assert puppet.batch_sizes == [4, 4]
        assert all(answer.done() and answer.exception() is None for answer in answers)

    async def test_room_freed_by_a_cancelled_request_reaches_a_waiting_thread(self) -> None:
        """A thread that waits for room gets what a cancelled request leaves behind."""
        puppet = PuppetExecutor()
        async with InferenceServer(
            RecordingModel(), max_queue_size=1, clock=ManualClock(), executor=puppet
        ) as server:
            with puppet:
                client, of_thread = server.async_client(), server.sync_client()
                td = TensorDict({"observation": torch.ones(1)})
                first = client.submit(td)
                await settle()
                client.close()
                of_thread.close()
                await settle()
                queued = client.submit(td)
                await settle()
                submitting = asyncio.create_task(asyncio.to_thread(of_thread.submit, td))
                assert server._serving is not None
                intake = server._serving._intake
                await until(lambda: intake._room_wanted == 1)
                queued.cancel()
                await settle()
                puppet.run_next()
                await settle()
                last = await asyncio.wait_for(submitting, 30.0)
                assert (await first)["action"].tolist() == [2]
        assert last.result(timeout=0)["action"].tolist() == [2]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
