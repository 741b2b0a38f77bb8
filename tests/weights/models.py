"""Policies that show which weights they were computed with."""

from __future__ import annotations

from typing import Any

import torch
from helpers import row
from tensordict import TensorDictBase
from torch import nn


class Uniform(nn.Module):
    """Every value of every parameter is the same; a forward returns the least and the largest.

    The parameters are read one after the other, so that a write in between shows.
    """

    in_keys = ("observation",)
    out_keys = ("low", "high")

    def __init__(self, leaves: int = 8, numel: int = 512, value: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.full((numel,), float(value)) for _ in range(leaves))

    def set_to(self, value: float) -> Uniform:
        with torch.no_grad():
            for weight in self.weights:
                weight.fill_(value)
        return self

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        rows = td.batch_size[0]
        seen = torch.stack([part for w in self.weights for part in (w[0], w.min(), w.max())])
        td["low"] = seen.min().expand(rows)
        td["high"] = seen.max().expand(rows)
        return td


class Extra(nn.Module):
    """A module with a state of its own besides tensors."""

    def __init__(self, note: Any = None) -> None:
        super().__init__()
        self.note = note

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


class Everything(nn.Module):
    """Parameters, buffers of all kinds, a tie, a scalar, integers, an empty one, extra state."""

    in_keys = ("observation",)
    out_keys = ("all",)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(5, dtype=torch.float64), persistent=False)
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("table", torch.zeros(4, 3).t())  # not contiguous
        self.extra = Extra("old")
        self.eval()

    def change(self, seed: int) -> Everything:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 100 > 50)
                if tensor.is_floating_point():
                    tensor.add_(torch.rand(tensor.shape, generator=generator))
        self.norm.running_var.abs_().add_(1)
        self.extra.note = f"seed {seed}"
        return self

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Everything there is, in one row of float64."""
        values = [t.reshape(-1).double() for t in [*self.parameters(), *self.buffers()]]
        note = torch.tensor([float(sum(map(ord, str(self.extra.note))))]).double()
        values += [note, self.second(self.norm(td["observation"][:1])).reshape(-1).double()]
        td["all"] = torch.cat(values).expand(td.batch_size[0], -1)
        return td


def everything_of(model: Everything) -> torch.Tensor:
    """What a reply of this model must hold."""
    with torch.no_grad():
        return model(row(1).unsqueeze(0))["all"][0]


class Other(nn.Module):
    """As :class:`Uniform`, with something different about it."""

    def __init__(self, *parts: tuple[str, nn.Parameter]) -> None:
        super().__init__()
        for name, part in parts:
            self.register_parameter(name, part)
