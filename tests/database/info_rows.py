"""Rows of `info` against the declaration of their kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from traceml.database.info_kinds import InfoKind

__all__ = ["undeclared"]


def undeclared(rows: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Return kind and name of fields that no kind declares; `RankSnapshot` declares those of a snapshot.

    Raises:
        ValueError: a kind is not declared.
    """
    found = {(InfoKind(row["kind"]), name) for row in rows for name in row if name not in ("kind", "t_ns")}
    return {(kind, name) for kind, name in found if name not in kind.fields and kind is not InfoKind.SNAPSHOT}
