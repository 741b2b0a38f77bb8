"""Weight-sync schemes of TorchRL, as a server's ``weight_sync``.

Such a scheme has a thread that writes into the model it was given, whoever uses that meanwhile. It
is given a shadow of the policy. Once it has written, it calls ``update_policy_weights_`` of its
context, and tells the sender only when that has returned; so that is when the shadow is whole, and
is published. The weights that come while the two connect are not: the sender does not wait then,
and may be writing the next ones to where they are.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from multiprocessing import connection
from typing import Any

from aioinfer.clock import epoch_now
from aioinfer.weights import threads
from aioinfer.weights.base import Link, WeightSyncScheme, adapters
from aioinfer.weights.delivery import Delivery, Stage
from aioinfer.weights.reading import Weights, read
from aioinfer.weights.receiving import Receiver, ServedWeights, Taking
from aioinfer.weights.slots import AtHand

_log = logging.getLogger("aioinfer")


class TorchRLAdapter(WeightSyncScheme):
    """A scheme of TorchRL at the receiver's end.

    Args:
        scheme: a ``torchrl.weight_update.WeightSyncScheme``. A copy of it is used, so the object
            itself may be the sender.

    Raises:
        ValueError: its sender does not wait for receivers (``sync=False``), so it may overwrite
            what they read; or its receivers do not wait for the sender, which calls them instead.
    """

    def __init__(self, scheme: Any) -> None:
        if not _waits(scheme):
            raise ValueError(
                f"weight_sync must be a scheme whose receiver waits for its sender, and that of a "
                f"{type(scheme).__name__} is an actor which the sender calls; use a scheme of "
                "aioinfer, such as RayWeightSyncScheme"
            )
        if not getattr(scheme, "sync", True):
            raise ValueError(
                f"weight_sync must be a scheme whose sender waits, and this "
                f"{type(scheme).__name__} has sync=False: its weights can change while they are "
                "read"
            )
        super().__init__()
        self._original = scheme
        self._copy: Any = None
        self._shadow: Any = None

    def _open_receiver(self, receiver: Receiver) -> Link:
        if not isinstance(receiver, ServedWeights):
            raise TypeError("a scheme of TorchRL brings weights to servers only")
        if self._copy is None:
            scheme = copy.copy(self._original)  # without what makes it a sender
            self._shadow = copy.deepcopy(receiver.slots.current.model)
            scheme.init_on_receiver(model_id=receiver.model_id, model=self._shadow, worker_idx=0)
            self._copy = scheme
        return _TorchRLLink(self._copy, self._shadow, receiver)

    def _open_sender(self, weights: Weights, ticket: Any) -> Any:
        raise RuntimeError(f"send with the {type(self._original).__name__} itself")

    def _newest(self) -> Weights:
        raise RuntimeError("this is no sender")

    def _transmit(self, weights: Weights, delivery: Delivery, deadline: float) -> None:
        raise RuntimeError("this is no sender")

    def _wait_for_receiver(self, timeout: float) -> bool:
        raise RuntimeError("this is no sender")

    def _close_sender(self) -> None:
        raise RuntimeError("this is no sender")


class _TorchRLLink(Link):
    """The context of the scheme: what it calls when it has written weights."""

    def __init__(self, scheme: Any, shadow: Any, receiver: ServedWeights) -> None:
        self._scheme = scheme
        self._shadow = shadow
        self._receiver = receiver
        self._epoch = epoch_now()
        self._connected = threading.Event()
        self._lock = threading.Lock()
        self._closed = False
        self._wake_end, self._wake = connection.Pipe(duplex=False)
        scheme.context = self  # which keeps a weak reference
        threads.start(self._connect, self.close)

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """The shadow has new weights; the sender waits until this returns."""
        # An exception would leave it waiting for ever.
        try:
            weights = read(self._shadow)
            version = self._receiver.version + 1
            self._receiver.publish(AtHand(weights), version, self._epoch, _note, taking=_TAKING)
        except Exception:
            _log.exception("weights from TorchRL could not be published")

    def _connect(self) -> None:
        scheme = self._scheme
        try:
            if scheme.synchronized_on_receiver:
                scheme._start_background_receiver()
            else:
                # This waits for the sender, for two minutes at most and without an end to it: so
                # only once the sender's first message is there.
                queue = (getattr(scheme, "_weight_init_queues", None) or {}).get(0)
                if queue is not None:
                    connection.wait([queue._reader, self._wake_end])
                if self._closed:
                    return
                scheme.connect(worker_idx=0)
            self._connected.set()
            with self._lock:
                if self._closed:
                    self._stop()
        except Exception:
            _log.exception("the TorchRL scheme could not connect")
        finally:
            self._wake_end.close()

    def _stop(self) -> None:
        if self._scheme._stop_event is not None:
            self._scheme._stop_event.set()

    def wait(self, timeout: float | None) -> bool:
        """Block until there is a sender."""
        return self._connected.wait(timeout)

    def greet(self) -> None:
        """The sender may not come before the server has started."""

    def close(self) -> None:
        """Take no more weights."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.close()
            if self._connected.is_set():
                self._stop()


def _waits(scheme: Any) -> bool:
    """Whether it has a thread that waits for the sender, as the base class has it be."""
    base = sys.modules["torchrl.weight_update"].WeightSyncScheme
    return any(
        getattr(type(scheme), name) is not getattr(base, name)
        for name in ("_wait_for_instruction", "_background_receive_loop")
    )


_TAKING = Taking()


def _note(stage: Stage, why: str = "", serves: int = 0) -> None:
    if stage is Stage.REFUSED:
        _log.warning("weights from TorchRL were refused: %s", why)


def _adapt(weight_sync: Any) -> WeightSyncScheme | None:
    """Adapt a scheme of TorchRL, if it is one; TorchRL is not imported for that."""
    torchrl = sys.modules.get("torchrl.weight_update")
    if torchrl is not None and isinstance(weight_sync, torchrl.WeightSyncScheme):
        return TorchRLAdapter(weight_sync)
    return None


adapters.append(_adapt)
