"""The package's source: each file is parsed and walked once for all tests of one process."""

from __future__ import annotations

import ast
import gc
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import traceml

__all__ = ["SOURCE", "nodes_of", "source_files"]

SOURCE = Path(traceml.__file__).parent
_Kinds = dict[type[ast.AST], list[Any]]


@cache
def source_files() -> tuple[Path, ...]:
    """Return the package's Python files, sorted."""
    return tuple(sorted(SOURCE.rglob("*.py")))


def nodes_of(path: Path, *kinds: type[ast.AST]) -> list[Any]:
    """Return the nodes of some kinds of a file's syntax tree, one kind after the other."""
    found = _nodes()[path]
    return [node for kind in kinds for node in found.get(kind, ())]


@cache
def _nodes() -> dict[Path, _Kinds]:
    gc.disable()  # a million objects, none of which goes away
    try:
        return {path: _walked(ast.parse(path.read_text(encoding="utf-8"))) for path in source_files()}
    finally:
        gc.freeze()
        gc.enable()


def _walked(tree: ast.AST) -> _Kinds:
    """Return all nodes by their kind. `ast.walk` takes three times as long."""
    found: defaultdict[type[ast.AST], list[Any]] = defaultdict(list)
    waiting = [tree]
    for node in waiting:  # which grows
        found[type(node)].append(node)
        for value in vars(node).values():
            if isinstance(value, ast.AST):
                waiting.append(value)
            elif type(value) is list:
                waiting += [each for each in value if isinstance(each, ast.AST)]

    return found
