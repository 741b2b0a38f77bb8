"""Sampling modes: how a request makes a probabilistic policy act, and nobody else's.

``tensordict.nn.set_interaction_type`` sets one variable for the whole process, so a learner
in another thread would sample in a request's mode, and a request in the learner's. The mode of
a request is therefore set on the modules of the served policy, for the time of its forward.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule


def sampling_modules(model: Any) -> list[ProbabilisticTensorDictModule]:
    """Return the modules of ``model`` whose sampling mode a request may choose."""
    if not isinstance(model, torch.nn.Module):
        return []
    return [m for m in model.modules() if isinstance(m, ProbabilisticTensorDictModule)]


class _Forward(threading.local):
    mode: InteractionType | None = None


_forward = _Forward()


def active_mode() -> InteractionType | None:
    """Return the mode of the :func:`sampling` block that this thread is in, if it is in one."""
    return _forward.mode


@contextlib.contextmanager
def sampling(model: Any, mode: InteractionType) -> Iterator[None]:
    """Let ``model`` sample in ``mode``, whatever the mode of the process is."""
    modules = sampling_modules(model)
    _forward.mode = mode
    before = [module.default_interaction_type for module in modules]
    for module in modules:
        # The default counts where the process has no mode. Where it has one, the module
        # passes that to this method, which is the one place to say otherwise.
        module.default_interaction_type = mode
        module._dist_sample = _in_mode(module._dist_sample, mode)
    try:
        yield
    finally:
        _forward.mode = None
        for module, default in zip(modules, before, strict=True):
            module.default_interaction_type = default
            del module._dist_sample


def _in_mode(sample: Callable[..., Any], mode: InteractionType) -> Callable[..., Any]:
    def sample_in_mode(dist: Any, interaction_type: Any = None, **kwargs: Any) -> Any:
        return sample(dist, interaction_type=mode, **kwargs)

    return sample_in_mode
