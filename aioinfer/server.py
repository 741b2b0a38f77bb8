"""The server as its users see it: what it is made of, and its life."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import anyio.to_thread
import torch
from tensordict import TensorDictBase

import aioinfer.arguments as arguments
from aioinfer.batching import DEFAULT_STATIC_TIMEOUT_S, DEFAULT_TIMEOUT_S, Batcher
from aioinfer.blocking import BackgroundLoop
from aioinfer.client import InferenceClient, SyncInferenceClient
from aioinfer.clock import Clock, MonotonicClock
from aioinfer.collation import CollateFn
from aioinfer.devices.assembly import assemble, example_request, forward_sizes
from aioinfer.errors import InvalidRequestError
from aioinfer.executor import Executor
from aioinfer.near import NearExecutor
from aioinfer.sampling import sampling_modules
from aioinfer.serving import Serving
from aioinfer.signature import Signature
from aioinfer.stats import ServerStats, StatsRecorder
from aioinfer.transports.base import InferenceTransport
from aioinfer.weights.base import Link, WeightSyncScheme
from aioinfer.weights.receiving import Freshness, ServedWeights, StalenessPolicy
from aioinfer.weights.slots import Policy

T = TypeVar("T")

_STUCK_S = 0.5
"""Seconds beyond its timeout that a shutdown waits for a sign of the loop."""


class InferenceServer:
    """Serves one policy to many actors, in batches.

    In asyncio, the server is a task of the running loop::

        async with InferenceServer(policy, AsyncioTransport(), max_batch_size=32) as server:
            client = server.client()
            td = await client(TensorDict({"observation": obs}))

    For threads, it runs on an event loop of its own in a background thread::

        transport = ThreadingTransport()
        server = InferenceServer(policy, transport, max_batch_size=32)
        server.start()
        client = transport.client()
        td = client(TensorDict({"observation": obs}))
        server.shutdown()

    A closed server can be started again, on the same event loop or another one. The policy is
    used as it is: put it into ``eval()`` mode if that is how it should act.

    Args:
        model: maps a TensorDict of ``[B]`` rows to one of ``[B]`` rows. An ``nn.Module``,
            ``TensorDictModule`` or any callable. It runs under :func:`torch.no_grad`, on one
            thread of its own; ``own_loop`` is the exception. If it has ``in_keys``, requests
            without them are refused; if it has ``out_keys``, those are what a reply holds.
        transport: the link to the actors, or several; ``None`` serves coroutines of any event
            loop and threads of this process.
        max_batch_size: rows in a forward at most.
        min_batch_size: rows worth a forward: a batch leaves once it has them, or after
            ``timeout``. ``None`` lets the server decide, from what it learns about its
            callers and the cost of a forward (see :doc:`/batching`); nothing needs tuning.
        timeout: seconds that the server may hold a request back to fill its batch, at most.
            ``None`` stands for 0.01 with a ``min_batch_size`` and for 0.05 without, where it
            is a bound that is rarely reached.
        objective: what the server's own decisions are for: ``"throughput"`` in the long run,
            or ``"latency"``, the mean latency of the requests at hand.
        batch_sizes: the only sizes a forward may have, for policies that were compiled or
            captured for some; smaller batches are padded by repeating their last row.
            Ascending, the last one ``max_batch_size``. ``None`` for any size.
        fixed_batch: give every forward the same size, ``max_batch_size`` rounded up to a
            multiple of 16, so that what a row gets does not depend on who shares its batch,
            to the last bit (see :doc:`/reproducibility`).
        max_queue_size: rows that may wait; more wait outside, or are refused if they were
            sent with ``block=False``. ``None`` stands for 64 full batches, at least 4096 rows.
        collate_fn: makes a batch of a list of single-row TensorDicts; ``None`` stacks them.
        device: where the policy is moved to, and each batch; ``None`` leaves both.
        devices: several such devices: each gets a replica of the policy, with a thread of its
            own, and batches go to whichever is free. The policy must be an ``nn.Module``, and
            updates may change the values of its parameters and buffers, nothing else.
        compile: whether the policy is compiled by :func:`torch.compile`; or its arguments, as a
            dict. Where that fails it runs as it is, and one warning says why.
        cuda_graphs: whether the policy is captured as CUDA graphs, one for each of
            ``batch_sizes``, by default 1, 2, 4, ... and ``max_batch_size`` (see
            :doc:`/accelerators`). Where that fails it runs as it is, and one warning says why.
        example: a request of one row like those to come: the server runs the policy on it in all
            sizes, and so compiles and captures it, before it accepts requests.
        output_device: where replies are moved to; ``"cuda"`` leaves each on the device that
            computed it. ``None`` brings them to the CPU if there is a ``device``, and leaves them
            where the policy put them if there is none.
        policy_version: the version the policy starts with.
        policy_version_key: where a reply says which version computed it (int64, of the
            request's batch size); ``None`` leaves it out.
        return_inputs: whether a reply holds the request's own entries too.
        weight_sync: brings new weights while the server runs (see :doc:`/weights`). The server
            then serves copies of ``model``, which must be an ``nn.Module``.
        weight_sync_model_id: what the weights are called; it names this server in reports.
        max_staleness: versions that the weights in service may be behind the newest that the
            trainer has; ``None`` for any number.
        max_age_s: seconds that weights may be in service; ``None`` for any time.
        staleness_policy: what becomes of requests while the weights are older than that:
            ``"reject"`` answers them with :class:`~aioinfer.errors.WeightSyncError`, ``"wait"``
            lets them wait for newer weights, and ``"tag"`` serves them; every reply then says
            in ``"policy_stale"`` (bool, of the request's batch size) whether they were.
        own_loop: whether the event loop that the server is started on is there for it and its
            actors alone, and may be blocked by a forward. Short ones, up to half a millisecond,
            then run on the loop, which saves two changes of thread per batch. They also run in
            whatever mode of torch its thread is in, such as that of a coroutine which awaits
            within ``torch.autocast``. The loop that :meth:`start` makes is such a loop anyway;
            only what answers callers of this process and is no ``nn.Module`` stays on the thread
            there.
        clock: the clock of everything that has to do with time; for tests.
        executor: runs the batches; for tests. ``None`` is one thread.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range; the message says what is allowed.
    """

    def __init__(
        self,
        model: Policy,
        transport: InferenceTransport | Sequence[InferenceTransport] | None = None,
        *,
        max_batch_size: int = 64,
        min_batch_size: int | None = None,
        timeout: float | None = None,
        objective: Literal["throughput", "latency"] = "throughput",
        batch_sizes: Sequence[int] | None = None,
        fixed_batch: bool = False,
        max_queue_size: int | None = None,
        collate_fn: CollateFn | None = None,
        device: torch.device | str | None = None,
        devices: Sequence[torch.device | str] | None = None,
        compile: bool | Mapping[str, Any] = False,
        cuda_graphs: bool = False,
        example: TensorDictBase | None = None,
        output_device: torch.device | str | None = None,
        policy_version: int = 0,
        policy_version_key: Any = "policy_version",
        return_inputs: bool = False,
        weight_sync: Any = None,
        weight_sync_model_id: str = "policy",
        max_staleness: int | None = None,
        max_age_s: float | None = None,
        staleness_policy: StalenessPolicy = "reject",
        own_loop: bool = False,
        clock: Clock | None = None,
        executor: Executor | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable on a TensorDict, got {model!r}")
        self._transports = _transports(transport)
        self._max_batch_size = arguments.count("max_batch_size", max_batch_size)
        self._min_batch_size = (
            None if min_batch_size is None else arguments.count("min_batch_size", min_batch_size)
        )
        if self._min_batch_size is not None and self._min_batch_size > self._max_batch_size:
            raise ValueError(
                f"min_batch_size must be between 1 and max_batch_size={max_batch_size}, "
                f"got {min_batch_size}"
            )
        if timeout is None:
            timeout = DEFAULT_TIMEOUT_S if min_batch_size is None else DEFAULT_STATIC_TIMEOUT_S
        self._timeout = arguments.duration("timeout", timeout)
        if objective not in ("throughput", "latency"):
            raise ValueError(f"objective must be 'throughput' or 'latency', got {objective!r}")
        self._far_sighted = objective == "throughput"
        self._sizes = forward_sizes(batch_sizes, fixed_batch, cuda_graphs, self._max_batch_size)
        self._max_queue_size = (
            max(4096, 64 * self._max_batch_size)
            if max_queue_size is None
            else arguments.count("max_queue_size", max_queue_size)
        )
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn must be callable or None, got {collate_fn!r}")
        self._own_loop = arguments.flag("own_loop", own_loop)
        self._clock: Clock = MonotonicClock() if clock is None else clock
        if isinstance(policy_version, bool) or not isinstance(policy_version, int):
            raise TypeError(f"policy_version must be an int, got {policy_version!r}")
        self._in_keys = None if collate_fn is not None else getattr(model, "in_keys", None)
        self._replicas = assemble(
            model,
            policy_version,
            device=device,
            devices=devices,
            output_device=output_device,
            fixed_batch=fixed_batch,
            compile=compile,
            cuda_graphs=cuda_graphs,
            sizes=self._sizes,
            executor=executor,
            clock=self._clock,
            collate_fn=collate_fn,
            out_keys=getattr(model, "out_keys", None),
            version_key=arguments.key("policy_version_key", policy_version_key),
            return_inputs=arguments.flag("return_inputs", return_inputs),
        )
        self._slots = self._replicas.first
        self._example = None if example is None else example_request(example)
        self._executor = self._replicas.executor
        self._freshness = Freshness(
            self._slots, self._clock, max_staleness, max_age_s, staleness_policy
        )
        self._weight_sync = None if weight_sync is None else WeightSyncScheme.of(weight_sync)
        self._link: Link | None = None
        if self._weight_sync is not None:
            self._slots.manifest()  # refuses what has no weights
            # What the caller has in its hands, and perhaps trains, must not be what serves.
            twice = self._weight_sync.mode == "slots"
            if twice or self._weight_sync.in_process:
                self._slots.own(twice=twice)
        self._weights = ServedWeights(
            weight_sync_model_id, self._slots, self._freshness, self._count, self._on_published
        )
        tags = self._freshness.limited and staleness_policy == "tag"
        self._holds_back = self._freshness.limited and not tags
        if tags:
            self._replicas.tag(self._freshness)
        self._recorder = StatsRecorder(self._clock())
        self._serving: Serving | None = None
        self._task: asyncio.Task[None] | None = None
        self._background: BackgroundLoop | None = None
        self._lifecycle = threading.RLock()

    # -- clients ------------------------------------------------------------

    def client(self) -> InferenceClient | SyncInferenceClient:
        """Return a new client of the (first) transport, of the kind natural for it."""
        return self._transports[0].client()

    def async_client(self) -> InferenceClient:
        """Return a new client for coroutines, of the (first) transport."""
        return self._transports[0].async_client()

    def sync_client(self) -> SyncInferenceClient:
        """Return a new client for threads, of the (first) transport."""
        return self._transports[0].sync_client()

    # -- the policy ---------------------------------------------------------

    @property
    def model(self) -> Policy:
        """The policy. Change it through :meth:`update_model` only."""
        return self._slots.current.model

    @property
    def policy_version(self) -> int:
        """The version that serves now."""
        return self._replicas.version

    def update_model(self, update_fn: Callable[[Any], T], *, mark_weight_update: bool = True) -> T:
        """Change the policy between two batches, and wait until that is done.

        Args:
            update_fn: called with the policy on the executor thread, with gradients enabled
                and no forward running.
            mark_weight_update: whether this makes a new version of the policy.

        Returns:
            What ``update_fn`` returned. If it raises, the version stays and the exception
            comes from here; what it had changed by then stays changed.

        Raises:
            RuntimeError: called on the server's own event loop; await :meth:`aupdate_model`.
        """
        self._not_on_loop("update_model()", "await aupdate_model()")
        return self._replicas.update(self._update(update_fn, mark_weight_update)).result()

    async def aupdate_model(
        self, update_fn: Callable[[Any], T], *, mark_weight_update: bool = True
    ) -> T:
        """Change the policy between two batches; the awaitable :meth:`update_model`."""
        future = self._replicas.update(self._update(update_fn, mark_weight_update))
        return await asyncio.wrap_future(future)

    def _update(self, update_fn: Callable[[Any], T], mark: bool) -> Callable[[], T]:
        def update() -> T:
            result = self._slots.update(update_fn, mark=mark)
            if mark:
                self._freshness.renewed()
                self._count("weight_updates", 1)
                self._on_new_weights()
            return result

        return self._slots.after_caller(update)

    # -- what it does -------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the server serves."""
        task = self._task
        return task is not None and not task.done() and not task.get_loop().is_closed()

    def stats(self, *, reset: bool = False) -> ServerStats:
        """Return what the server did since it was started, or since the last reset.

        Args:
            reset: whether to start counting anew.
        """
        serving = self._serving
        return self._recorder.snapshot(
            self._clock(),
            queue_depth=0 if serving is None else serving.queue_depth,
            policy_version=self.policy_version,
            policy_staleness=self._freshness.staleness,
            policy_age_s=self._freshness.age_s,
            reset=reset,
        )

    # -- life in asyncio ----------------------------------------------------

    async def __aenter__(self) -> Self:
        return await self.astart()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def astart(self) -> Self:
        """Start the server on the running event loop; ``async with`` does the same.

        Returns:
            The server itself.

        Raises:
            RuntimeError: it is already running, or one of its transports serves another server.
            Exception: what the policy raised while it was warmed up, or a weight-sync scheme while
                it was attached.
        """
        await self._open(self._own_loop)
        return self

    async def aclose(self, *, drain: bool = True) -> None:
        """Close the server; harmless if it is closed.

        New requests are refused with :class:`~aioinfer.errors.ServerClosedError` from now on.

        Args:
            drain: whether requests accepted so far are still answered; if not, those that
                wait fail with :class:`~aioinfer.errors.ServerClosedError`.
        """
        task, serving = self._task, self._serving
        if task is None or serving is None or not self.is_alive:
            return
        if serving.loop is not asyncio.get_running_loop():
            await anyio.to_thread.run_sync(lambda: self.shutdown(drain=drain))
            return
        await self._close(None, drain)

    async def _open(self, may_block: bool) -> None:
        if self.is_alive:
            raise RuntimeError("this server is already running; close it before starting it again")
        if self._serving is not None and self._serving.loop.is_closed():
            self._serving.abandon()  # its loop was closed before it could end
        self._recorder = StatsRecorder(self._clock())
        if isinstance(self._executor, NearExecutor):
            self._executor.allowed = may_block
        batcher = Batcher(
            max_batch_size=self._max_batch_size,
            min_batch_size=self._min_batch_size,
            timeout=self._timeout,
            max_queue_size=self._max_queue_size,
            batch_sizes=self._sizes,
            far_sighted=self._far_sighted,
            independent=not self._is_called_from_here,
            executors=len(self._replicas),
        )
        serving = Serving(
            self._transports,
            batcher,
            self._executor,
            self._replicas.run,
            self._recorder,
            self._clock,
            self._admit,
            None if self._example is None else partial(self._replicas.warm_up, self._example),
            self._freshness if self._holds_back else None,
        )
        # First the weights, so that the first answer is of the newest there are.
        try:
            if self._weight_sync is not None:
                await anyio.to_thread.run_sync(self._attach_weight_sync, self._weight_sync)
            await serving.open()
        except BaseException:
            self._detach_weight_sync()
            raise
        self._serving = serving
        self._task = asyncio.create_task(serving.run(), name="InferenceServer")
        self._task.add_done_callback(lambda _: self._detach_weight_sync())

    async def _close(self, timeout: float | None, drain: bool) -> None:
        serving, task = self._serving, self._task
        assert serving is not None
        assert task is not None
        serving.close(drain=drain)
        # Not awaited itself: cancelling aclose() must not cancel the server's task.
        done, _ = await asyncio.wait([task], timeout=timeout)
        if not done:
            serving.close(drain=False)
            await asyncio.wait([task])

    # -- life in threads ----------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def start(self) -> Self:
        """Start the server on an event loop of its own, in a background thread.

        Returns:
            The server itself.

        Raises:
            RuntimeError: it is already running.
        """
        with self._lifecycle:
            if self.is_alive:
                raise RuntimeError(
                    "this server is already running; close it before starting it again"
                )
            if self._background is not None:  # of a server that ended without being shut down
                self.shutdown()
            background = BackgroundLoop()
            try:
                background.call(self._open, self._may_block_background())
            except BaseException:
                background.close()
                raise
            self._background = background
            # A program that forgets shutdown() still ends, without a forward being cut off.
            atexit.register(self._at_exit)
        return self

    @property
    def _is_called_from_here(self) -> bool:
        """Whether any callers are of this process, and so compete for its interpreter."""
        return any(transport.in_process for transport in self._transports)

    def _may_block_background(self) -> bool:
        # A callable might wait for one of its callers, if those are of this process. A module
        # computes.
        is_module = isinstance(self.model, torch.nn.Module)
        return self._own_loop or is_module or not self._is_called_from_here

    def _at_exit(self) -> None:
        self.shutdown(timeout=2.0)

    def shutdown(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Close the server from a thread, and wait for it; harmless if it is closed.

        Args:
            timeout: seconds to drain; then what still waits fails with
                :class:`~aioinfer.errors.ServerClosedError`. ``None`` waits for as long as
                the accepted requests take.
            drain: as in :meth:`aclose`.

        Raises:
            RuntimeError: called on the server's own event loop (await :meth:`aclose` there), or
                from an update or a forward of its own policy, for whose end it waits.
        """
        if timeout is not None:
            timeout = arguments.duration("timeout", timeout)
        self._not_on_loop("shutdown()", "await aclose()")
        if self._executor.is_here():
            raise RuntimeError("shutdown() from the server's own executor thread waits for itself")
        with self._lifecycle:
            background, self._background = self._background, None
            if background is not None:
                atexit.unregister(self._at_exit)
                self._end(background, timeout, drain)
                return
        serving = self._serving
        if serving is not None and self.is_alive:
            asyncio.run_coroutine_threadsafe(self._close(timeout, drain), serving.loop).result()

    def _end(self, background: BackgroundLoop, timeout: float | None, drain: bool) -> None:
        closing = background.begin(self._close(timeout, drain)) if self.is_alive else None
        try:
            if closing is not None:
                closing.result(None if timeout is None else timeout + _STUCK_S)
        except TimeoutError:  # a forward that does not end, on the loop itself
            assert self._serving is not None
            self._serving.give_up()
            background.close_soon()
        except BaseException:
            background.close()
            raise
        else:
            background.close()

    # -- inside -------------------------------------------------------------

    def _attach_weight_sync(self, weight_sync: WeightSyncScheme) -> None:
        self._detach_weight_sync()  # of a server whose loop was closed under it
        self._link = weight_sync.attach(self._weights)
        self._link.greet()

    def _detach_weight_sync(self) -> None:
        link, self._link = self._link, None
        if link is not None and self._weight_sync is not None:
            self._weight_sync.detach(link)

    def _count(self, name: str, number: int) -> None:
        self._recorder.count(name, number)

    def _on_published(self) -> None:
        if len(self._replicas) > 1:
            self._replicas.follow()
        self._on_new_weights()

    def _on_new_weights(self) -> None:
        serving = self._serving
        if serving is not None and self._holds_back and self.is_alive:
            serving.weights_changed()

    def _not_on_loop(self, what: str, instead: str) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        serving = self._serving
        if serving is not None and serving.loop is running and self.is_alive:
            raise RuntimeError(
                f"{what} would block the server's own event loop; use `{instead}` there"
            )

    def _admit(self, signature: Signature) -> None:
        for in_key in self._in_keys or ():
            if not _has(signature, in_key):
                raise InvalidRequestError(
                    f"the request has no {in_key!r}, which is one of the policy's in_keys "
                    f"{list(self._in_keys or ())!r}; it has: {signature}"
                )
        if signature.mode is not None and not sampling_modules(self.model):
            raise InvalidRequestError(
                f"interaction_type={signature.mode.value!r} was given, but the policy has no "
                "ProbabilisticTensorDictModule that could sample accordingly"
            )


def _has(signature: Signature, in_key: Any) -> bool:
    """Whether a request holds ``in_key``, as a leaf or as a nested TensorDict."""
    wanted = in_key if isinstance(in_key, tuple) else (in_key,)
    for key in signature.keys:
        path = key if isinstance(key, tuple) else (key,)
        if path[: len(wanted)] == wanted:
            return True
    return False


def _transports(transport: Any) -> list[InferenceTransport]:
    if transport is None:
        return [InferenceTransport.default()]
    transports = [transport] if isinstance(transport, InferenceTransport) else transport
    if not isinstance(transports, Sequence) or not all(
        isinstance(t, InferenceTransport) for t in transports
    ):
        raise TypeError(
            "transport must be an InferenceTransport, a sequence of them, or None, "
            f"got {transport!r}"
        )
    if not transports:
        raise ValueError("transport is an empty sequence; give at least one, or None")
    if len({id(t) for t in transports}) < len(transports):
        raise ValueError(f"transport holds the same transport twice: {transport!r}")
    return list(transports)
