"""Making a TensorDict of tensors that are known to fit, for what a dictionary costs.

A server makes one per reply. TensorDict's constructor checks what holds here anyway, at six times
the cost, and even its own short cut costs twice as much.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict


def _made(leaves: dict[Any, Any], size: torch.Size) -> TensorDict:
    made = TensorDict.__new__(TensorDict)
    made.__dict__ = {
        "_device": None,
        "_tensordict": leaves,
        "_batch_size": size,
        "_td_dim_names": None,
    }
    return made


def _constructed(leaves: dict[Any, Any], size: torch.Size) -> TensorDict:
    return TensorDict(leaves, batch_size=size)


def _is_all_there_is() -> bool:
    """Whether this version of TensorDict consists of what :func:`_made` sets."""
    leaves, size = {"leaf": torch.zeros(2), "below": TensorDict({}, [2])}, torch.Size([2])
    made, constructed = vars(_made(dict(leaves), size)), vars(_constructed(leaves, size))
    return made.keys() == constructed.keys() and all(
        type(made[name]) is type(there)
        and (dict(there) == leaves if name == "_tensordict" else made[name] == there)
        for name, there in constructed.items()
    )


new_tensordict = _made if _is_all_there_is() else _constructed
"""Make a TensorDict of ``leaves``, tensors or TensorDicts that all have the batch size ``size``.
It takes the dictionary over."""
