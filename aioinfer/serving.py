"""One run of a server: intake -> batcher -> executor -> replies, on one event loop.

Nothing here waits. :meth:`Serving._pump` takes what arrived, asks the batcher what to do,
does it, and hands out what the executor finished. It runs as a callback of the loop when
something it asked for happened: enough arrivals, a finished batch, a timer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from aioinfer.batching import Batcher, Dispatch, Wait
from aioinfer.clock import Clock, TimerHandle
from aioinfer.errors import ServerClosedError, ServerDiedError
from aioinfer.executor import Batch, Executor, Outcome
from aioinfer.intake import Intake, Notice
from aioinfer.request import GivenUp, ReplyPort, Request, State
from aioinfer.signature import Signature
from aioinfer.splitting import split
from aioinfer.stats import BatchTimes, StatsRecorder
from aioinfer.transports.base import InferenceTransport

_log = logging.getLogger("aioinfer")


class Serving:
    """Serves from :meth:`open` until :meth:`run` returns.

    Args:
        transports: the links to serve.
        batcher: decides; owned by this run.
        executor: runs the batches.
        run: how to run one.
        recorder: counts.
        clock: the server's clock.
        admit: raises for a signature that the policy cannot serve.
    """

    def __init__(
        self,
        transports: Sequence[InferenceTransport],
        batcher: Batcher,
        executor: Executor,
        run: Callable[[Batch], None],
        recorder: StatsRecorder,
        clock: Clock,
        admit: Callable[[Signature], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._transports = transports
        self._batcher = batcher
        self._executor = executor
        self._run = run
        self._recorder = recorder
        self._clock = clock
        self._intake = Intake(
            self.loop,
            clock,
            wake=self._pump,
            admit=admit,
            refused=recorder.refuse,
            queued_rows=lambda: batcher.rows,
            max_queue_size=batcher.max_queue_size,
        )
        self._running: list[Batch] = []
        self._finished: deque[tuple[Batch, list[_Delivery]]] = deque()
        self._timer: TimerHandle | None = None
        self._timer_at = 0.0
        self._drained: asyncio.Future[None] = self.loop.create_future()
        self._over = False

    # -- lifecycle ----------------------------------------------------------

    async def open(self) -> None:
        """Begin to accept requests.

        Raises:
            RuntimeError: a transport already serves another server.
        """
        self._executor.start(self._run, self._on_finished)
        try:
            for transport in self._transports:
                await transport.attach(self._intake)
        except BaseException:
            await self._end(lambda: ServerClosedError("the server could not start"))
            raise

    async def run(self) -> None:
        """Serve until closed and drained. Whatever ends it, everybody is answered."""
        make_error = _closed
        try:
            await self._drained
        except asyncio.CancelledError:
            make_error = _task_cancelled
            raise
        except Exception as error:
            _log.exception("the server stopped because of an error of its own")
            make_error = _because(error)
        finally:
            await self._end(make_error)

    def close(self, *, drain: bool) -> None:
        """Accept nothing more; answer what was accepted, or only fail it."""
        self._intake.close("the server is closing")
        self._batcher.close()
        if not drain and not self._drained.done():
            self._drained.set_result(None)
        self._pump()

    @property
    def queue_depth(self) -> int:
        """Rows waiting."""
        return self._batcher.rows

    async def _end(self, make_error: Callable[[], Exception]) -> None:
        self._over = True
        self._intake.close("the server is closed")
        if self._timer is not None:
            self._timer.cancel()
        self._fail_everything(make_error)
        stopped = self._executor.stop()
        if not self._running:  # else a forward still runs, for nobody, for who knows how long
            await asyncio.wrap_future(stopped)
        for transport in self._transports:
            try:
                await transport.detach()
            except Exception:
                _log.exception("a transport could not be detached")

    def _fail_everything(self, make_error: Callable[[], Exception]) -> None:
        left = [r for batch in self._running for r in batch.requests]
        left += [r for batch, _ in self._finished for r in batch.requests]
        left += self._batcher.waiting()
        while self._intake.pending:
            left.append(self._intake.pending.popleft())
        for request in left:
            if request.state is not State.DONE:
                self._fail(request, make_error())

    # -- the pump -----------------------------------------------------------

    def _pump(self) -> None:
        if self._over:
            return
        try:
            finished = self._take_finished()
            self._decide()
            # Replies go out after the next batch has: the executor works meanwhile.
            for batch, deliveries in finished:
                for port, outcomes in deliveries:
                    port.deliver(outcomes)
                self._account(batch)
        except Exception as error:
            if not self._drained.done():
                self._drained.set_exception(error)

    def _decide(self) -> None:
        while True:
            self._take_notices()
            self._take_requests()
            action = self._batcher.next_action(self._clock())
            if isinstance(action, Dispatch):
                self._dispatch(action)
            elif self._intake.sleep_until(action.arrivals):
                self._sleep(action)
                return

    def _take_finished(self) -> list[tuple[Batch, list[_Delivery]]]:
        finished = []
        while self._finished:
            batch, deliveries = self._finished.popleft()
            self._running.remove(batch)
            self._batcher.forward_ended(batch.requests, batch.answered_at)
            finished.append((batch, deliveries))
        return finished

    def _take_notices(self) -> None:
        notices = self._intake.notices
        while notices:
            notice, about = notices.popleft()
            if isinstance(about, Request):
                self._withdraw(about)
            elif notice is Notice.JOINED:
                self._batcher.join(about)
            else:
                self._batcher.leave(about)

    def _take_requests(self) -> None:
        pending = self._intake.pending
        batcher = self._batcher
        taken = 0
        while pending:
            request = pending.popleft()
            if request.state is State.DONE:  # withdrawn before it came this far
                continue
            if batcher.rows + request.rows > batcher.max_queue_size and batcher.rows:
                pending.appendleft(request)
                break
            taken += 1
            if request.rows > batcher.max_batch_size:
                for part in split(request, batcher.max_batch_size):
                    batcher.push(part)
            else:
                batcher.push(request)
        if taken:
            self._recorder.requests += taken
            self._intake.made_room()

    def _dispatch(self, action: Dispatch) -> None:
        for request in action.expired:
            self._recorder.timed_out += request.whole is None
            self._deliver_error(
                request,
                TimeoutError(f"no answer within timeout={request.timeout} s of the submission"),
            )
        if action.requests:
            batch = Batch(action.requests, action.rows, action.reason, self._clock())
            self._running.append(batch)
            self._executor.submit(batch)
        self._intake.made_room()

    def _sleep(self, action: Wait) -> None:
        if (
            self._intake.closed_because is not None
            and not self._running
            and not self._batcher.rows
            and not self._intake.pending
            and not self._drained.done()
        ):
            self._drained.set_result(None)
        until = action.until
        # A timer that fires too early only asks again, so one is kept rather than re-armed
        # for every batch.
        if until is not None and (self._timer is None or until < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = until
            self._timer = self._clock.call_at(self.loop, until, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    # -- replies ------------------------------------------------------------

    def _on_finished(self, batch: Batch) -> None:
        """The executor finished a batch. Runs on the executor thread."""
        if self._over:
            return
        deliveries = _by_port(batch.outcomes)
        # First the note for the loop, then the answers: a thread that is answered may ask
        # again at once, and the batcher must not see that before it knows of the answer.
        self._finished.append((batch, [d for d in deliveries if d[0].on_loop]))
        for port, outcomes in deliveries:
            if not port.on_loop:
                port.deliver(outcomes)
        try:
            self.loop.call_soon_threadsafe(self._pump)
        except RuntimeError as error:  # the loop was closed under a running server
            self._over = True
            self._intake.close("the event loop of the server was closed")
            self._fail_everything(_because(error))

    def _account(self, batch: Batch) -> None:
        for request in batch.requests:
            request.state = State.DONE
        if batch.failed:
            for request, outcome in batch.outcomes:
                if isinstance(outcome, BaseException):
                    self._count_failure(request)
        times = BatchTimes(
            [request.submitted_at for request in batch.requests],
            batch.dispatched_at,
            batch.forward_s,
            batch.answered_at,
        )
        self._recorder.batch(batch.rows, batch.reason, times)

    def _withdraw(self, request: Request) -> None:
        """The caller no longer wants an answer."""
        if request.state is State.DONE:
            return
        for part in request.parts or (request,):
            self._batcher.discard(part)
        request.state = State.DONE
        if request.given_up is GivenUp.TIMED_OUT:
            self._recorder.timed_out += 1
        else:
            self._recorder.cancelled += 1

    def _count_failure(self, request: Request) -> None:
        whole = request.whole
        if whole is None:
            self._recorder.failed += 1
        elif whole.given_up is None:
            # Its first part to fail: the others are not worth a forward any more.
            whole.given_up = GivenUp.CANCELLED
            self._recorder.failed += 1
            for part in whole.parts or ():
                self._batcher.discard(part)

    def _fail(self, request: Request, error: Exception) -> None:
        request.state = State.DONE
        self._count_failure(request)
        self._deliver_error(request, error)

    def _deliver_error(self, request: Request, error: Exception) -> None:
        request.port.deliver([(request, error)])


_Delivery = tuple[ReplyPort, Sequence[Outcome]]


def _by_port(outcomes: list[Outcome]) -> list[_Delivery]:
    """Group the outcomes by where they go, keeping their order."""
    first = outcomes[0][0].port
    if all([request.port is first for request, _ in outcomes]):
        return [(first, outcomes)]
    groups: dict[ReplyPort, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome[0].port, []).append(outcome)
    return list(groups.items())


def _closed() -> Exception:
    return ServerClosedError("the server was closed before this request was answered")


def _task_cancelled() -> Exception:
    return ServerDiedError("the task of the server was cancelled; its event loop ended?")


def _because(cause: BaseException) -> Callable[[], Exception]:
    def make() -> Exception:
        error = ServerDiedError(f"the server stopped because of an error of its own: {cause!r}")
        error.__cause__ = cause
        return error

    return make
