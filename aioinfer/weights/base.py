"""What every way of bringing weights to a server has in common.

A scheme has two ends. The sender's gives each set of weights a version and passes it on; the
receiver's hands it to a :class:`~aioinfer.weights.receiving.Receiver`, which is a server's or a
mailbox. One object may be both ends, and a copy of it, pickled, either of them in another process.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import anyio.to_thread
import torch
from torch import nn

import aioinfer.arguments as arguments
from aioinfer.clock import MonotonicClock, epoch_now
from aioinfer.weights.delivery import Delivery, SendReport, Wait
from aioinfer.weights.manifest import Manifest
from aioinfer.weights.reading import ModuleReader, Weights, complete, read
from aioinfer.weights.receiving import Mailbox, Receiver, Staged, Taking
from aioinfer.weights.slots import Mode

_log = logging.getLogger("aioinfer")
_clock = MonotonicClock()


adapters: list[Callable[[Any], WeightSyncScheme | None]] = []
"""Make schemes of what is none by itself."""


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


class Link(abc.ABC):
    """One receiver's connection to its sender, whether there is one yet or not."""

    @abc.abstractmethod
    def wait(self, timeout: float | None) -> bool:
        """Block until the receiver has been offered the newest weights of a sender.

        Returns:
            Whether it was, within ``timeout`` seconds.
        """

    @abc.abstractmethod
    def greet(self) -> None:
        """Block while a sender who is there already brings the newest weights; else return."""

    @abc.abstractmethod
    def close(self) -> None:
        """Take no more weights. Harmless if closed."""


