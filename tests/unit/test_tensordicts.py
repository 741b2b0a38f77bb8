"""A TensorDict that is made without its constructor is one like any other."""

from __future__ import annotations

import pickle

import pytest
import torch
from tensordict import TensorDict

from aioinfer import tensordicts
from aioinfer.tensordicts import new_tensordict

SIZE = torch.Size([2])


def test_the_short_cut_is_taken() -> None:
    """The tested version of tensordict is one for which it holds."""
    assert new_tensordict is tensordicts._made


@pytest.mark.parametrize("attribute", ["_device", "_new_in_this_version"])
def test_another_version_gets_the_constructor(attribute, monkeypatch) -> None:
    """Where a TensorDict has other attributes than expected, the short cut is not taken."""
    make = tensordicts._constructed

    def other(leaves, size):
        td = make(leaves, size)
        setattr(td, attribute, "another value")
        return td

    assert tensordicts._is_all_there_is()
    monkeypatch.setattr(tensordicts, "_constructed", other)
    assert not tensordicts._is_all_there_is()


def test_it_is_like_any_other() -> None:
    """What is done with TensorDicts can be done with it."""
    td = new_tensordict(
        {"a": torch.arange(2), "b": new_tensordict({"c": torch.ones(2)}, SIZE)}, SIZE
    )
    same = TensorDict({"a": torch.arange(2), "b": {"c": torch.ones(2)}}, [2])
    assert (td == same).all()
    assert (torch.stack([td, td])[1] == same).all()
    assert (pickle.loads(pickle.dumps(td)) == same).all()
    assert td["b", "c"].tolist() == [1, 1]
    td.set("d", torch.zeros(2))
    td.batch_size = []
    assert td.clone().lock_().is_locked
    assert set(td.keys()) == {"a", "b", "d"}
    with pytest.raises(RuntimeError):
        td.batch_size = [3]
