"""Rows that the tests of the page store."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from traceml.database.schema import METRICS
from traceml.database.store.store import StoreWriter

__all__ = ["NASTY", "add_metrics", "add_rank_rows", "rewrite"]

NASTY = """<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'"{{pwned}}`${window.pwned=1}` \u2028 é"""


def add_rank_rows(writer: StoreWriter, stream: int, rows: np.ndarray[Any, Any], seq: int) -> None:
    """Append step rows of a rank."""
    writer.append(stream, "steps", seq, len(rows), rows.tobytes(), int(rows["step"][0]), int(rows["step"][-1]))


def add_metrics(writer: StoreWriter, stream: int, metrics: Mapping[str, Any]) -> None:
    """Log values of one rank, one per step."""
    for number, (name, values) in enumerate(metrics.items(), start=10):
        values = np.asarray(values)
        named = msgpack.packb({"id": number, "name": name})
        writer.append(stream, "names", writer.next_seq(stream, "names"), 1, named)
        rows = np.zeros(len(values), METRICS.dtype)
        rows["step"], rows["name_id"], rows["value"], rows["t_ns"] = np.arange(len(values)), number, values, 10**18
        writer.append(stream, "metrics", writer.next_seq(stream, "metrics"), len(rows), rows.tobytes())


def rewrite(store: Path, statement: str) -> None:
    """Change a store behind the back of its writer."""
    with closing(sqlite3.connect(store)) as database:
        database.execute(statement)
        database.commit()
