"""Weights for servers of the trainer's own process: copied, and published where they are."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

from aioinfer.clock import MonotonicClock
from aioinfer.weights import threads
from aioinfer.weights.base import Link, WeightSyncScheme
from aioinfer.weights.copying import copy_tensors
from aioinfer.weights.delivery import Delivery, Stage
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.sending import Ticket
from aioinfer.weights.slots import AtHand

_clock = MonotonicClock()


class InProcessWeightSyncScheme(WeightSyncScheme):
    """Brings weights to servers in the trainer's own process.

    One object is both ends. :meth:`~aioinfer.WeightSyncScheme.send` copies the weights, then
    publishes the copy on the caller's own thread or, unless it waits for that, on another one.
    The arguments are those of :class:`~aioinfer.WeightSyncScheme`.
    """

    in_process = True

    def __reduce__(self) -> Any:
        raise TypeError(
            "an InProcessWeightSyncScheme cannot be sent to another process; "
            "a SharedMemWeightSyncScheme can"
        )

    def _begin(self) -> None:
        super()._begin()
        self._kept: Weights | None = None
        self._receivers: list[_InProcessLink] = []
        self._changed = threading.Condition()  # around the two above and the two below
        self._next: tuple[Weights, Delivery] | None = None
        self._publishing = False

    # -- the sender's end ---------------------------------------------------

    def _open_sender(self, weights: Weights, ticket: Ticket) -> None:
        with self._changed:
            self._kept = weights.clone()
            self._epoch = ticket.epoch
            links = list(self._receivers)
            self._changed.notify_all()
        for link in links:
            self._offer(link)

    def _newest(self) -> Weights:
        assert self._kept is not None
        return self._kept

    def _transmit(self, weights: Weights, delivery: Delivery, deadline: float) -> None:
        with self._changed:
            links = list(self._receivers)
            background = delivery.wait != "applied"
            shared = background or self._publishing
        for link in links:
            delivery.expect(link.receiver.name)
            link.receiver.announce(delivery.version)
        kept = self._newest()
        if shared:  # what is kept may still be read when the next weights come
            self._kept = kept = weights.clone()
        else:
            copy_tensors(kept.tensors, weights.tensors)
            kept.extra = copy.deepcopy(weights.extra)
        if not background:
            for link in links:
                link.publish(kept, delivery, self._epoch, max(0.0, deadline - _clock()))
            return
        for link in links:
            delivery.note(link.receiver.name, Stage.STAGED)
        with self._changed:
            self._next = kept, delivery
            if not self._publishing:
                self._publishing = True
                threads.start(self._publish, lambda: None)

    def _publish(self) -> None:
        """Publish the newest weights, until there are no newer ones."""
        while True:
            with self._changed:
                if self._next is None:
                    self._publishing = False
                    return
                (weights, delivery), self._next = self._next, None
                links = list(self._receivers)
            for link in links:
                if delivery.version > link.receiver.version:
                    link.publish(weights, delivery, self._epoch, None)

    def _wait_for_receiver(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._receivers), timeout)

    def _close_sender(self) -> None:
        with self._changed:
            self._kept = self._next = None

    # -- the receiver's end -------------------------------------------------

    def _open_receiver(self, receiver: Receiver) -> Link:
        link = self._make_link(receiver)
        with self._changed:
            self._receivers.append(link)
            self._changed.notify_all()
        with self._sending:
            if self._kept is not None:
                self._offer(link)
        return link

    def _make_link(self, receiver: Receiver) -> _InProcessLink:
        return _InProcessLink(self, receiver)

    def _offer(self, link: _InProcessLink) -> None:
        """Bring a receiver the newest weights, if its own are older."""
        receiver = link.receiver
        self._catch_up(receiver.version)
        if self._sent > receiver.version:
            delivery = Delivery(self._sent, "none")
            link.publish(self._newest(), delivery, self._epoch, None)


class _InProcessLink(Link):
    def __init__(self, scheme: InProcessWeightSyncScheme, receiver: Receiver) -> None:
        self.receiver = receiver
        self._scheme = scheme
        self._lock = threading.Lock()

    def publish(
        self, weights: Weights, delivery: Delivery, epoch: int, timeout: float | None
    ) -> None:
        """Bring the receiver these weights, on this thread."""
        with self._lock:
            self.receiver.publish(
                AtHand(weights),
                delivery.version,
                epoch,
                functools.partial(delivery.note, self.receiver.name),
                taking=self._scheme._taking,
                timeout=timeout,
            )

    def wait(self, timeout: float | None) -> bool:
        """Block until there is a sender; by then it has brought its weights."""
        scheme = self._scheme
        with scheme._changed:
            return scheme._changed.wait_for(lambda: scheme._kept is not None, timeout)

    def greet(self) -> None:
        """A sender brings its weights while the link is made."""

    def close(self) -> None:
        """Take no more weights."""
        with self._scheme._changed:
            if self in self._scheme._receivers:
                self._scheme._receivers.remove(self)
