"""What every way of bringing weights to a server has in common.

A scheme has two ends. The sender's gives each set of weights a version and passes it on; the
receiver's hands it to a :class:`~aioinfer.weights.receiving.Receiver`, which is a server's or a
:class:`~aioinfer.weights.mailbox.Mailbox`. One object may be both ends, and a copy of it, pickled,
either of them in another process.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import anyio.to_thread
import torch
from torch import nn

import aioinfer.arguments as arguments
from aioinfer.clock import MonotonicClock
from aioinfer.weights.mailbox import Mailbox, Staged
from aioinfer.weights.receiving import Receiver, Taking
from aioinfer.weights.sending import SendingEnd, Ticket
from aioinfer.weights.slots import Mode

_log = logging.getLogger("aioinfer")
_clock = MonotonicClock()


adapters: list[Callable[[Any], WeightSyncScheme | None]] = []
"""Make schemes of what is none by itself."""


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


class WeightSyncScheme(SendingEnd):
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
        super().__init__(
            Taking(mode, arguments.flag("cast", cast), arguments.flag("partial", partial)),
            arguments.flag("require_finite", require_finite),
        )
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
        super()._begin()
        self._ticket: Ticket | None = None  # of the sender that a receiver is to find
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
        # First the receivers: those of this object may not have noticed yet that an earlier sender
        # is gone.
        sends = self._own_ticket is not None
        if sends and not self._wait_for_receiver(max(0.0, deadline - _clock())):
            raise TimeoutError(f"there was no receiver for {timeout} s")
        for link in list(self._links):
            if not link.wait(max(0.0, deadline - _clock())):
                raise TimeoutError(f"there was no sender for {timeout} s")

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
    def _open_receiver(self, receiver: Receiver) -> Link:
        """Find the sender, whenever there is one, and bring what it sends."""
