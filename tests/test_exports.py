"""The public surface: what is there, that it is described, and that it stays."""

from __future__ import annotations

import inspect
from importlib import resources
from typing import Any

import pytest

import aioinfer
import aioinfer.testing
from aioinfer import errors

PROMISED = {
    "AsyncioTransport",
    "InferenceClient",
    "InferenceError",
    "InferenceServer",
    "InferenceTransport",
    "InvalidRequestError",
    "ModelError",
    "MonarchTransport",
    "QueueFullError",
    "RayTransport",
    "ServerClosedError",
    "ServerDiedError",
    "SyncInferenceClient",
    "ThreadingTransport",
}
"""The names of the design that exist so far."""


def test_what_was_promised_is_there():
    """Every name of the design can be imported from the package."""
    assert set(aioinfer.__all__) >= PROMISED


def test_all_is_sorted_and_true():
    """``__all__`` is sorted, holds nothing twice, and every name of it exists."""
    assert sorted(set(aioinfer.__all__)) == list(aioinfer.__all__)
    for name in aioinfer.__all__:
        assert hasattr(aioinfer, name)


def test_nothing_public_is_left_out():
    """Every class and function that the package shows is in ``__all__``."""
    shown = {
        name
        for name, value in vars(aioinfer).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert shown <= set(aioinfer.__all__)


def test_the_package_is_typed():
    """Checkers are told that the package carries types."""
    assert resources.files(aioinfer).joinpath("py.typed").is_file()


def test_the_version():
    """The version says what is installed."""
    assert aioinfer.__version__.count(".") == 2


def _public(of: Any, names: list[str]) -> list[Any]:
    found = []
    for name in names:
        value = getattr(of, name)
        found.append(pytest.param(value, id=name))
        if not inspect.isclass(value):
            continue
        for attribute, member in vars(value).items():
            if attribute.startswith("_") and attribute != "__call__":
                continue
            if inspect.isroutine(member) or isinstance(member, property):
                found.append(pytest.param(member, id=f"{name}.{attribute}"))
    return found


@pytest.mark.parametrize(
    "thing",
    [*_public(aioinfer, aioinfer.__all__), *_public(aioinfer.testing, aioinfer.testing.__all__)],
)
def test_everything_public_is_described(thing: Any):
    """Every public class, function, method and property has a docstring, or inherits one."""
    assert inspect.getdoc(thing) or _inherited(thing)


def _inherited(thing: Any) -> str | None:
    """The docstring that an override has from the class it overrides for."""
    function = getattr(thing, "fget", thing)
    module = inspect.getmodule(function)
    owner = getattr(module, function.__qualname__.split(".")[0], None)
    return inspect.getdoc(getattr(owner, function.__name__, None)) if owner else None


@pytest.mark.parametrize("name", [n for n in aioinfer.__all__ if n.endswith("Error")])
def test_the_errors_are_one_tree(name: str):
    """Everything that the library raises about a request can be caught with one name."""
    assert issubclass(getattr(aioinfer, name), aioinfer.InferenceError)
    assert getattr(errors, name) is getattr(aioinfer, name)


def test_an_invalid_request_is_a_value_error():
    """Who catches ValueError for bad input catches a bad request too."""
    assert issubclass(aioinfer.InvalidRequestError, ValueError)


def test_both_clients_are_called_alike():
    """One meaning of the arguments on both kinds of client."""
    for method in ("__call__", "submit"):
        kinds = [
            inspect.signature(getattr(client, method)).parameters
            for client in (aioinfer.InferenceClient, aioinfer.SyncInferenceClient)
        ]
        assert list(kinds[0]) == list(kinds[1])
        assert [p.default for p in kinds[0].values()] == [p.default for p in kinds[1].values()]
        assert {"td", "timeout", "priority"} <= set(kinds[0])


def test_the_names_of_the_server_are_those_of_torchrl():
    """Where the meaning is the same, so is the name."""
    parameters = inspect.signature(aioinfer.InferenceServer).parameters
    assert list(parameters)[:2] == ["model", "transport"]
    assert set(parameters) >= {
        *("max_batch_size", "min_batch_size", "timeout", "collate_fn", "device"),
        *("output_device", "policy_version", "policy_version_key"),
    }
    for name in ("start", "shutdown", "client", "update_model", "stats", "is_alive"):
        assert hasattr(aioinfer.InferenceServer, name)
