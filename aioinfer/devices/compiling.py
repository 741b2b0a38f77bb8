"""A policy compiled by :func:`torch.compile`, for as long as that works."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from aioinfer.devices.faults import device_died, is_out_of_memory
from aioinfer.sampling import active_mode
from aioinfer.shortcut import shortcut

_log = logging.getLogger("aioinfer")


class Compiled:
    """Calls the compiled policy, or the policy where that fails and the policy itself does not.

    A sampling mode that a request asks for is set on the policy's modules for one forward, which
    would compile it again each time; such forwards run uncompiled.

    Args:
        model: the policy.
        eager: what a forward of it calls uncompiled.
        options: arguments of :func:`torch.compile`.
    """

    def __init__(
        self, model: Callable[[Any], Any], eager: Callable[[Any], Any], options: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._eager = eager
        self._options = options
        self._compiled: Callable[[Any], Any] | None = None
        self._works = True

    def __call__(self, batch: Any) -> Any:
        """Run a forward."""
        if not self._works or active_mode() is not None:
            return self._eager(batch)
        try:
            if self._compiled is None:  # here, and not on an event loop: it looks at files
                self._compiled = shortcut(
                    self._model, lambda module: torch.compile(module, **self._options)
                )
            return self._compiled(batch)
        except Exception as error:
            if is_out_of_memory(error) or device_died(error) is not None:
                raise
            failed = error
        answer = self._eager(batch)  # an error of the policy, or of this request, is raised here
        self._works = False
        _log.warning("the policy cannot be compiled and runs as it is: %r", failed)
        return answer
