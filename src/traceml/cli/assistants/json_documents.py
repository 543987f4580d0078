"""The documents that commands print as JSON, as types, and their JSON Schemas."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any, Literal

import msgspec

from traceml.renderers.text.rank_stacks_text import MissingRank, StacksRank
from traceml.runs.comparison.comparison_types import Comparison, Comparisons
from traceml.runs.fleet.fleet_types import FleetDocument
from traceml.runs.report.line_shares import LinesDocument
from traceml.runs.report.report_types import Report
from traceml.runs.run_query import RunRecord
from traceml.whatif.straggler_cost import WhatIf

__all__ = [
    "DOCUMENTS",
    "OperatorRecord",
    "ProfileDocument",
    "ProfiledRankRecord",
    "StacksDocument",
    "TraceAnalysis",
    "UnprofiledRank",
    "document_schema",
]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_PLACE = "https://github.com/traceml/traceml/blob/main/docs/schemas"
_Value = str | int | float | bool | None


class StacksDocument(msgspec.Struct, kw_only=True):
    """The result of `traceml stacks --json`."""

    schema: Literal["traceml.stacks/1"] = "traceml.stacks/1"
    run: str
    ranks: list[StacksRank]
    missing: list[MissingRank]


class ProfiledRankRecord(msgspec.Struct, kw_only=True):
    """A profiled rank; `slowdown` is profiled step time / step time before, null where that is not known."""

    rank: int
    host: str
    first_step: int
    steps: int
    slowdown: float | None


class UnprofiledRank(msgspec.Struct, kw_only=True):
    """A rank without a trace, and why."""

    rank: int
    why: str


class OperatorRecord(msgspec.Struct, kw_only=True):
    """An operator: calls and milliseconds per step, and the line of the user's code that was seen most often in it."""

    name: str
    calls_per_step: float
    self_cpu_ms: float
    device_ms: float
    file: str | None = None
    line: int | None = None
    function: str | None = None


class ProfileDocument(msgspec.Struct, kw_only=True):
    """The result of `traceml profile --json`; operators of all profiled ranks, the longest first."""

    schema: Literal["traceml.profile/1"] = "traceml.profile/1"
    run: str
    file: str
    ranks: list[ProfiledRankRecord]
    missing: list[UnprofiledRank]
    operators: list[OperatorRecord]


class TraceDamage(msgspec.Struct):
    """A part of a trace that could not be read."""

    offset: int | None
    what: str
    lost_bytes: int | None


class AnalyzedFile(msgspec.Struct):
    """A trace that was read."""

    path: str
    events: int
    bytes: int
    damage: list[TraceDamage]


class TraceWork(msgspec.Struct, kw_only=True):
    """Time by kind of work in microseconds; `unoverlapped` is time without computing, `idle` time without any work."""

    duration_us: float
    compute_us: float
    io_us: float
    comm_us: float
    copy_us: float
    unoverlapped_io_us: float
    unoverlapped_comm_us: float
    unoverlapped_copy_us: float
    idle_us: float


class TraceIo(msgspec.Struct, kw_only=True):
    """Reads and writes of a trace."""

    read_bytes: int
    write_bytes: int
    busy_us: float
    bytes_per_s: float | None
    calls: list[dict[str, _Value]]


class TraceTimeline(msgspec.Struct, kw_only=True):
    """Time by kind of work in bins of equal width."""

    begin_us: float
    bin_us: float
    bins: list[dict[str, float]]


class TraceOverview(msgspec.Struct, kw_only=True):
    """The overview of traces, without `--by`."""

    overlap: TraceWork
    io: TraceIo
    kernels: list[dict[str, _Value]]
    operators: list[dict[str, _Value]]
    processes: list[dict[str, _Value]]
    ranks: list[dict[str, _Value]]
    timeline: TraceTimeline | None


class TraceAnalysis(msgspec.Struct, kw_only=True):
    """The result of `traceml analyze --json`.

    A group has the fields of `by`, `count`, `sum_us`, `mean_us`, `min_us`, `max_us`, `p50_us`, `p99_us`, `self_us`, and
    the measures that `--agg` named.
    """

    schema: Literal["traceml.analysis/1"]
    files: list[AnalyzedFile]
    events: int
    spans: int
    letters: dict[str, int]
    by: list[str]
    percentile_error: float
    groups: list[dict[str, _Value]]
    where: str = ""
    aggregated: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    report: TraceOverview | msgspec.UnsetType = msgspec.UNSET


DOCUMENTS: dict[str, tuple[Any, str]] = {
    "report": (Report, "traceml report --json, and report.json of a run"),
    "lines": (LinesDocument, "traceml report --lines --json"),
    "compare": (Comparison, "traceml compare A B --json"),
    "compares": (Comparisons, "traceml compare of more than two runs, with --json"),
    "analysis": (TraceAnalysis, "traceml analyze --json"),
    "whatif": (WhatIf, "traceml whatif --json"),
    "fleet": (FleetDocument, "traceml fleet --json"),
    "runs": (list[RunRecord], "traceml runs --json"),
    "stacks": (StacksDocument, "traceml stacks --json"),
    "profile": (ProfileDocument, "traceml profile --json"),
}
"""Name -> type of the document, and the command that prints it. All have version 1."""


def document_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a document; a newer version may add keys, so unknown ones are allowed."""
    document, printed_by = DOCUMENTS[name]
    made = msgspec.json.schema(document, schema_hook=lambda _: {"type": "string"})  # of a path
    for definition in made["$defs"].values():
        if "description" in definition:  # from Python 3.13 on docstrings have no indentation
            definition["description"] = cleandoc(definition["description"])

    return {
        "$schema": _DRAFT,
        "$id": f"{_PLACE}/{name}-1.json",
        "title": f"traceml.{name}/1",
        "description": printed_by,
        **made,
    }
