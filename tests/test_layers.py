"""Imports point one way. The rules are those of the design, read from the sources."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import aioinfer

ROOT = Path(aioinfer.__file__).parent
STANDARD_AND_OTHERS = {"anyio", "asyncio", "tensordict", "threading", "time", "torch", "uvloop"}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST) -> set[str]:
    """The names of the modules that are imported at run time."""
    found = set()
    for_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out in full"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}
IMPORTS = {name: _imports(ast.parse(path.read_text())) for name, path in SOURCES.items()}
GRAPH = {name: (imports & set(SOURCES)) - {name} for name, imports in IMPORTS.items()}
CONCRETE = sorted(
    name
    for name in SOURCES
    if name.startswith("aioinfer.transports.") and name != "aioinfer.transports.base"
)


def _knows(module: str) -> set[str]:
    """What a module imports from outside the package, by its first name."""
    return {name.partition(".")[0] for name in IMPORTS[module]} & STANDARD_AND_OTHERS


def _reached(module: str) -> set[str]:
    """The module and whatever of the package it needs, however indirectly."""
    reached: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += GRAPH[name]
    return reached


def test_the_package_is_read():
    """The tests of this file look at the modules that there are."""
    assert {"aioinfer", "aioinfer.server", "aioinfer.transports.base"} <= set(SOURCES)
    assert CONCRETE
    assert any(GRAPH.values())


def test_imports_have_no_cycle():
    """There is an order of the modules in which each imports earlier ones only."""
    graph = {name: needs - {"aioinfer"} for name, needs in GRAPH.items() if name != "aioinfer"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "aioinfer"])
def test_nothing_imports_the_public_face(module: str):
    """Modules import each other, never the package that gathers them."""
    gathered = {f"aioinfer.{name}" for name in aioinfer.__all__} - set(SOURCES)
    assert "aioinfer" not in IMPORTS[module]
    assert not IMPORTS[module] & gathered


@pytest.mark.parametrize("module", ["aioinfer.errors", "aioinfer.request"])
def test_errors_and_requests_are_at_the_bottom(module: str):
    """They import nothing of the package, no torch and no event loop."""
    assert GRAPH[module] == set()
    assert _knows(module) == set()


def test_the_batcher_decides_and_nothing_else():
    """The batcher and what it needs know no torch, no event loop, no clock, no threads."""
    reached = _reached("aioinfer.batching")
    assert "aioinfer.request" in reached
    assert "aioinfer.clock" not in reached
    for name in reached:
        assert _knows(name) == set(), name


def test_the_balancer_decides_and_nothing_else():
    """Which replica a request goes to is decided without torch, event loop, clock or threads."""
    for name in _reached("aioinfer.balancing"):
        assert _knows(name) == set(), name


@pytest.mark.parametrize("module", ["aioinfer.collation", "aioinfer.stats"])
def test_collation_and_stats_know_no_event_loop(module: str):
    """Neither they nor what they import of the package know asyncio."""
    for name in _reached(module):
        assert not _knows(name) & {"anyio", "asyncio", "uvloop"}, name


@pytest.mark.parametrize("module", ["aioinfer.server", "aioinfer.serving"])
def test_the_server_knows_no_concrete_transport(module: str):
    """The server and what it needs know ``transports/base.py`` only, whatever links there are."""
    assert not _reached(module) & set(CONCRETE)


@pytest.mark.parametrize("module", CONCRETE)
def test_transports_never_import_the_server(module: str):
    """A link knows clients and the base of links, nothing of who serves it."""
    reached = _reached(module)
    assert not reached & {"aioinfer.server", "aioinfer.serving"}
    assert not [name for name in reached if name.startswith("aioinfer.hosting")]


def test_the_fakes_are_for_tests():
    """Nothing of the package needs ``aioinfer.testing``."""
    for name in SOURCES:
        if not name.startswith("aioinfer.testing"):
            assert not [other for other in GRAPH[name] if other.startswith("aioinfer.testing")]


def test_time_is_read_in_one_place():
    """Only the clock reads the time, so that a test can decide what time it is."""
    clocks = {"time", "time.monotonic", "time.time", "time.perf_counter", "datetime"}
    readers = {name for name, imports in IMPORTS.items() if imports & clocks}
    assert readers <= {"aioinfer.clock"}
