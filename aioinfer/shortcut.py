"""Calling a :class:`TensorDictModule` for what it does, without what that costs.

A ``TensorDictModule`` takes its inputs from a TensorDict, calls its module with them, and
writes the results back. Around that it dispatches, converts and validates for every use it
may have; in tensordict 0.14 the conversion even looks for pandas on the disk, each time. For
a small policy this is three quarters of the forward. Here the same is done for the one plain
case: a module, names of inputs, names of outputs, and tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer.signature import entries
from aioinfer.tensordicts import new_tensordict


def shortcut(
    model: Callable[[Any], Any], wrap: Callable[[Any], Callable[..., Any]] | None = None
) -> Callable[[Any], Any]:
    """Return what does the same as ``model``, and less besides; ``model`` itself where unsure.

    What is returned reads the model anew at each call, so that hooks, a new inner module and
    new weights take effect as they do on the model.

    Args:
        model: the policy.
        wrap: makes what is to be called of the module inside the policy, which takes and returns
            tensors; of the policy itself where that is not plain.
    """
    if _is_plain(model):
        return _Shortcut(model, wrap)
    return model if wrap is None else wrap(model)


def _is_plain(model: Any) -> bool:
    """Whether it was made from a module and keys that are strings, with no other option."""
    if type(model) is not TensorDictModule:
        return False
    keys = (*model.in_keys, *model.out_keys)
    if not all(isinstance(key, str) and key != "_" for key in keys):
        return False
    plain = TensorDictModule(model.module, in_keys=model.in_keys, out_keys=model.out_keys)
    plain.train(model.training)
    same: bool = vars(plain) == vars(model)
    return same


class _Shortcut:
    def __init__(
        self, model: TensorDictModule, wrap: Callable[[Any], Callable[..., Any]] | None
    ) -> None:
        self._model = model
        self._wrapped = None if wrap is None else wrap(model.module)
        self._in_keys = list(model.in_keys)
        self._out_keys = list(model.out_keys)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        model = self._model
        if model._forward_hooks or model._forward_pre_hooks or model._compiled_call_impl:
            return model(batch)
        run = self._wrapped
        if run is None:  # from the dictionary itself, where it is: both classes look up in Python
            run = model._modules.get("module")
            run = model.module if run is None else run
        given = entries(batch) if type(batch) is TensorDict else batch
        found = run(*[given[key] for key in self._in_keys])
        outputs = found if type(found) is tuple else (found,)
        rows = batch.batch_size
        if len(outputs) == len(self._out_keys):
            for output in outputs:
                if type(output) is not torch.Tensor or output.shape[:1] != rows:
                    break
            else:
                return new_tensordict(dict(zip(self._out_keys, outputs, strict=True)), rows)
        # Other results have rules of their own: a model that has just these applies them.
        keys = {"in_keys": self._in_keys, "out_keys": self._out_keys}
        return TensorDictModule(lambda *_: found, **keys)(batch)
