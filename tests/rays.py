"""A local Ray for the tests: one per process, started when first needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
