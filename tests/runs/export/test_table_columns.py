"""The columns of an export, and the page that describes them."""

from __future__ import annotations

import os
from pathlib import Path

from traceml.database.info_kinds import InfoKind
from traceml.database.schema import INFO, PACKED
from traceml.runs.export.table_columns import TABLES, to_json

PAGE = Path(__file__).parents[3] / "docs" / "columns.md"


def page() -> str:
    """Return docs/columns.md as the tables are now."""
    lines = [
        "# Tables and columns of an export",
        "",
        "`traceml export --format parquet` and `--format csv` write one file per table. A cell is empty (CSV)",
        "or null (Parquet) if the value is unknown. In CSV, non-finite numbers are `nan`, `inf` or `-inf`.",
    ]
    for table in TABLES.values():
        lines += ["", f"## {table.name}", "", f"{table.doc[0].upper()}{table.doc[1:]}.", ""]
        lines += ["| column | type | meaning |", "|---|---|---|"]
        lines += [f"| `{column.name}` | {column.kind} | {column.doc} |" for column in table.columns]
        if table.name == INFO.name:
            lines += ["", "| kind | meaning | fields |", "|---|---|---|"]
            lines += [f"| `{kind}` | {kind.doc} | {', '.join(kind.fields)} |" for kind in InfoKind]

    return "\n".join(lines) + "\n"


def test_the_page_describes_every_column():
    """After a change on purpose: `UPDATE_SNAPSHOTS=1 pytest tests/runs/export/test_table_columns.py`."""
    if os.environ.get("UPDATE_SNAPSHOTS"):
        PAGE.write_text(page(), encoding="utf-8")

    assert page() == PAGE.read_text(encoding="utf-8")


def test_every_packed_table_is_exported():
    assert {table.name for table in PACKED} <= set(TABLES)


def test_numbers_say_their_unit():
    """Columns have their unit as suffix; those without are counts."""
    units = ("_ns", "_bytes", "_pct", "_c", "_w", "_mhz", "_per_step")
    plain = {
        "attempt", "rank", "step", "count", "batches", "threads", "index", "device", "cores", "pid", "value",
        "micro_batches", "flags", "sequence", "voluntary_switches", "involuntary_switches", "minor_faults",
        "major_faults", "throttle_reasons", "rows_appended", "rows_lost", "sampler_errors", "reconnects", "experiment",
        "bytes_sent", "samples", "elements", "used", "limit", "first", "loss", "fingerprint", "alloc_retries",
        "loader", "workers", "called", "detail",
    }  # fmt: skip
    numbers = {c.name for table in TABLES.values() for c in table.columns if c.kind != "string"}

    assert {name for name in numbers if not name.endswith(units)} <= plain


def test_any_value_becomes_json():
    """Values that JSON lacks are converted."""
    assert to_json({"a": float("nan"), "b": b"\x00", 1: [None]}) == '{"a":null,"b":"AA==","1":[null]}'
