"""A TensorDictModule called the short way does what it does the long way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from aioinfer.shortcut import shortcut


def batch() -> TensorDict:
    return TensorDict({"a": torch.arange(6.0).view(3, 2), "b": torch.ones(3, 2)}, batch_size=[3])


def made_of(module: Any, n_out: int = 1, **options: Any) -> TensorDictModule:
    outs = ["x", "y", "z"][:n_out]
    return TensorDictModule(module, in_keys=["a", "b"], out_keys=outs, **options)


class Counting(nn.Module):
    """Returns what it is told to, and counts its calls."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result
        self.calls = 0

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        self.calls += 1
        return self.result(a, b) if callable(self.result) else self.result


def outcome(call: Any) -> Any:
    try:
        answer = call(batch())
    except Exception as error:
        return type(error)
    return answer.select("x", "y", "z", strict=False).to_dict()


@pytest.mark.parametrize(
    ("result", "n_out"),
    [
        (lambda a, b: a + b, 1),
        (lambda a, b: (a + b,), 1),
        (lambda a, b: (a, b), 2),
        (lambda a, b: {"x": a, "y": b}, 2),
        (lambda a, b: TensorDict({"x": a, "y": b}, batch_size=[3]), 2),
        (lambda a, b: TensorDict({"deep": a}, batch_size=[3]), 1),
        (lambda a, b: [1, 2, 3], 1),
        (lambda a, b: (a, b), 1),  # too many
        (lambda a, b: (a, b), 3),  # too few
        (lambda a, b: None, 1),
        (lambda a, b: a[:2], 1),
        (lambda a, b: a.sum(), 1),
    ],
)
def test_the_result_is_the_same(result: Any, n_out: int) -> None:
    """Whatever the inner module returns, the answer or the error is the model's own."""
    model = made_of(Counting(result), n_out)
    expected = outcome(model)
    short = shortcut(model)
    assert short is not model
    found = outcome(short)
    if isinstance(expected, type):
        assert found is expected
    else:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert str(found[key]) == str(value)
    assert model.module.calls == 2  # one each: nothing is computed twice


def test_other_models_are_left_alone() -> None:
    """What is not a plain TensorDictModule is called itself."""

    class Mine(TensorDictModule):
        pass

    linear = nn.Linear(2, 2)
    others: list[Any] = [
        lambda td: td,
        Mine(linear, in_keys=["a"], out_keys=["x"]),
        TensorDictSequential(TensorDictModule(linear, in_keys=["a"], out_keys=["x"])),
        TensorDictModule(linear, in_keys=[("nested", "a")], out_keys=["x"]),
        TensorDictModule(linear, in_keys=["a"], out_keys=["_"]),
        TensorDictModule(linear, in_keys={"a": "input"}, out_keys=["x"]),
        TensorDictModule(linear, in_keys=["a"], out_keys=["x"], method="forward"),
        TensorDictModule(linear, in_keys=["a"], out_keys=["x"], inplace=False),
    ]
    hooked = TensorDictModule(linear, in_keys=["a"], out_keys=["x"])
    hooked.register_forward_hook(lambda *_: None)
    for other in [*others, hooked]:
        assert shortcut(other) is other


def test_a_model_that_is_in_evaluation_mode_is_plain() -> None:
    """``eval()`` is no option that would make a model special."""
    model = made_of(Counting(lambda a, b: a)).eval()
    assert shortcut(model) is not model


def test_hooks_that_come_later_run() -> None:
    """A hook registered while the server runs is not passed by."""
    model = made_of(Counting(lambda a, b: a))
    short = shortcut(model)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    short(batch())
    assert seen == ["before", "after"]


def test_a_new_inner_module_is_used() -> None:
    """Replacing ``model.module`` takes effect at the next call."""
    model = made_of(Counting(lambda a, b: a))
    short = shortcut(model)
    model.module = Counting(lambda a, b: b)
    assert torch.equal(short(batch())["x"], torch.ones(3, 2))
