"""Rows that the tests of the page store."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from traceml.database.schema import METRICS
from traceml.database.store.store import StoreWriter

__all__ = ["NASTY", "add_logged", "add_metrics", "add_rank_rows", "rewrite"]

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


def add_logged(writer: StoreWriter, stream: int, run_dir: Path) -> None:
    """Log parameters, facts, texts, images, a histogram and files of one rank, some with names that are HTML."""
    folder = run_dir / "artifacts"
    folder.mkdir()
    picture, script = f"{'a' * 64}.png", f"{'b' * 64}.svg"
    (folder / picture).write_bytes(_PICTURE)
    (folder / script).write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>window.pwned=1</script></svg>")
    (run_dir / "logs").mkdir(exist_ok=True)
    lines = [f"step {step} is fine" for step in range(3000)] + [f"ValueError: {NASTY}", "UserWarning: slow"]
    (run_dir / "logs" / "output.log").write_text("\n".join(lines[-2:] + lines))
    git = {"commit": "c0ffee" * 6, "branch": "main", "dirty": True, "diff": f"-old\n+{NASTY}"}
    packages = "torch==2.9.0\nnumpy==2.3.1"
    for row in (
        {"kind": "experiment", "name": "exp", "backends": [], "tags": {"goal": "speed"}},
        {"kind": "params", "params": {"lr": 0.1, "optimizer": {"name": "adam"}, "layout": NASTY}},
        {"kind": "collected", "name": "git", "facts": git},
        {"kind": "collected", "name": "environment", "facts": {"packages": packages, "variables": {"OMP_X": "1"}}},
        {"kind": "text", "name": f"answer {NASTY}", "step": 5, "text": NASTY},
        *({"kind": "image", "name": "sample", "step": step, "path": f"artifacts/{picture}"} for step in range(30)),
        {"kind": "histogram", "name": "weights", "step": 1, "counts": [1, 5, 2], "edges": [0.0, 1.0, 2.0, 4.0]},
        {"kind": "artifact", "name": "out/model.svg", "path": f"artifacts/{script}", "size": 76},
        {"kind": "artifact", "name": "passwd", "path": "../../../../etc/passwd", "size": 1},
        {"kind": "refused", "name": "huge.bin", "what": "artifact", "why": "it is too large"},
    ):
        data = msgpack.packb({"t_ns": 10**18, "experiment": 0, **row})
        writer.append(stream, "logged", writer.next_seq(stream, "logged"), 1, data)


_PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def rewrite(store: Path, statement: str) -> None:
    """Change a store behind the back of its writer."""
    with closing(sqlite3.connect(store)) as database:
        database.execute(statement)
        database.commit()
