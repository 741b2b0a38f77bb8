"""Processes that act in tests, and how tests talk to them."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

from helpers import PATIENCE_S


class Child:
    """A process in which ``function(pipe, *args)`` runs; ended with the ``with`` block."""

    def __init__(
        self, function: Callable[..., Any], *args: Any, method: str = "fork", **kwargs: Any
    ) -> None:
        context: Any = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_run,
            args=(theirs, function, *args),
            kwargs=kwargs,
            name="test-actor",
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def hear(self, patience: float = PATIENCE_S) -> Any:
        """The next thing that it says; raises if it failed."""
        if not self.pipe.poll(patience):
            raise AssertionError(f"the process said nothing for {patience} s")
        well, said = self.pipe.recv()
        if not well:
            raise AssertionError(f"the process failed: {said}")
        return said

    def ask(self, question: Any) -> Any:
        """Send it something and wait for what it says."""
        self.pipe.send(question)
        return self.hear()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join(PATIENCE_S)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.close()
        self.pipe.close()


class Said:
    """The process's side of the conversation."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def say(self, what: Any) -> None:
        """Tell the test."""
        self._pipe.send((True, what))

    def hear(self) -> Any:
        """What the test sends next."""
        return self._pipe.recv()


def _run(pipe: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        pipe.send((True, function(Said(pipe), *args, **kwargs)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
