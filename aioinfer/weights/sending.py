"""The sender's end of every scheme: versions, what may be sent, and what became of it."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
import threading
from typing import Any

import anyio.to_thread
from torch import nn

import aioinfer.arguments as arguments
from aioinfer.clock import MonotonicClock, epoch_now
from aioinfer.weights.delivery import Delivery, SendReport, Wait
from aioinfer.weights.manifest import Manifest
from aioinfer.weights.reading import ModuleReader, Weights, complete, read
from aioinfer.weights.receiving import Taking

_log = logging.getLogger("aioinfer")
_clock = MonotonicClock()


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What a receiver must know of a sender. It pickles.

    Attributes:
        epoch: larger than that of any earlier sender.
        version: of the weights that the sender started with.
        manifest: what the weights consist of.
        address: where the sender is; its form is the scheme's own. It is a secret as far as it
            lets its holder speak to the sender.
    """

    epoch: int
    version: int
    manifest: Manifest
    address: Any = dataclasses.field(default=None, repr=False)


class SendingEnd(abc.ABC):
    """What a scheme does for a trainer; see :class:`~aioinfer.WeightSyncScheme`.

    Args:
        taking: how receivers take the weights.
        require_finite: whether NaN and infinity are refused.
    """

    def __init__(self, taking: Taking, require_finite: bool) -> None:
        self._taking = taking
        self._require_finite = require_finite

    def _begin(self) -> None:
        """Start as no sender."""
        self._own_ticket: Ticket | None = None  # where this is the sender
        self._version = 0  # the last one given
        self._sent = 0  # the last one passed on
        self._numbering = threading.Lock()
        self._sending = threading.RLock()  # one set of weights at a time
        self._reader: ModuleReader | None = None  # of the model that was sent last

    def init_on_sender(
        self, *, model: nn.Module | None = None, weights: Any = None, version: int = 0
    ) -> Ticket:
        """Become the sender, with a copy of these weights to start with.

        Receivers whose version is older than ``version`` get them once they are connected.

        Args:
            model: whose weights these are.
            weights: instead of a model, its state dict, or a TensorDict of them.
            version: theirs.

        Returns:
            What a receiver may be given to find this sender.

        Raises:
            RuntimeError: this is the sender already.
            WeightSyncError: parts of the model are lazy and not initialised; or another process
                is the sender.
        """
        source = read(_one_of(model, weights))
        if isinstance(version, bool) or not isinstance(version, int):
            raise TypeError(f"version must be an int, got {version!r}")
        if self._own_ticket is not None:
            raise RuntimeError("this scheme is the sender already; close() it first")
        with self._sending:
            self._version = self._sent = version
            ticket = Ticket(epoch_now(), version, source.manifest)
            address = self._open_sender(source, ticket)
            self._own_ticket = dataclasses.replace(ticket, address=address)
            return self._own_ticket

    def send(
        self,
        weights: Any = None,
        *,
        model: nn.Module | None = None,
        version: int | None = None,
        wait: Wait = "applied",
        timeout: float = 30.0,
    ) -> SendReport:
        """Send weights to every receiver that is connected; others get them when they are.

        Args:
            weights: a state dict, a TensorDict or a model.
            model: instead, the model whose weights are sent.
            version: theirs, above all earlier ones; ``None`` for one more than the last.
            wait: until when the call blocks: ``"applied"``, every receiver serves them;
                ``"staged"``, every receiver has them; ``"none"``, they are copied, so that the
                model may be changed again.
            timeout: seconds to wait for that.

        Returns:
            What became of them, receiver by receiver. A receiver that refuses them, or is gone,
            is in the report; it is no exception.

        Raises:
            RuntimeError: this is not the sender.
            TypeError: there is nothing to send, or it is no weights.
            ValueError: ``version`` is not above all earlier ones.
            WeightSyncError: the weights do not fit those of :meth:`init_on_sender`, or are not
                finite; nobody was sent anything.
        """
        source = self._checked(weights, model, wait, timeout)
        return self._send(source, self._number(version), wait, timeout, again=version is None)

    async def asend(
        self,
        weights: Any = None,
        *,
        model: nn.Module | None = None,
        version: int | None = None,
        wait: Wait = "applied",
        timeout: float = 30.0,
    ) -> SendReport:
        """Send weights; the awaitable :meth:`send`.

        They are copied before this first waits, so the model may change while it does. A
        cancelled call sends them nevertheless.
        """
        source = self._checked(weights, model, wait, timeout)
        number = self._number(version)
        source = self._complete(source).clone()
        return await anyio.to_thread.run_sync(
            lambda: self._send(source, number, wait, timeout, again=version is None),
            abandon_on_cancel=True,
        )

    def _checked(self, weights: Any, model: Any, wait: Wait, timeout: float) -> Weights:
        if self._own_ticket is None:
            raise RuntimeError("this scheme is not the sender; call init_on_sender() first")
        if wait not in ("applied", "staged", "none"):
            raise ValueError(f"wait must be 'applied', 'staged' or 'none', got {wait!r}")
        arguments.duration("timeout", timeout)
        source = self._read(_one_of(model, weights))
        if self._require_finite:
            source.check_finite()
        return source

    def _read(self, source: Any) -> Weights:
        if not isinstance(source, nn.Module):
            return read(source)
        reader = self._reader
        if reader is None or not reader.reads(source):
            reader = self._reader = ModuleReader(source)
        return reader.read()

    def _number(self, version: int | None) -> int:
        with self._numbering:
            if version is None:
                version = self._version + 1
            elif isinstance(version, bool) or not isinstance(version, int):
                raise TypeError(f"version must be an int or None, got {version!r}")
            elif version <= self._version:
                raise ValueError(
                    f"version must be above {self._version}, the last one, got {version}"
                )
            self._version = version
            return version

    def _complete(self, source: Weights) -> Weights:
        return complete(
            source, self._newest(), cast=self._taking.cast, partial=self._taking.partial
        )

    def _send(
        self, source: Weights, version: int, wait: Wait, timeout: float, *, again: bool
    ) -> SendReport:
        deadline = _clock() + timeout
        delivery = Delivery(version, wait)
        with self._sending:
            if self._own_ticket is None:
                raise RuntimeError("this scheme was closed")
            source = self._complete(source)
            if version > self._sent:  # else another thread has sent a newer one meanwhile
                self._sent = version
                self._transmit(source, delivery, deadline)
            delivery.begun()
        with contextlib.suppress(TimeoutError):
            delivery.settled.result(max(0.0, deadline - _clock()))
        if delivery.serves >= version:
            # A receiver serves newer ones, of another sender or updated by hand.
            self._catch_up(delivery.serves)
            if again:
                left = max(0.0, deadline - _clock())
                return self._send(source, self._number(None), wait, left, again=False)
        report = delivery.report()
        if not report.ok:
            _log.warning("weights did not reach everybody: %s", report)
        return report

    def _catch_up(self, served: int) -> None:
        """Go on above what a receiver serves."""
        with self._numbering:
            self._version = max(self._version, served)

    # -- what a scheme adds -------------------------------------------------

    @abc.abstractmethod
    def _open_sender(self, weights: Weights, ticket: Ticket) -> Any:
        """Keep a copy of the weights, and be found by receivers. Return the ticket's address."""

    @abc.abstractmethod
    def _newest(self) -> Weights:
        """The weights sent last, which nobody may change."""

    @abc.abstractmethod
    def _transmit(self, weights: Weights, delivery: Delivery, deadline: float) -> None:
        """Pass the weights on, announcing the version first.

        Once this returns, the caller may change them. Every connected receiver is added to the
        delivery, which learns what becomes of them there, now or later.
        """

    @abc.abstractmethod
    def _wait_for_receiver(self, timeout: float) -> bool:
        """Block until a receiver is connected; false if none was."""

    @abc.abstractmethod
    def _close_sender(self) -> None:
        """End what :meth:`_open_sender` began."""


def _one_of(model: Any, weights: Any) -> Any:
    if (model is None) == (weights is None):
        raise TypeError(
            "give either model= or weights=; there is "
            + ("nothing to send" if model is None else "both")
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    return weights if model is None else model
