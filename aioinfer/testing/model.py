"""A policy that remembers, and that a test can hold and break."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase

from aioinfer.testing.bell import PATIENCE_S, Bell


class RecordingModel:
    """A policy that remembers its batches, and that a test can hold, wait for and break.

    It maps a TensorDict to a TensorDict and can be served as it is. Any thread may use it.
    By default it doubles ``"observation"`` into ``"action"``::

        model = RecordingModel()
        async with InferenceServer(model) as server:
            ...
        assert model.batch_sizes == [1, 31]

    Every forward is recorded when it begins, one that fails too: the server repeats a batch
    that failed in halves, so after a failure more rows are recorded than were asked for.

    Args:
        function: what it computes.
        in_keys: what a request must have; ``None`` leaves the attribute ``None``, which lets
            every request through to the model.
        out_keys: what a reply holds; ``None`` stands for all that ``function`` returns.
    """

    def __init__(
        self,
        function: Callable[[TensorDictBase], Any] | None = None,
        *,
        in_keys: Sequence[Any] | None = None,
        out_keys: Sequence[Any] | None = None,
    ) -> None:
        self.in_keys = None if in_keys is None else list(in_keys)
        self.out_keys = None if out_keys is None else list(out_keys)
        self._function = _double if function is None else function
        self._bell = Bell()
        self._batches: list[TensorDictBase] = []
        self._threads: set[int] = set()
        self._inside = 0
        self._most_inside = 0
        self._gate: threading.Event | None = None
        self._at_gate = 0
        self._limit_s = PATIENCE_S
        self._predicate: Callable[[TensorDictBase], object] | None = None
        self._make_error: Callable[[], BaseException] = _told_to_fail

    # -- what it saw --------------------------------------------------------

    @property
    def batches(self) -> list[TensorDictBase]:
        """A copy of what each forward was given, in order."""
        with self._bell.lock:
            return list(self._batches)

    @property
    def batch_sizes(self) -> list[int]:
        """The rows of each forward, in order."""
        return [batch.batch_size.numel() for batch in self.batches]

    @property
    def rows(self) -> int:
        """The rows of all forwards."""
        return sum(self.batch_sizes)

    @property
    def threads(self) -> set[int]:
        """The identifiers of the threads that ran a forward."""
        with self._bell.lock:
            return set(self._threads)

    @property
    def most_at_once(self) -> int:
        """How many forwards ran at the same time, at most. A server runs one."""
        with self._bell.lock:
            return self._most_inside

    # -- holding ------------------------------------------------------------

    def hold(self, limit_s: float = PATIENCE_S) -> None:
        """Make every forward from now on wait, at its beginning, for :meth:`release`.

        Do not hold a model that runs on the test's own thread (see
        :meth:`PuppetExecutor.run_next`): the test could not release it.

        Args:
            limit_s: real seconds after which a forward that is held raises
                :class:`TimeoutError`, so that a test that forgets to release does not hang.
        """
        with self._bell.lock:
            self._limit_s = limit_s
            if self._gate is None:
                self._gate = threading.Event()

    def release(self) -> None:
        """Let the forward that is held go on, and hold no other. Harmless if not held."""
        self._open_gate(None)

    def step(self) -> None:
        """Let the forward that is held go on, and hold the next one.

        Raises:
            RuntimeError: the model is not held, or no forward has entered it.
        """
        with self._bell.lock:
            if not self._at_gate:
                raise RuntimeError("no forward is held; call hold() and wait_until_entered() first")
        self._open_gate(threading.Event())

    @contextlib.contextmanager
    def held(self, limit_s: float = PATIENCE_S) -> Iterator[None]:
        """Hold the model in a ``with`` block; it is released however the block ends."""
        self.hold(limit_s)
        try:
            yield
        finally:
            self.release()

    def wait_until_entered(self, timeout: float = PATIENCE_S, *, forwards: int = 1) -> None:
        """Block this thread until a forward is held.

        Args:
            timeout: real seconds.
            forwards: how many forwards, each on a thread of its own, to wait for.

        Raises:
            TimeoutError: no forward began in time.
            RuntimeError: the model is not held, so a forward could come and go unseen.
        """
        self._bell.wait(lambda: self._is_entered(forwards), timeout, "no forward began")

    async def entered(self, timeout: float = PATIENCE_S, *, forwards: int = 1) -> None:
        """Wait until a forward is held, without blocking the event loop.

        Arguments and errors are those of :meth:`wait_until_entered`.
        """
        await self._bell.wait_async(lambda: self._is_entered(forwards), timeout, "no forward began")

    # -- failing ------------------------------------------------------------

    def fail_when(
        self,
        predicate: Callable[[TensorDictBase], object] | None,
        error: Callable[[], BaseException] | None = None,
    ) -> None:
        """Make forwards fail from now on.

        For example, fail every batch that holds a negative observation::

            model.fail_when(lambda td: bool((td["observation"] < 0).any()))

        Args:
            predicate: tells of a batch whether its forward fails; ``None`` ends failing.
            error: makes the exception to raise, a new one each time; ``None`` stands for a
                :class:`ValueError`.
        """
        with self._bell.lock:
            self._predicate = predicate
            self._make_error = _told_to_fail if error is None else error

    # -- the policy ---------------------------------------------------------

    def __call__(self, td: TensorDictBase) -> Any:
        """Run one forward."""
        with self._bell.lock:
            self._batches.append(td.clone())
            self._threads.add(threading.get_ident())
            self._inside += 1
            self._most_inside = max(self._most_inside, self._inside)
            gate, limit_s = self._gate, self._limit_s
            if gate is not None:
                self._at_gate += 1
                self._bell.ring()
        try:
            if gate is not None and not gate.wait(limit_s):
                raise TimeoutError(f"held for {limit_s} s; nobody called release()")
            with self._bell.lock:
                predicate, make_error = self._predicate, self._make_error
            if predicate is not None and predicate(td):
                raise make_error()
            return self._function(td)
        finally:
            with self._bell.lock:
                self._inside -= 1

    def _is_entered(self, forwards: int) -> bool:
        if self._gate is None:
            raise RuntimeError("the model is not held; call hold() first")
        return self._at_gate >= forwards

    def _open_gate(self, following: threading.Event | None) -> None:
        with self._bell.lock:
            gate, self._gate = self._gate, following
            self._at_gate = 0
        if gate is not None:
            gate.set()


def _double(td: TensorDictBase) -> TensorDictBase:
    return TensorDict({"action": td["observation"] * 2}, batch_size=td.batch_size)


def _told_to_fail() -> BaseException:
    return ValueError("RecordingModel was told to fail on this batch")
