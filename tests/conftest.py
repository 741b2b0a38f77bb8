"""What every test runs under: both event loops, no blocking call on a loop, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import blockbuster.blockbuster
import pytest
import torch
from programs import Programs
from tensordict import TensorDict

import aioinfer

try:
    import uvloop
except ImportError:  # there is none for every platform
    uvloop = None

pytest.register_assert_rewrite("helpers", "weights")

LEFT_BEHIND_S = 5.0
"""Seconds that threads have to end, and descriptors to close, after a test."""
FREEZE_EVERY = 50
"""Tests after which what is still there will stay."""


_LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.SelectorEventLoop}
if uvloop is not None:
    _LOOPS["uvloop"] = uvloop.new_event_loop


def pytest_configure(config: pytest.Config) -> None:
    """Let the programs of tests be interrupted, even if whoever runs the tests ignores Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # which they would inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every async test on asyncio's own event loop and on uvloop, unless marked otherwise."""
    only = _only_loop(item)
    return _LOOPS if only is None else {only: _LOOPS[only]}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the other event loop where tests make their own, too; keep groups together."""

    def is_left_out(item: pytest.Item) -> bool:
        only, call = _only_loop(item), getattr(item, "callspec", None)
        if only is None or call is None:
            return False
        return call.params.get("new_loop", _LOOPS[only]) is not _LOOPS[only]

    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item)]
    # xdist 3.8 writes a test's group, of which one worker runs all, so that a cluster starts once,
    # into ``_nodeid``. pytest 9.2 does not read that any more.
    for item in items:
        named = vars(item).get("_nodeid")
        if named is not None and item.nodeid != named:
            item._id = type(item.id).parse(named)


def _only_loop(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("event_loop")
    return marker.args[0] if marker is not None and marker.args[0] in _LOOPS else None


@pytest.fixture(scope="session", autouse=True)
def _warmed_up() -> None:
    """Get out of the way what is made once per process and stays."""
    torch.set_num_threads(1)  # the tests are about small tensors, on as many cores as workers
    if uvloop is not None:
        loop = uvloop.new_event_loop()  # libuv keeps one pipe for signals, for ever
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@pytest.fixture(scope="session")
def _freeze_what_stays() -> Callable[[], None]:
    modules, tests = 0, itertools.count()

    def freeze() -> None:
        nonlocal modules
        if next(tests) % FREEZE_EVERY == 0 or len(sys.modules) > modules:
            modules = len(sys.modules)
            gc.collect()
            gc.freeze()

    return freeze


@pytest.fixture(autouse=True)
def _what_stays_is_frozen(_freeze_what_stays: Callable[[], None]) -> None:
    """Have the collection after a test look at the objects of that test.

    There are a hundred times as many of modules, some of which a test is the first to import;
    and pytest keeps a few of each test.
    """
    _freeze_what_stays()


# -- other processes --------------------------------------------------------


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Runs programs, one after the other."""
    programs = Programs()
    yield programs
    programs.close()


# -- clusters ---------------------------------------------------------------


@pytest.fixture(scope="session")
def monarch() -> Iterator[None]:
    """Monarch, with all that it leaves open once it has started; it starts once per process."""
    actor = pytest.importorskip("monarch.actor")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # for the actors' processes
    transport = aioinfer.MonarchTransport("rpc")

    async def call() -> None:
        async with aioinfer.InferenceServer(lambda td: td, transport):
            await transport.async_client()(TensorDict({"observation": torch.ones(1)}))

    asyncio.run(call())
    yield
    actor.shutdown_context().get(timeout=10)


# -- no blocking call on an event loop --------------------------------------


