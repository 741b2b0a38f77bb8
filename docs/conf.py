"""Settings of the documentation site; built by `make docs`."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

import aioinfer

_ROOT = Path(__file__).resolve().parent.parent
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]

project = "aioinfer"
author = "the aioinfer authors"
copyright = "2026, the aioinfer authors"
release = version = _PROJECT["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"aioinfer {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every reference must resolve, but nothing is fetched while building, so references into
# other projects stay unlinked: these are their names, qualified or as the code imports them.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(_asyncio|abc|asyncio|collections|concurrent|enum|multiprocessing)\..+"),
    (r"py:.*", r"(random|ssl|threading|typing|types)\..+"),
    (r"py:.*", r"(tensordict|torch|torchrl|gymnasium)\..+"),
    (r"py:.*", r"(Any|Callable|Mapping|NestedKey|Self|Sequence|T|TracebackType)"),
    (r"py:.*", r"(InteractionType|TensorDict|TensorDictBase|nn\.Module)"),
]


def _resolve_private(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Lead a reference to where a public name is defined to where it is documented.

    Annotations name `aioinfer.server.InferenceServer`; the API page documents
    `aioinfer.InferenceServer`. Types that are not public are shown without a link.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    parts = target.removeprefix("aioinfer.").split(".")
    for i, name in enumerate(parts):
        if name in aioinfer.__all__:
            public = ".".join(["aioinfer", *parts[i:]])
            if public == target:
                return None
            return env.domains["py"].resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], public, node, contnode
            )
    return contnode if _is_private(target) else None


def _is_private(target: str) -> bool:
    """Whether ``target`` exists in the package but is not among its documented names."""
    module_name, _, name = target.rpartition(".")
    if not module_name.startswith("aioinfer"):
        return target in _INTERNAL_TYPES
    try:
        return hasattr(importlib.import_module(module_name), name)
    except ImportError:
        return False


# Internal types that stand in public signatures, as the code imports them.
_INTERNAL_TYPES = {"Clock", "CollateFn", "Executor", "Policy"}


def _keep(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Remember an attribute's docstring as it was written."""
    if what == "attribute":
        _written[name] = list(lines)


def _restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undo napoleon, which takes "Why it left: full" for an attribute of type "Why it left"."""
    if what == "attribute":
        lines[:] = _written.pop(name)


_written: dict[str, list[str]] = {}


def setup(app: Any) -> dict[str, bool]:
    app.connect("missing-reference", _resolve_private)
    app.connect("autodoc-process-docstring", _keep, priority=400)
    app.connect("autodoc-process-docstring", _restore, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
