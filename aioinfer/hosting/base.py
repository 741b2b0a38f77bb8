"""What servers have in common that run elsewhere: in another process, or on a cluster.

One end is with the user: it hands out clients, starts and ends the server, and asks it. The other
is where the server is: :func:`respond` does what is asked, and sends errors as data, so that one
that cannot be pickled is not lost.
"""

from __future__ import annotations

import abc
import pickle
import traceback
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
import torch

from aioinfer.server import InferenceServer
from aioinfer.stats import ServerStats
from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.wire import RemoteTraceback
from aioinfer.weights.base import WeightSyncScheme

if TYPE_CHECKING:
    from aioinfer.client import InferenceClient, SyncInferenceClient

ANSWER_S = 1.0
"""Seconds beyond its own timeout that a server has to say that it has closed."""

Answer = tuple[bool, Any]
"""Whether it worked, and what came of it; else what :func:`rebuilt` makes the error of."""


class HostedServer(abc.ABC):
    """Runs an :class:`InferenceServer` somewhere else: the end of it that the user holds."""

    # -- clients ------------------------------------------------------------

    @property
    @abc.abstractmethod
    def transport(self) -> InferenceTransport:
        """The link that is served."""

    def client(self) -> InferenceClient | SyncInferenceClient:
        """Return a new client of the transport, of the kind natural for it."""
        return self.transport.client()

    def async_client(self) -> InferenceClient:
        """Return a new client for coroutines."""
        return self.transport.async_client()

    def sync_client(self) -> SyncInferenceClient:
        """Return a new client for threads."""
        return self.transport.sync_client()

    # -- life ---------------------------------------------------------------

    @abc.abstractmethod
    def start(self) -> Self:
        """Start the server and wait until it serves."""

    @abc.abstractmethod
    def shutdown(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Close the server; harmless if it is closed."""

    @abc.abstractmethod
    async def aclose(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Close the server; the awaitable :meth:`shutdown`."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    @abc.abstractmethod
    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()


def check(policy_factory: Any, options: Mapping[str, Any]) -> None:
    """Refuse here and now what would be refused where the server is to run.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range.
    """
    if not callable(policy_factory):
        raise TypeError(f"policy_factory must be callable, got {policy_factory!r}")
    known = {name: value for name, value in options.items() if name != "weight_sync"}
    with warnings.catch_warnings():  # they will be given, if they hold there
        warnings.simplefilter("ignore")
        InferenceServer(torch.nn.Identity(), **known)
    weight_sync = options.get("weight_sync")
    if weight_sync is not None and WeightSyncScheme.of(weight_sync).in_process:
        raise TypeError(
            f"weight_sync must reach another process, and {type(weight_sync).__name__} "
            "does not; SharedMemWeightSyncScheme does"
        )


# -- where the server is ------------------------------------------------------


async def respond(server: InferenceServer, what: str, args: tuple[Any, ...]) -> Answer:
    """Do one of the things below."""
    try:
        return True, await _QUESTIONS[what](server, *args)
    except Exception as error:
        return False, described(error)


async def _stats(server: InferenceServer, reset: bool) -> ServerStats:
    return server.stats(reset=reset)


async def _policy_version(server: InferenceServer) -> int:
    return server.policy_version


async def _load_state_dict(server: InferenceServer, state_dict: Mapping[str, torch.Tensor]) -> int:
    await server.aupdate_model(lambda model: model.load_state_dict(state_dict))
    return server.policy_version


async def _close(server: InferenceServer, timeout: float | None, drain: bool) -> None:
    with anyio.move_on_after(timeout):
        await server.aclose(drain=drain)


_QUESTIONS: dict[str, Callable[..., Any]] = {
    "stats": _stats,
    "policy_version": _policy_version,
    "load_state_dict": _load_state_dict,
    "close": _close,
}


def described(error: BaseException) -> tuple[BaseException, str]:
    """An exception that pickles, and its traceback as text."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"), text
    return error, text


def rebuilt(described: tuple[BaseException, str]) -> BaseException:
    """The exception again, with the text as its ``__cause__``."""
    error, text = described
    error.__cause__ = RemoteTraceback(text)
    return error
