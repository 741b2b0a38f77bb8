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
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule

from aioinfer.tensordicts import new_tensordict


def shortcut(model: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what does the same as ``model``, and less besides; ``model`` itself where unsure.

    What is returned reads the model anew at each call, so that hooks, a new inner module and
    new weights take effect as they do on the model.
    """
    return _Shortcut(model) if _is_plain(model) else model


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
    def __init__(self, model: TensorDictModule) -> None:
        self._model = model
        self._in_keys = list(model.in_keys)
        self._out_keys = list(model.out_keys)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        model = self._model
        if model._forward_hooks or model._forward_pre_hooks or model._compiled_call_impl:
            return model(batch)
        found = model.module(*[batch.get(key) for key in self._in_keys])
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