class WeightSyncScheme(abc.ABC):
    """Brings weights from a trainer to servers.

    The trainer's end: :meth:`init_on_sender`, then :meth:`send` as often as it likes. The
    server's end is what an ``InferenceServer`` is given as ``weight_sync``; who has no server
    uses :meth:`init_on_receiver` and :meth:`receive`. One object may be both ends.

    Args:
        mode: ``"slots"`` keeps two copies of the weights, so that nobody waits for a copy.
            ``"inplace"`` writes into the only one there is, between two batches, which wait for
            it: for models too large for two.
        cast: whether weights of another dtype are converted; else they are refused.
        partial: whether some of the weights may be sent alone; the others stay as they are.
        require_finite: whether :meth:`send` refuses NaN and infinity.
    """

    in_process: ClassVar[bool] = False
    """Whether it stays within one process."""

    def __init__(
        self,
        *,
        mode: Mode = "slots",
        cast: bool = False,
        partial: bool = False,
        require_finite: bool = False,
    ) -> None:
        if mode not in ("slots", "inplace"):
            raise ValueError(f"mode must be 'slots' or 'inplace', got {mode!r}")
        self._taking = Taking(
            mode, arguments.flag("cast", cast), arguments.flag("partial", partial)
        )
        self._require_finite = arguments.flag("require_finite", require_finite)
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        """Only what the scheme is; neither end of it."""
        kept = {"_taking", "_require_finite"}
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def _begin(self) -> None:
        """Start as neither end."""
        self._ticket: Ticket | None = None  # of the sender that a receiver is to find
        self._own_ticket: Ticket | None = None  # where this is the sender
        self._version = 0  # the last one given
        self._sent = 0  # the last one passed on
        self._numbering = threading.Lock()
        self._sending = threading.RLock()  # one set of weights at a time
        self._reader: ModuleReader | None = None  # of the model that was sent last
        self._mailbox: tuple[Mailbox, Link] | None = None
        self._links: list[Link] = []

    @staticmethod
    def of(weight_sync: Any) -> WeightSyncScheme:
        """Return a scheme as a server needs it.

        Raises:
            TypeError: it is no scheme.
        """
        if isinstance(weight_sync, WeightSyncScheme):
            return weight_sync
        for adapt in adapters:
            adapted = adapt(weight_sync)
            if adapted is not None:
                return adapted
        raise TypeError(f"weight_sync must be a WeightSyncScheme or None, got {weight_sync!r}")

    @property
    def mode(self) -> Mode:
        """``"slots"`` or ``"inplace"``."""
        return self._taking.mode

    # -- the sender's end ---------------------------------------------------

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

    # -- the receiver's end -------------------------------------------------

    def init_on_receiver(
        self,
        ticket: Ticket | None = None,
        *,
        model_id: str = "policy",
        model: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Become a receiver.

        A server does this by itself; it need only be called to give it a ticket.

        Args:
            ticket: the sender's; ``None`` if this object is the sender too, or a copy of it.
            model_id: names this receiver in reports.
            model: what the weights must fit, and where ``Staged.apply()`` writes them. ``None``
                if a server has the model.
            device: where to move the model.

        Raises:
            WeightSyncError: parts of the model are lazy and not initialised.
        """
        if ticket is not None and not isinstance(ticket, Ticket):
            raise TypeError(f"ticket must be a Ticket or None, got {ticket!r}")
        self._ticket = ticket
        if model is not None:
            if not isinstance(model, nn.Module):
                raise TypeError(f"model must be an nn.Module, got {model!r}")
            if device is not None:
                model.to(arguments.device("device", device))
            mailbox = Mailbox(model_id, model)
            self._mailbox = mailbox, self.attach(mailbox)

    async def receive(self, timeout: float | None = None) -> Staged | None:
        """Wait for weights newer than the last that were received; the newest count.

        Args:
            timeout: seconds to wait; ``0.0`` never waits, ``None`` waits for as long as it takes.

        Returns:
            Weights that are there as a whole, to be applied; ``None`` if there are none.

        Raises:
            RuntimeError: :meth:`init_on_receiver` was not called with a model.
        """
        if self._mailbox is None:
            raise RuntimeError("call init_on_receiver(model=...) first; servers receive themselves")
        mailbox, _ = self._mailbox
        if timeout is not None:
            timeout = arguments.duration("timeout", timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    arrived = mailbox.arrival(asyncio.get_running_loop())
                    staged = mailbox.take()
                    if staged is not None or mailbox.closed or timeout == 0.0:
                        return staged
                    await arrived
        return mailbox.take()

    # -- both ends ----------------------------------------------------------

    def connect(self, timeout: float = 60.0) -> None:
        """Wait until there is somebody at the other end.

        A sender waits for a first receiver; a receiver for a sender, and until it has been
        offered that sender's newest weights. May be called at any time, and again; whoever
        serves goes on serving.

        Raises:
            TimeoutError: there was nobody.
        """
        deadline = _clock() + arguments.duration("timeout", timeout)
        if self._own_ticket is None and not self._links:
            raise RuntimeError("call init_on_sender() or init_on_receiver() first")
        for link in list(self._links):
            if not link.wait(max(0.0, deadline - _clock())):
                raise TimeoutError(f"there was no sender for {timeout} s")
        alone = self._own_ticket is not None and not self._links
        if alone and not self._wait_for_receiver(max(0.0, deadline - _clock())):
            raise TimeoutError(f"there was no receiver for {timeout} s")

    async def aconnect(self, timeout: float = 60.0) -> None:
        """Wait until there is somebody at the other end; the awaitable :meth:`connect`."""
        await anyio.to_thread.run_sync(self.connect, timeout, abandon_on_cancel=True)

    def close(self) -> None:
        """Send and receive no more. Servers go on with what they have, and wait for a sender."""
        with self._sending:
            if self._own_ticket is not None:
                self._own_ticket = None
                self._close_sender()
        if self._mailbox is not None:
            self._mailbox[0].close()
            self.detach(self._mailbox[1])
            self._mailbox = None

    async def aclose(self) -> None:
        """Send and receive no more; the awaitable :meth:`close`."""
        await anyio.to_thread.run_sync(self.close)

    def attach(self, receiver: Receiver) -> Link:
        """Bring weights to ``receiver`` from now on; servers call this.

        Returns:
            The connection, which ends when it is closed.
        """
        link = self._open_receiver(receiver)
        self._links.append(link)
        return link

    def detach(self, link: Link) -> None:
        """Close the connection and forget it; servers call this."""
        link.close()
        if link in self._links:
            self._links.remove(link)

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

    @abc.abstractmethod
    def _open_receiver(self, receiver: Receiver) -> Link:
        """Find the sender, whenever there is one, and bring what it sends."""


def _one_of(model: Any, weights: Any) -> Any:
    if (model is None) == (weights is None):
        raise TypeError(
            "give either model= or weights=; there is "
            + ("nothing to send" if model is None else "both")
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    return weights if model is None else model
