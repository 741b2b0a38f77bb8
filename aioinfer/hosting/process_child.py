"""What runs in the process of a :class:`~aioinfer.ProcessInferenceServer`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import anyio
import anyio.to_thread

from aioinfer.blocking import new_event_loop
from aioinfer.hosting.base import described, respond
from aioinfer.server import InferenceServer
from aioinfer.transports.mp import MPTransport

READY = 0
"""The number of the question that is asked by starting the child."""
_OUTLIVE_S = 1.0
"""Seconds that the child has to end once its parent has."""


def serve(
    control: Connection,
    parent: int,
    factory: Callable[[], Any],
    transport: MPTransport,
    options: dict[str, Any],
) -> None:
    """What the child does, from its first moment to its last."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal
    threading.Thread(target=_outlive_nobody_for_long, args=(parent,), daemon=True).start()
    try:
        server = InferenceServer(factory(), transport, **{"own_loop": True, **options})
        gc.collect()
        gc.freeze()  # modules and policy stay; looking through them would hold up a batch
    except BaseException as error:
        send(control, (READY, False, described(error)))
        return
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            runner.run(_run(server, control, parent))
        except* OSError:  # the parent has ended, and nobody listens any more
            pass


async def _run(server: InferenceServer, control: Connection, parent: int) -> None:
    try:
        await server.astart()
    except Exception as error:
        send(control, (READY, False, described(error)))
        return
    try:
        send(control, (READY, True, None))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_outlive_nobody, parent, tasks.cancel_scope)
            await _answer_all(server, control)
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await server.aclose(drain=False)


async def _outlive_nobody(parent: int, scope: anyio.CancelScope) -> None:
    """End the server once its parent has ended, however that did."""
    with contextlib.suppress(ProcessLookupError), _end_of_parent(parent) as descriptor:
        await anyio.wait_readable(descriptor)
    scope.cancel()


def _outlive_nobody_for_long(parent: int) -> None:
    """End the process a while after its parent, whatever else it is stuck in."""
    with contextlib.suppress(ProcessLookupError), _end_of_parent(parent) as descriptor:
        connection.wait([descriptor])
    threading.Event().wait(_OUTLIVE_S)
    os._exit(1)


@contextlib.contextmanager
def _end_of_parent(parent: int) -> Iterator[int]:
    """What is readable once the parent has ended."""
    # Not the end of the pipe: children that were forked later may hold it open.
    if hasattr(os, "pidfd_open"):
        descriptor = os.pidfd_open(parent)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    else:
        known = multiprocessing.parent_process()
        assert known is not None
        yield known.sentinel


async def _answer_all(server: InferenceServer, control: Connection) -> None:
    """Do what the parent asks, until it asks to close."""
    closing = False
    while not closing:
        await anyio.wait_readable(control.fileno())
        # Waiting may have made the pipe non-blocking, and of large weights only the beginning is
        # here: a thread waits for the rest.
        os.set_blocking(control.fileno(), True)
        try:
            question, what, args = pickle.loads(await anyio.to_thread.run_sync(control.recv_bytes))
        except EOFError:
            return
        closing = what == "close"
        send(control, (question, *await respond(server, what, args)))


def send(control: Connection, message: Any) -> None:
    """Write a message to the pipe between the two processes."""
    # Plain pickle: the one of multiprocessing would move tensors of the caller's own model into
    # shared memory.
    control.send_bytes(pickle.dumps(message))
