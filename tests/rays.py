"""A local Ray for the tests: one per process, started when first needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import threads_end

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray

from aioinfer.transports import ray as relays

TESTS = Path(__file__).parent
"""Where actors find what tests share, and the package beside it."""


def start_ray() -> Any:
    """Start it, unless it runs; it ends with the process."""
    if not ray.is_initialized():
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80 * 1024 * 1024,
            runtime_env={
                "env_vars": {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
            },
        )
    return ray


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail a test after which a thread of the library is left.

    In place of the one that looks at descriptors too: Ray opens and closes connections of its
    own when it likes.
    """
    yield from threads_end()


class Relays:
    """Relays that are used by one transport after the other: making one takes a second."""

    def __init__(self) -> None:
        self._free: list[Any] = []
        self._used: list[Any] = []
        self._make = relays._new_relay

    def take(self, ray: Any) -> Any:
        """In place of what makes a new one."""
        self._used.append(self._free.pop() if self._free else self._make(ray))
        return self._used[-1]

    def give_back(self) -> None:
        """Nobody uses those any more that were taken."""
        self._free += self._used
        self._used.clear()
