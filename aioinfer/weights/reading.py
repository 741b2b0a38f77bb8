"""Reading weights from where users have them: modules, state dicts, TensorDicts."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import nn
from torch.nn.parameter import is_lazy

from aioinfer.errors import WeightSyncError
from aioinfer.weights.manifest import EXTRA_STATE, Leaf, Manifest, plan, shortened

_COMPILED = "_orig_mod."


class Weights:
    """Tensors and what they are.

    Attributes:
        manifest: names, shapes and dtypes.
        tensors: one for each leaf of the manifest, without gradients; they may share memory
            with a model that lives on.
        extra: the extra states by name.
    """

    __slots__ = ("extra", "manifest", "tensors")

    def __init__(
        self, manifest: Manifest, tensors: Sequence[torch.Tensor], extra: Mapping[str, Any]
    ) -> None:
        self.manifest = manifest
        self.tensors = tensors
        self.extra = extra

    def clone(self) -> Weights:
        """Return the same values in memory of their own."""
        with torch.no_grad():
            tensors = [t.clone(memory_format=torch.contiguous_format) for t in self.tensors]
        return Weights(self.manifest, tensors, copy.deepcopy(self.extra))

    def check_finite(self) -> None:
        """Refuse NaN and infinity.

        Raises:
            WeightSyncError: some are not finite; the message names them.
        """
        leaves = zip(self.manifest.leaves, self.tensors, strict=True)
        with torch.no_grad():
            broken = [
                str(leaf)
                for leaf, tensor in leaves
                if (tensor.is_floating_point() or tensor.is_complex())
                and not torch.isfinite(tensor).all()
            ]
        if broken:
            raise WeightSyncError(f"the weights are not finite: {shortened(broken)}")


def read(source: Any) -> Weights:
    """Return the weights of a module, a state dict or a TensorDict, without copying them.

    Raises:
        TypeError: it is something else, or holds something else than tensors.
        WeightSyncError: a module whose lazy parts have no weights yet.
    """
    if isinstance(source, nn.Module):
        return read_module(source)
    if isinstance(source, TensorDictBase) or is_tensor_collection(source):
        nested: Any = source.to_tensordict() if not isinstance(source, TensorDictBase) else source
        source = dict(nested.flatten_keys(".").items())
    if isinstance(source, Mapping):
        return _read_mapping(source)
    raise TypeError(
        "weights must be an nn.Module, a state dict (names and tensors) or a TensorDict, "
        f"got {type(source).__name__}"
    )


def read_module(module: nn.Module) -> Weights:
    """Return the weights of a module, without copying them.

    Raises:
        WeightSyncError: lazy parts of it have no weights yet.
    """
    temporary = {
        _join(prefix, name)
        for prefix, inner in module.named_modules(remove_duplicate=False)
        for name in inner._non_persistent_buffers_set
    }
    extra = {
        _plain(_join(prefix, EXTRA_STATE)): inner.get_extra_state()
        for prefix, inner in module.named_modules()
        if type(inner).get_extra_state is not nn.Module.get_extra_state
    }
    named = _Named(extra)
    for name, tensor in _named_tensors(module):
        if is_lazy(tensor):
            raise WeightSyncError(
                f"{_plain(name)!r} of the model is lazy and not initialised, so it has no shape "
                "yet; call the model once on an example input before its weights are sent or "
                "served"
            )
        named.add(_plain(name), tensor, persistent=name not in temporary)
    return named.weights()


class ModuleReader:
    """Reads the weights of one module again and again, for less.

    What was read is used again as long as every parameter and buffer is the same tensor at the
    same place, and none has come or gone.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._known: Weights | None = None
        self._places: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        self._counts: list[tuple[dict[str, Any], int]] = []

    def reads(self, module: nn.Module) -> bool:
        """Whether this is for ``module``."""
        return self._module() is module

    def read(self) -> Weights:
        """Return the module's weights, as :func:`read_module` does."""
        known = self._known
        if known is not None and self._is_current():
            return known
        module = self._module()
        assert module is not None
        weights = read_module(module)
        # Extra state can change without a trace, and some modules keep tensors elsewhere.
        self._known = weights if not weights.extra and self._find(module) else None
        return weights

    def _is_current(self) -> bool:
        for owner, count in self._counts:
            if len(owner) != count:
                return False
        for owner, name, tensor, address in self._places:
            if owner.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def _find(self, module: nn.Module) -> bool:
        modules = list(module.modules())
        owners: list[dict[str, Any]] = [
            owner for inner in modules for owner in (inner._parameters, inner._buffers)
        ]
        self._places = [
            (owner, name, tensor, tensor.data_ptr())
            for owner in owners
            for name, tensor in owner.items()
            if tensor is not None
        ]
        owners += [inner._modules for inner in modules]
        self._counts = [(owner, len(owner)) for owner in owners]
        found = {id(tensor) for _, _, tensor, _ in self._places}
        return found == {id(tensor) for _, tensor in _named_tensors(module)}


