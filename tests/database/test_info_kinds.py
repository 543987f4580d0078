"""Kinds of `info` rows: each has a sender and a reader, by its declaration."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from tests.source_tree import SOURCE, nodes_of, source_files
from traceml.database.info_kinds import InfoKind

# Kinds of rows that a reader leaves out, which it does not read.
LEFT_OUT = {"_NO_PROGRESS", "_SILENT"}
_OF_ROW = ("row.get('kind')", "row['kind']")
# Functions that take the kind first, and its fields by name.
_SENDERS = {"note", "_note", "report", "_report"}


def _kind_of(node: ast.AST) -> InfoKind | None:
    """Return the kind that a node names: `InfoKind.MODEL`."""
    is_named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "InfoKind"
    return InfoKind[node.attr] if is_named else None  # type: ignore[attr-defined]


def _kinds_in(nodes: list[ast.expr | None]) -> set[InfoKind]:
    inside = (each for node in nodes if node is not None for each in ast.walk(node))
    return {kind for each in inside if (kind := _kind_of(each)) is not None}


def _sent() -> set[InfoKind]:
    """Return the kinds that are given to a function, or that a row has."""
    found: set[InfoKind] = set()
    for path in source_files():
        for node in nodes_of(path, ast.Call, ast.Dict):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") != "get":
                found |= {kind for each in node.args if (kind := _kind_of(each)) is not None}
            elif isinstance(node, ast.Dict):
                found |= {kind for each in node.values if (kind := _kind_of(each)) is not None}

    return found


def _read() -> set[InfoKind]:
    """Return the kinds that are compared, kept in a constant, or have a function by their name."""
    found: set[InfoKind] = set()
    for path in source_files():
        for node in nodes_of(path, ast.Compare, ast.Dict, ast.Assign):
            if isinstance(node, ast.Compare):
                found |= _kinds_in([node.left, *node.comparators])
            elif isinstance(node, ast.Dict):
                found |= _kinds_in(node.keys)
            elif isinstance(node, ast.Assign) and LEFT_OUT.isdisjoint(map(ast.unparse, node.targets)):
                found |= _kinds_in([node.value]) if isinstance(node.value, ast.Tuple) else set()

    return found


def test_every_kind_is_sent() -> None:
    """A kind that nobody sends is not declared."""
    assert set(InfoKind) - _sent() == set()


def test_every_kind_has_a_reader_or_is_only_stored() -> None:
    """A row that nobody reads costs the rank, the wire and the store."""
    assert set(InfoKind) - _read() == {kind for kind in InfoKind if kind.is_only_stored}


def test_no_kind_is_a_literal() -> None:
    """A typing error in a literal would be silent; mypy and the import find one in a member."""
    wrong = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in source_files()
        for names in [("kind", *_OF_ROW) if 'row.get("kind")' in path.read_text(encoding="utf-8") else _OF_ROW]
        for node in nodes_of(path, ast.Compare, ast.Dict)
        if any(each in set(InfoKind) for each in _literals(node, names))
    ]

    assert wrong == []


def _literals(node: ast.Compare | ast.Dict, names: tuple[str, ...]) -> Iterator[object]:
    """Yield literals that a row's kind, by one of its names, is compared with, or that a row has as its kind."""
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        found = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "kind"]
    else:
        found = node.comparators if ast.unparse(node.left) in names else []

    yield from (each.value for value in found for each in ast.walk(value) if isinstance(each, ast.Constant))


def test_fields_are_those_that_are_sent() -> None:
    """Senders name declared fields only, and all of them, unless some come from a function that describes a thing."""
    sent: dict[InfoKind, set[str]] = defaultdict(set)
    described = set()
    for path in source_files():
        for node in nodes_of(path, ast.Call):
            kind = _kind_of(node.args[0]) if node.args else None
            if kind is None or getattr(node.func, "attr", getattr(node.func, "id", "")) not in _SENDERS:
                continue

            sent[kind] |= {each.arg for each in node.keywords if each.arg} - {"urgent"}
            if len(node.args) > 1 or any(each.arg is None for each in node.keywords):
                described.add(kind)

    assert {kind: names - set(kind.fields) for kind, names in sent.items() if names - set(kind.fields)} == {}
    whole = sent.keys() - described
    assert {kind: kind.fields for kind in whole if set(kind.fields) != sent[kind]} == {}
