"""A server on a Ray cluster: one replica per actor, and clients that use all of them.

Everything that changes which replicas there are runs on one event loop of the server's own, in a
background thread. There each replica has a *keeper*: a task that starts its actor, waits for the
actor's end, and starts the next one. Clients hear from the desk
(:mod:`aioinfer.transports.ray_replicas`) which replicas serve.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread
import torch

import aioinfer.arguments as arguments
from aioinfer.blocking import BackgroundLoop
from aioinfer.clock import MonotonicClock
from aioinfer.errors import ServerClosedError, ServerDiedError
from aioinfer.hosting.base import Answer, check, described, rebuilt
from aioinfer.hosting.ray_replica import new_actors
from aioinfer.hosting.replicated import ReplicatedServer, blocking
from aioinfer.transports.endpoint import TlsFactory
from aioinfer.transports.ray import require_ray
from aioinfer.transports.ray_replicas import Door, Name, RayReplicas
from aioinfer.transports.remote import ConnectionKind

_log = logging.getLogger("aioinfer")
_clock = MonotonicClock()

T = TypeVar("T")

FIRST_PAUSE_S = 0.5
"""Seconds before a replica is replaced a second time in a row; then twice as long each time."""
LONGEST_PAUSE_S = 30.0
"""The longest of these pauses; and how long one must have lasted to be replaced at once again."""
_AT_EXIT_S = 2.0
"""Seconds that a program which forgot to close its server takes longer to end, at most."""
_OF_ANOTHER_HOST = {"devices", "output_device"}
"""Options that cannot be checked here."""


class RayInferenceServer(ReplicatedServer):
    """Runs an :class:`InferenceServer` in each of some Ray actors, and spreads clients over them.

    Use it as ``async with``, as ``with``, or through :meth:`start` and :meth:`shutdown`. Requests
    go to the least loaded of as few replicas as have room for them. Those of a replica that dies
    are answered by another one, and Ray is asked for a new actor in its place, which has the
    newest weights before it serves. Clients learn by themselves which replicas there are.

    Create it in a process that outlives its use: the actors end with it. If Ray does not run
    yet, it is initialised.

    Args:
        policy_factory: called in each actor without arguments; returns the policy. Ray must be
            able to pickle it.
        num_replicas: how many to start with; see :meth:`scale`.
        ray_options: what each actor is started with, as ``.options()`` of a Ray actor takes it:
            ``{"num_gpus": 1}``, resources, a placement group. Of it ``max_restarts`` is how often
            each replica is replaced; -1, the default, stands for always.
        device: as of :class:`InferenceServer`, or a function of the replica's number. An actor
            sees only the GPUs that Ray gave it, so ``"cuda"`` is right for all of them.
        room: rows that one replica has room for, before a second one is used too; ``None`` for
            what the replicas themselves find, from what their forwards cost.
        retry: whether requests of a replica that dies are sent to another one. If not, their
            callers get :class:`~aioinfer.errors.ServerDiedError`.
        connection: as of :class:`RayTransport`.
        host: as of :class:`RayTransport`.
        tls: as of :class:`RayTransport`.
        start_timeout: seconds in which a replica must be ready, from when it was asked for.
        **options: what :class:`InferenceServer` takes besides. A ``weight_sync`` goes to each of
            the replicas, as one receiver more; ``own_loop`` is true unless given.

    Raises:
        ImportError: Ray is not installed.
    """

    _transport: RayReplicas

    def __init__(
        self,
        policy_factory: Callable[[], Any],
        num_replicas: int = 1,
        *,
        ray_options: Mapping[str, Any] | None = None,
        device: Any = None,
        room: int | None = None,
        retry: bool = True,
        connection: ConnectionKind = "auto",
        host: str | None = None,
        tls: TlsFactory | None = None,
        start_timeout: float = 120.0,
        **options: Any,
    ) -> None:
        ray = require_ray(type(self).__name__)
        check(policy_factory, {k: v for k, v in options.items() if k not in _OF_ANOTHER_HOST})
        if not callable(device):
            _check_device(device)
        self._factory = policy_factory
        self._device = device
        self._options = options
        self._count = arguments.count("num_replicas", num_replicas)
        self._new_actor, self._max_restarts = new_actors(ray, ray_options)
        self._serials = itertools.count()
        self._version = itertools.count(1)  # of the list of replicas
        self._names: dict[int, Name] = {}  # of those that serve
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self._scaling, self._loading = asyncio.Lock(), asyncio.Lock()
        self._background: BackgroundLoop | None = None
        self._weights: _Weights | None = None
        start_timeout = arguments.duration("start_timeout", start_timeout)
        self._door = Door(connection, host=host, tls=tls)
        super().__init__(RayReplicas(self._door, room=room, retry=retry), start_timeout)

    # -- how many -----------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether it was started and not closed since."""
        return self._background is not None

    @property
    def num_replicas(self) -> int:
        """How many replicas there are, those included that are being started or replaced.

        Of a server that does not run, how many it will start with.
        """
        if not self.is_alive:
            return self._count
        return sum([not keeper.done() for keeper in list(self._keepers.values())])

    async def scale(self, num_replicas: int) -> None:
        """Start replicas or close some, while the others serve; wait until that is done.

        Those that leave answer what they have accepted first. If one of the new ones cannot be
        started, none is added.

        Args:
            num_replicas: how many there are to be.

        Raises:
            ServerClosedError: the server is not running.
            ServerDiedError: a new replica ended, or was not ready in time.
            Exception: what the policy factory raised; its ``__cause__`` shows where.
        """
        count = arguments.count("num_replicas", num_replicas)
        await self._there(self._scale, count)

    def sync_scale(self, num_replicas: int) -> None:
        """Start replicas or close some; :meth:`scale` for threads."""
        blocking(self.scale(num_replicas))

    async def _scale(self, count: int) -> None:
        async with self._scaling:
            kept = [n for n, keeper in self._keepers.items() if not keeper.done()]
            free = (n for n in itertools.count() if n not in kept)
            await self._grow(list(itertools.islice(free, max(0, count - len(kept)))))
            # First those that do not serve: one of the others may be all there is.
            kept.sort(key=lambda number: (number in self._names, -number))
            await self._shrink(kept[: max(0, len(kept) - count)])
            self._count = count

    async def _grow(self, numbers: list[int]) -> None:
        loop = asyncio.get_running_loop()
        serving = {number: loop.create_future() for number in numbers}
        for number in numbers:
            self._keepers[number] = loop.create_task(
                self._keep(number, serving[number]), name=f"aioinfer keeps replica {number}"
            )
        try:
            await asyncio.gather(*serving.values())
        except BaseException:
            for future in serving.values():
                future.cancel()
            await self._shrink(numbers, drain=False)
            raise

    async def _shrink(self, numbers: list[int], *, drain: bool = True) -> None:
        await self._dismiss(numbers)
        leaving = [number for number in numbers if number in self._names]
        names = [self._names.pop(number) for number in leaving]
        await self._publish()
        calls = [self._call(number, "close", None, drain) for number in leaving]
        await asyncio.gather(*calls, return_exceptions=True)
        for number in numbers:
            self._kill(self._replicas.pop(number, None))
        await self._drop(names)

    # -- weights ------------------------------------------------------------

    async def _load(self, state_dict: dict[str, torch.Tensor]) -> dict[int, int]:
        return await self._there(self._load_there, state_dict)

    async def _load_there(self, state_dict: dict[str, torch.Tensor]) -> dict[int, int]:
        """Let the weights travel once, through Ray's object store."""
        ray = importlib.import_module("ray")
        reference = await anyio.to_thread.run_sync(ray.put, state_dict)
        async with self._loading:
            versions = await self._ask("load_state_dict", reference)
            self._weights = _Weights(reference, max(versions.values()))
            return versions

    # -- life of a replica --------------------------------------------------

    async def _keep(self, number: int, serving: asyncio.Future[None]) -> None:
        """Let there be a replica of this number, until cancelled."""
        ray = importlib.import_module("ray")
        failures = 0  # in a row
        for restarts in itertools.count():
            started_at = _clock()
            try:
                actor = await self._start_replica(number)
            except Exception as error:
                if not serving.done():  # who waits for it decides
                    serving.set_exception(error)
                    return
                _log.warning("replica %d cannot be replaced: %s", number, error)
            else:
                if not serving.done():
                    serving.set_result(None)
                await self._end_of(number, actor)
            if restarts == self._max_restarts:
                _log.warning("replica %d was replaced max_restarts=%d times", number, restarts)
                return
            if not ray.is_initialized():  # calling it would start another Ray
                return
            failures = 0 if _clock() - started_at > LONGEST_PAUSE_S else failures + 1
            await asyncio.sleep(_pause_s(failures))

    async def _start_replica(self, number: int) -> Any:
        """Start an actor, and let clients know once it serves the newest weights."""
        name = Name(number, next(self._serials))
        actor = self._new_actor()
        within = asyncio.timeout(self._start_timeout)
        try:
            async with within:
                weights = self._weights
                await self._at_desk("open", tuple(name))
                await self._serve(actor, name, weights)
                async with self._loading:
                    if self._weights is not None and self._weights is not weights:
                        await self._tell(actor, "load_state_dict", self._weights.reference)
                    self._replicas[number], self._names[number] = actor, name
            await self._publish()
        except BaseException as error:
            self._kill(actor)
            if self._names.get(number) == name:
                del self._names[number], self._replicas[number]
            with contextlib.suppress(ServerDiedError):
                await self._drop([name])
            if isinstance(error, TimeoutError) and within.expired():
                raise ServerDiedError(
                    f"replica {number} was not ready within start_timeout="
                    f"{self._start_timeout} s; does the cluster have what ray_options asks for?"
                ) from None
            raise
        return actor

    async def _serve(self, actor: Any, name: Name, weights: _Weights | None) -> None:
        device = self._device(name.number) if callable(self._device) else self._device
        options = {"device": device, **self._options}
        reference = None
        if weights is not None:
            reference, options["policy_version"] = weights
        await self._tell(actor, "serve", self._factory, self._door.to(name), options, reference)

    async def _tell(self, actor: Any, what: str, *args: Any) -> None:
        """Have something done by an actor that is not one of the replicas yet."""
        ray = importlib.import_module("ray")
        try:
            worked, answer = await self._answer_of(actor, what, *args)
        except ray.exceptions.RayActorError as error:
            raise ServerDiedError(f"a replica ended before it served: {error}") from error
        if not worked:
            raise rebuilt(answer)

    async def _end_of(self, number: int, actor: Any) -> None:
        """Wait until the actor has ended, and let clients know."""
        reason = "it has ended"
        try:
            await actor.stay.remote()
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
        _log.warning("replica %d has died: %s", number, reason)
        self._replicas[number] = None
        name = self._names.pop(number)
        await self._publish()
        await self._drop([name])

    def _lost(self, number: int, replica: Any) -> None:
        super()._lost(number, replica)
        self._kill(replica)  # if it lives, it is stuck; its keeper starts another one

    def _kill(self, actor: Any) -> None:
        if actor is not None:
            with contextlib.suppress(Exception):  # Ray itself has been shut down
                importlib.import_module("ray").kill(actor)

    # -- what clients know --------------------------------------------------

    async def _publish(self, *, is_open: bool = True) -> None:
        """Let clients know which replicas serve; none, if the server is not open."""
        version = next(self._version)
        names = sorted(self._names.values()) if is_open else []
        self._transport.update(version, names)
        await self._at_desk("publish", version, tuple(map(tuple, names)), is_open)

    async def _drop(self, names: list[Name]) -> None:
        """The actors of these names have ended."""
        for name in names:
            await self._at_desk("drop", tuple(name))

    async def _at_desk(self, method: str, *args: Any) -> None:
        await self._door._told(getattr(self._door.desk, method).remote(*args))

    # -- life of the server -------------------------------------------------

    async def _open(self) -> None:
        with anyio.CancelScope(shield=True):
            self._background = await anyio.to_thread.run_sync(BackgroundLoop)
        atexit.register(self._at_exit)
        await self._there(self._open_there)

    async def _open_there(self) -> None:
        self._scaling, self._loading = asyncio.Lock(), asyncio.Lock()
        await self._grow(list(range(self._count)))

    async def _close_all(self, timeout: float | None, drain: bool) -> None:
        await self._there(self._close_all_there, timeout, drain)

    async def _close_all_there(self, timeout: float | None, drain: bool) -> None:
        await self._dismiss(list(self._keepers))
        await self._publish(is_open=False)
        await super()._close_all(timeout, drain)

    async def _end(self) -> None:
        background = self._background
        if background is None:
            return
        try:
            with contextlib.suppress(ServerClosedError, ServerDiedError):
                await self._there(self._end_there)
        finally:
            self._background = None
            atexit.unregister(self._at_exit)
            await anyio.to_thread.run_sync(background.close)

    async def _end_there(self) -> None:
        await self._dismiss(list(self._keepers))
        names = list(self._names.values())
        self._names.clear()
        replicas, self._replicas = self._replicas, {}
        for replica in replicas.values():
            self._kill(replica)
        await self._publish(is_open=False)
        await self._drop(names)

    async def _dismiss(self, numbers: list[int]) -> None:
        """Start no more actors for these replicas."""
        keepers = [self._keepers.pop(number) for number in numbers if number in self._keepers]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    def _at_exit(self) -> None:
        if self._background is not None:  # before Ray ends the actors, and they are replaced
            ending = asyncio.run_coroutine_threadsafe(self._end_there(), self._background.loop)
            with contextlib.suppress(Exception):
                ending.result(_AT_EXIT_S)

    # -- on the loop of the server ------------------------------------------

    async def _ask(self, what: str, *args: Any) -> dict[int, Any]:
        return await self._there(super()._ask, what, *args)

    async def _send(self, replica: Any, what: str, *args: Any) -> Answer:
        ray = importlib.import_module("ray")
        try:
            answer: Answer = await replica.ask.remote(what, *args)
        except ray.exceptions.RayActorError:
            raise
        except Exception as error:  # something cannot be sent, or is lost; the replica lives
            return False, described(error)
        return answer

    async def _there(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run a coroutine function on the server's own loop."""
        background = self._background
        if background is None:
            raise ServerClosedError("this server is not running; start it first")
        if background.loop is asyncio.get_running_loop():
            return await function(*args)
        outcome = asyncio.run_coroutine_threadsafe(function(*args), background.loop)
        try:
            return await asyncio.wrap_future(outcome)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ServerClosedError("this server was closed meanwhile") from None


class _Weights(NamedTuple):
    """The newest that every replica has been given."""

    reference: Any
    """Where Ray keeps them."""
    version: int


def _pause_s(failures: int) -> float:
    """Before a replica is replaced that did not last, so often in a row."""
    return 0.0 if failures <= 1 else min(FIRST_PAUSE_S * 2 ** (failures - 2), LONGEST_PAUSE_S)


def _check_device(device: Any) -> None:
    try:  # it need not be one of this host
        if device is not None:
            torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device or None, got {device!r}") from error