@pytest.fixture(scope="session")
def _watchdog() -> Iterator[blockbuster.BlockBuster]:
    """Make a blocking call raise where an event loop runs in the calling thread."""
    with blockbuster.blockbuster_ctx() as watchdog:
        for write in ("io.TextIOWrapper.write", "io.BufferedWriter.write"):
            function = watchdog.functions[write]
            # pytest-timeout interrupts a test that hangs and prints where, on the test's loop.
            function.can_block_in("pytest_timeout.py", {"timeout_sigalrm"})
            # pytest keeps a log file on the root logger, /dev/null unless told otherwise.
            function.can_block_in("logging/__init__.py", {"callHandlers"})
        # A module that another thread is importing is waited for, as are its contents.
        for acquire in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
            watchdog.functions[acquire].can_block_in(
                "<frozen importlib._bootstrap>", {"_lock_unlock_module", "_find_and_load"}
            )
        # What a policy does is its own affair, also where a loop is there for nothing else.
        for function in watchdog.functions.values():
            function.can_block_in("aioinfer/near.py", {"run_in_turn"})
        yield watchdog


@pytest.fixture(autouse=True)
def blocking_calls(
    _watchdog: blockbuster.BlockBuster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Fail a test in which something blocked an event loop, its own or a server's.

    The exception alone is not enough: in a callback of a loop it is only logged. A test that
    wants to see a blocking call caught clears the list.
    """
    calls: list[str] = []

    class Recorded(blockbuster.BlockingError):
        def __init__(self, func: str) -> None:
            super().__init__(func)
            calls.append("".join([f"{func}\n", *traceback.format_stack()[-8:-2]]))

    monkeypatch.setattr(blockbuster.blockbuster, "BlockingError", Recorded)
    yield calls
    if calls:
        pytest.fail("blocking call on an event loop: " + "\n".join(calls), pytrace=False)


# -- no error that only a log knows of --------------------------------------


class _Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(logging.Formatter().format(record))


@pytest.fixture(autouse=True)
def logged_errors() -> Iterator[list[str]]:
    """Fail a test in which asyncio or the library logged an error.

    That is how asyncio tells of an exception in a callback, of a task that was destroyed, of
    an exception that nobody retrieved. A test that provokes one clears the list.
    """
    keeper = _Keeper()
    loggers = [logging.getLogger("asyncio"), logging.getLogger("aioinfer")]
    for logger in loggers:
        logger.addHandler(keeper)
    yield keeper.records
    gc.collect()  # some are logged when their object is collected
    for logger in loggers:
        logger.removeHandler(keeper)
    if keeper.records:
        pytest.fail("an error was logged: " + "\n".join(keeper.records), pytrace=False)


# -- nothing left behind ----------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test after which a thread of the library or a descriptor is left."""
    threads = set(threading.enumerate())
    descriptors = _descriptors()
    yield
    give_up_at = time.monotonic() + LEFT_BEHIND_S
    while True:
        left = [f"thread {name}" for name in _our_threads(threads)]
        left += [f"descriptor {fd} -> {what}" for fd, what in _descriptors() - descriptors]
        if not left:
            return
        if time.monotonic() > give_up_at:
            pytest.fail(f"left behind: {', '.join(left)}", pytrace=False)
        gc.collect()
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _no_task_left(nothing_left: None, request: pytest.FixtureRequest) -> None:
    """Check the tasks of an async test's own loop, while that loop is still there."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_tasks_of_this_loop")


@pytest.fixture
async def _tasks_of_this_loop() -> AsyncIterator[None]:
    """Fail a test after which a task is left on its event loop."""
    yield
    own = asyncio.current_task()
    for _ in range(200):  # a task that is about to end may do so
        left = [task for task in asyncio.all_tasks() if task is not own]
        if not left:
            return
        await asyncio.sleep(0)
    pytest.fail(f"left behind: {left}", pytrace=False)


def _our_threads(before: set[threading.Thread]) -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread not in before and thread.name.startswith("aioinfer-")
    ]


def _descriptors() -> set[tuple[str, str]]:
    """The open descriptors that an event loop or a link could have made."""
    found = set()
    try:
        names = os.listdir("/proc/self/fd")
    except FileNotFoundError:  # not Linux
        return found
    for name in names:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # closed since
            continue
        if target.startswith(("socket:", "pipe:", "anon_inode:", "/dev/shm", "/memfd:")):
            found.add((name, target))
    return found
