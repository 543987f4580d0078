"""The package's source: each file is parsed and walked once for all tests of one process."""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path

import traceml

__all__ = ["SOURCE", "nodes_of", "source_files"]

SOURCE = Path(traceml.__file__).parent


@cache
def source_files() -> tuple[Path, ...]:
    """Return the package's Python files, sorted."""
    return tuple(sorted(SOURCE.rglob("*.py")))


def nodes_of(path: Path) -> list[ast.AST]:
    """Return all nodes of a file's syntax tree: to walk a tree takes as long as to parse it."""
    return _nodes()[path]


@cache
def _nodes() -> dict[Path, list[ast.AST]]:
    gc.disable()  # a million objects, none of which goes away
    try:
        return {path: list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) for path in source_files()}
    finally:
        gc.freeze()
        gc.enable()
