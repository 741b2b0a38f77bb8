"""A local Ray for the tests: one per process, started when first needed."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import wait_until

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray

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
    threads = set(threading.enumerate())
    yield

    def left() -> list[str]:
        gc.collect()
        return [
            thread.name
            for thread in threading.enumerate()
            if thread not in threads and thread.name.startswith("aioinfer-")
        ]

    wait_until(lambda: not left(), "the end of the threads")
