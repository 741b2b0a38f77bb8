"""The policy as it is served: a batch is computed by one slot, which is one whole version.

A slot is a copy of the policy together with the version of its weights and with what a forward
of it really calls. There are two. A batch takes the current one, which is one whole version from
its first kernel to its last; new weights are written into the other one by whoever brings them,
while the forward thread goes on, and then one reference is flipped. So the one who updates waits
for the batches that still use the spare slot, and the server waits for nothing.

Who holds which lock: ``_updating`` is held while weights change, by a publisher's thread or by
the forward thread in :meth:`Slots.update`; nobody who holds it waits for the forward thread to
come round, only for the batches it is in. ``_using`` guards the counts of users and the flip.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from aioinfer.errors import WeightSyncError
from aioinfer.shortcut import shortcut
from aioinfer.weights.copying import copy_tensors
from aioinfer.weights.manifest import Manifest, Plan, plan
from aioinfer.weights.reading import ModuleReader, Weights, read_module, set_extra_state
from aioinfer.weights.streams import Streams

T = TypeVar("T")

Policy = Callable[[Any], Any]
Mode = Literal["slots", "inplace"]


class Source(Protocol):
    """Weights that can be written somewhere: tensors at hand, or on their way here."""

    manifest: Manifest
    extra: Any
    """Extra states by name; complete only once :meth:`copy_into` has returned."""

    def copy_into(self, targets: Sequence[torch.Tensor | None], *, whole: bool) -> None:
        """Write each leaf into its target, if it has one.

        Args:
            targets: one for each leaf of the manifest.
            whole: whether to begin only once everything is there, as what the targets hold is
                still needed if the rest never comes.

        Raises:
            Interrupted: the rest will not come; what the targets hold is undefined.
        """


class Slot:
    """One copy of the policy.

    Attributes:
        model: the copy.
        version: of its weights.
        call: does what ``model`` does, perhaps for less. The addresses of the model's parameters
            stay the same as long as this is the same.
        users: the batches that use it now.
        reader: reads the model's weights.
        marks: what :class:`~aioinfer.weights.streams.Streams` remembers about it.
    """

    __slots__ = ("call", "marks", "model", "reader", "users", "version")

    def __init__(self, model: Policy, version: int, call: Policy) -> None:
        self.model = model
        self.version = version
        self.call = call
        self.users = 0
        self.marks: Any = None
        self.reader = ModuleReader(model) if isinstance(model, nn.Module) else None


class Interrupted(WeightSyncError):
    """The rest of some weights will not come."""


class Outdated(WeightSyncError):
    """The weights are not newer than those in service.

    Attributes:
        serves: the version in service.
    """

    def __init__(self, message: str, serves: int) -> None:
        super().__init__(message)
        self.serves = serves


class Slots:
    """What serves, and how it changes.

    Args:
        model: the policy, which is used as it is, unless :meth:`own` is called.
        version: the version it starts with.
        prepare: makes a slot's ``call`` of its model, whenever a slot is made. It runs where the
            forwards run, or before there are any.
        between: runs a function where the forwards run, between two of them.
        streams: orders copies and forwards on a device that works asynchronously.
    """

    def __init__(
        self,
        model: Policy,
        version: int,
        prepare: Callable[[Policy], Policy] = shortcut,
        between: Callable[[Callable[[], Any]], Future[Any]] | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._prepare = prepare
        self._between = between or _now
        self._streams = streams or Streams()
        self.current = Slot(model, version, prepare(model))
        """The slot of the next batch; a batch gets it from :meth:`take`."""
        self._streams.filled(self.current)
        self.epoch = 0
        """The sender that the current weights are from; a later one has a larger number."""
        self._spare: Slot | None = None
        self._updating = threading.RLock()
        self._using = threading.Lock()
        self._unused = threading.Condition(self._using)
        self._planned: tuple[Manifest, Manifest, bool, bool, Plan] | None = None

    # -- for batches --------------------------------------------------------

    def take(self) -> Slot:
        """Return the current slot, which stays as it is until it is given back."""
        with self._using:
            slot = self.current
            slot.users += 1
        self._streams.before_use(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        """All that the batch needs of the slot has been asked of the device."""
        self._streams.after_use(slot)
        with self._using:
            slot.users -= 1
            if not slot.users and slot is not self.current:  # else nobody waits for it
                self._unused.notify_all()

    def rehearse(self, run: Callable[[Policy], None]) -> None:
        """Do with every copy of the policy what batches will do; before there are any."""
        with self._updating:
            for slot in (self.current, self._spare):
                if slot is not None:
                    self._streams.before_use(slot)
                    try:
                        run(slot.call)
                    finally:
                        self._streams.after_use(slot)

    # -- for updates by hand ------------------------------------------------

    def after_caller(self, function: Callable[[], T]) -> Callable[[], T]:
        """Return what is to run where the forwards run, as if the calling thread ran it."""
        return self._streams.after_caller(function)

    def update(self, update_fn: Callable[[Any], T], *, mark: bool) -> T:
        """Change the current slot in place; only where the forwards run, and between two.

        Args:
            update_fn: called with the policy, with gradients enabled.
            mark: whether this makes a new version.

        Returns:
            What ``update_fn`` returned.
        """
        with self._updating:
            slot = self.current
            before = _addresses(slot.model)
            try:
                with torch.enable_grad():
                    result = update_fn(slot.model)
            finally:
                # It may have changed more than weights, so the spare slot is of no use now.
                self._spare = None
                self._streams.filled(slot)
                if _addresses(slot.model) != before:
                    slot.call = self._prepare(slot.model)
            if mark:
                self.current.version += 1
            return result

    # -- for those who bring weights ----------------------------------------

    def own(self, *, twice: bool) -> None:
        """Serve a copy of the model, so that who else has the model cannot change it.

        Args:
            twice: whether to make the spare slot now; else the first weights wait for it, and
                with them a batch.

        Raises:
            WeightSyncError: it cannot be copied, or has no weights.
        """
        self.manifest()  # it has some
        self.current = self._copy()
        if twice:
            self._make_spare()

    def manifest(self) -> Manifest:
        """What the weights consist of.

        Raises:
            WeightSyncError: the policy is not an ``nn.Module``, or parts of it are lazy.
        """
        return self._weights(self.current).manifest

    def publish(
        self,
        source: Source,
        version: int,
        *,
        epoch: int = 0,
        mode: Mode = "slots",
        cast: bool = False,
        partial: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Serve these weights from the next batch on. Not where the forwards run.

        Args:
            source: the weights.
            version: theirs.
            epoch: the sender's; of two senders, the later one counts.
            mode: ``"inplace"`` writes into the one copy there is, between two batches, which wait.
            cast: whether other dtypes are converted.
            partial: whether leaves may be missing; those stay as they are.
            timeout: seconds to wait for the batches that use the spare slot.

        Returns:
            How many versions this one skipped.

        Raises:
            Outdated: they are not newer than those in service.
            WeightSyncError: they do not fit. Nothing was written.
            TimeoutError: a batch has used the spare slot all the time.
        """
        if mode == "inplace":

            def write() -> int:
                with self._updating:
                    self._check_newer(version, epoch)
                    slot = self.current
                    targets = self._targets(source, slot, cast, partial)
                    with self._streams.writing(slot):
                        source.copy_into(targets, whole=True)
                        set_extra_state(slot.model, source.extra)
                    return self._serve(slot, version, epoch)

            return self._run_between(self._streams.after_caller(write), timeout)
        while True:
            if self._spare is None:
                self._run_between(self._make_spare, timeout)
            with self._updating:
                self._check_newer(version, epoch)
                spare = self._spare
                if spare is None:  # an update by hand came between
                    continue
                targets = self._targets(source, spare, cast, partial)
                self._wait_until_free(spare, timeout)
                with self._streams.writing(spare):
                    source.copy_into(targets, whole=False)
                    self._fill(targets, source, spare)
                    set_extra_state(spare.model, source.extra)
                return self._serve(spare, version, epoch)

    def _run_between(self, function: Callable[[], T], timeout: float | None) -> T:
        future: Future[T] = self._between(function)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.cancel():
                raise TimeoutError(f"a batch has run for {timeout} s") from None
            return future.result()  # it has begun, or has itself raised this

    def _serve(self, slot: Slot, version: int, epoch: int) -> int:
        skipped = version - self.current.version - 1
        slot.version = version
        self.epoch = epoch
        with self._using:
            if slot is not self.current:
                self._spare, self.current = self.current, slot
        return skipped

    def _check_newer(self, version: int, epoch: int) -> None:
        serves = self.current.version
        if epoch < self.epoch:
            raise Outdated("another sender has begun since this one did", serves)
        if version <= serves:
            raise Outdated(f"version {version} is not newer than {serves}, which serves", serves)

    def _wait_until_free(self, slot: Slot, timeout: float | None) -> None:
        with self._using:
            if not self._unused.wait_for(lambda: not slot.users, timeout):
                raise TimeoutError(f"a batch has used the spare slot for {timeout} s")

    def _make_spare(self) -> None:
        with self._updating:
            if self._spare is None:
                self._spare = self._copy()

    def _copy(self) -> Slot:
        current = self.current
        try:
            model = copy.deepcopy(current.model)
        except Exception as error:
            raise WeightSyncError(
                f"the policy cannot be copied ({type(error).__name__}: {error}), as two slots "
                "need it; mode='inplace' does without a copy"
            ) from error
        slot = Slot(model, current.version, self._prepare(model))
        self._streams.filled(slot)
        return slot

    def _weights(self, slot: Slot) -> Weights:
        if slot.reader is None:
            raise WeightSyncError(
                f"weights can only be served by an nn.Module, and the policy is {slot.model!r}"
            )
        return slot.reader.read()

    def _targets(
        self, source: Source, slot: Slot, cast: bool, partial: bool
    ) -> list[torch.Tensor | None]:
        """Where each leaf of the source goes, once all is known to fit."""
        weights = self._weights(slot)
        offered, served = source.manifest, weights.manifest
        known = self._planned
        if known is None or known[:4] != (served, offered, cast, partial):
            found = plan(served, offered, cast=cast, partial=partial)
            known = self._planned = (served, offered, cast, partial, found)
        targets: list[torch.Tensor | None] = [None] * len(offered.leaves)
        for tensor, index in zip(weights.tensors, known[4], strict=True):
            if index is not None:
                targets[index] = tensor
        return targets

    def _fill(self, targets: Sequence[torch.Tensor | None], source: Source, spare: Slot) -> None:
        """Take over from the current slot what the source did not bring."""
        assert self._planned is not None
        absent = [i for i, index in enumerate(self._planned[4]) if index is None]
        if absent:
            new, old = self._weights(spare).tensors, self._weights(self.current).tensors
            copy_tensors([new[i] for i in absent], [old[i] for i in absent])
        missing = set(self._planned[0].extra) - set(self._planned[1].extra)
        if missing:
            extra = self._weights(self.current).extra
            set_extra_state(spare.model, {name: extra[name] for name in missing})


class AtHand:
    """A :class:`Source` whose tensors are in this process."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.manifest = weights.manifest
        self.extra = weights.extra

    def copy_into(self, targets: Sequence[torch.Tensor | None], *, whole: bool) -> None:
        """Write each leaf into its target, if it has one."""
        pairs = zip(targets, self._weights.tensors, strict=True)
        wanted = [(target, tensor) for target, tensor in pairs if target is not None]
        copy_tensors([target for target, _ in wanted], [tensor for _, tensor in wanted])


def _addresses(model: Any) -> list[int]:
    """Where the weights are, which a captured graph remembers."""
    if not isinstance(model, nn.Module):
        return []
    try:
        return [tensor.data_ptr() for tensor in read_module(model).tensors]
    except (WeightSyncError, RuntimeError):  # lazy, or without memory
        return []


def _now(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    return future
