"""The tree of errors in the module's text against the classes."""

from __future__ import annotations

import builtins
import re

from traceml import errors
from traceml.errors import TraceMLError

_LINE = re.compile(r"^(?P<bars>[│ ]*)[├└]── (?P<name>\w+) +(?:\((?P<bases>[\w, ]+)\))?")


def documented() -> dict[str, set[type]]:
    """Each error of the tree: the class above it, and the built-in classes that it names."""
    tree: dict[str, set[type]] = {"TraceMLError": set()}
    parents = ["TraceMLError"]
    for line in (errors.__doc__ or "").splitlines():
        if found := _LINE.match(line):
            depth = len(found["bars"]) // 4 + 1
            named = {getattr(builtins, base) for base in (found["bases"] or "").split(", ") if base}
            tree[found["name"]] = {getattr(errors, parents[depth - 1]), *named}
            parents[depth:] = [found["name"]]

    return tree


def test_the_tree_is_the_classes() -> None:
    """Every error is in the tree, below the class that it derives from, with its built-in classes."""
    classes = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, TraceMLError)}

    assert documented().keys() == classes
    for name, bases in documented().items():
        assert bases <= set(getattr(errors, name).__mro__), name


def test_every_error_is_offered() -> None:
    """`__all__` lists the classes of the tree."""
    assert set(errors.__all__) == documented().keys()