def set_extra_state(module: Any, extra: Mapping[str, Any]) -> None:
    """Give the extra states to the modules that they belong to."""
    if not extra:
        return
    for prefix, inner in module.named_modules():
        name = _plain(_join(prefix, EXTRA_STATE))
        if name in extra:
            inner.set_extra_state(copy.deepcopy(extra[name]))


def complete(source: Weights, whole: Weights, *, cast: bool, partial: bool) -> Weights:
    """Bring ``source`` into the form of ``whole``, which lends what is missing.

    Raises:
        WeightSyncError: it does not fit.
    """
    if source.manifest == whole.manifest:
        return source
    source = _tied_alike(source, whole.manifest)
    found = plan(whole.manifest, source.manifest, cast=cast, partial=partial)
    tensors = [
        mine if index is None else source.tensors[index].to(mine.dtype)
        for index, mine in zip(found, whole.tensors, strict=True)
    ]
    return Weights(whole.manifest, tensors, {**whole.extra, **source.extra})


def _tied_alike(source: Weights, manifest: Manifest) -> Weights:
    """Drop what ``manifest`` knows to be a further name of another leaf, if it is equal to it.

    The tensors of a saved state dict, or of one that was sent, no longer share their memory.
    """
    values = dict(zip((leaf.name for leaf in source.manifest.leaves), source.tensors, strict=True))
    known = set(source.manifest.ties)
    ties = []
    for alias, name in manifest.ties:
        if (alias, name) in known or alias not in values or name not in values:
            continue
        if not torch.equal(values[alias], values[name]):
            raise WeightSyncError(
                f"{alias!r} and {name!r} are one tensor, but were given different values"
            )
        ties.append((alias, name))
    if not ties:
        return source
    dropped = {alias for alias, _ in ties}
    leaves = tuple(leaf for leaf in source.manifest.leaves if leaf.name not in dropped)
    ties += source.manifest.ties
    order = {tie: index for index, tie in enumerate(manifest.ties)}
    ties.sort(key=lambda tie: order.get(tie, len(order)))
    return Weights(
        Manifest(leaves, tuple(ties), source.manifest.extra),
        [values[leaf.name] for leaf in leaves],
        source.extra,
    )


def _read_mapping(source: Mapping[Any, Any]) -> Weights:
    extra = {}
    tensors = {}
    for key, value in source.items():
        if not isinstance(key, str):
            raise TypeError(f"weights must have names that are str, got {key!r}")
        name = _plain(key)
        if name.rpartition(".")[2] == EXTRA_STATE:
            extra[name] = value
        elif isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            raise TypeError(f"weights must hold tensors, got {type(value).__name__} for {key!r}")
    named = _Named(extra)
    for name, tensor in tensors.items():
        named.add(name, tensor, persistent=True)
    return named.weights()


class _Named:
    """Collects tensors, and notices which are the same."""

    def __init__(self, extra: Mapping[str, Any]) -> None:
        self._extra = extra
        self._leaves: list[Leaf] = []
        self._tensors: list[torch.Tensor] = []
        self._ties: list[tuple[str, str]] = []
        self._first: dict[Any, str] = {}

    def add(self, name: str, tensor: torch.Tensor, *, persistent: bool) -> None:
        first = self._first.setdefault(_memory(tensor), name)
        if first != name:
            self._ties.append((name, first))
            return
        self._leaves.append(Leaf(name, tuple(tensor.shape), tensor.dtype, persistent))
        self._tensors.append(tensor.detach())

    def weights(self) -> Weights:
        manifest = Manifest(tuple(self._leaves), tuple(self._ties), tuple(self._extra))
        return Weights(manifest, self._tensors, self._extra)


def _memory(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are one: of a state dict, say, which detaches them."""
    if type(tensor) in _ORDINARY and tensor.layout is torch.strided and tensor.numel():
        where = tensor.data_ptr()
        if where:  # else there is no memory, on the meta device
            return tensor.device, where, tensor.shape, tensor.stride(), tensor.dtype
    return id(tensor)


_ORDINARY = (torch.Tensor, nn.Parameter, nn.Buffer)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "") if _COMPILED in name else name


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
