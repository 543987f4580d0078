"""Rows of the fleet's dataset: one per run, host, rank and phase."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from traceml.runs.export.table_columns import ExportColumn
from traceml.runs.report.report_types import Report

__all__ = ["COLUMNS", "WAITING", "fleet_rows", "script_of"]

WAITING = "comm"
"""The phase in which a rank waits for others; all others are its own work."""


COLUMNS = (
    ExportColumn("run", "string", "id of the run"),
    ExportColumn("name", "string", "its name"),
    ExportColumn("started_epoch_s", "float64", "its start in seconds since 1970"),
    ExportColumn("duration_s", "float64", "its duration in seconds"),
    ExportColumn("state", "string", "its end: finished, stopped, failed, hung, lost"),
    ExportColumn("verdict", "string", "kind of its verdict"),
    ExportColumn("script", "string", "file name of its script, or its module"),
    ExportColumn("model", "string", "class of the model; null where it is not known, as in the next five"),
    ExportColumn("parameters", "int64", "number of parameters"),
    ExportColumn("dtype", "string", "type of the first parameter"),
    ExportColumn("device", "string", "kind of device: cpu, cuda, ..."),
    ExportColumn("parallel", "string", "ddp, fsdp, ...; null for a model that is not wrapped"),
    ExportColumn("compiled", "bool", "whether torch.compile was used"),
    ExportColumn("batch_size", "int64", "batch size of the loader, null where it is not known"),
    ExportColumn("world_size", "int64", "ranks"),
    ExportColumn("steps", "int64", "steps of the run"),
    ExportColumn("step_ms", "float64", "mean step time over all ranks"),
    ExportColumn("traceml_version", "string", "version that wrote the report"),
    ExportColumn("host", "string", "host of the rank"),
    ExportColumn("rank", "int64", "the rank"),
    ExportColumn("phase", "string", "the phase; `comm` includes waiting for other ranks, all others are own work"),
    ExportColumn("mean_ms", "float64", "mean time of the phase per step on the rank"),
)
"""All columns. The project and the month are in the folders' names."""


def fleet_rows(report: Report) -> dict[str, list[Any]]:
    """Return the rows of a run as columns; none where it has no steps."""
    facts, hosts = _facts(report), {rank.rank: rank.host for rank in report.ranks}
    cells = [(phase.phase, each) for phase in report.phases for each in phase.by_rank]
    rows: dict[str, list[Any]] = {name: [value] * len(cells) for name, value in facts.items()}
    return rows | {
        "host": [hosts.get(each.rank, "") for _, each in cells],
        "rank": [each.rank for _, each in cells],
        "phase": [phase for phase, _ in cells],
        "mean_ms": [each.mean_ms for _, each in cells],
    }


def _facts(report: Report) -> dict[str, Any]:
    run, model = report.run, report.setup.model
    device = model.get("device")
    return {
        "run": run.id,
        "name": run.name,
        "started_epoch_s": run.started,
        "duration_s": run.duration_s,
        "state": run.state,
        "verdict": report.verdict.kind.value,
        "script": script_of(run.command),
        "model": model.get("model"),
        "parameters": model.get("parameters"),
        "dtype": model.get("dtype"),
        "device": None if device is None else str(device).partition(":")[0],  # `cuda:3` is the rank's number
        "parallel": model.get("parallel"),
        "compiled": model.get("compiled"),
        "batch_size": report.setup.batch_size,
        "world_size": run.world_size,
        "steps": report.steps.count,
        "step_ms": report.steps.mean_ms,
        "traceml_version": report.traceml_version,
    }


def script_of(command: str | Sequence[str]) -> str:
    """Return the script in a command line without its folder, or the module after `-m`; empty if there is none."""
    words = _words(command) if isinstance(command, str) else list(command)
    program = PurePath(words[0]).name if words else ""
    runs_modules = program.startswith(("python", "torchrun", "traceml", "accelerate"))
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m" and runs_modules:
            return word

        if word.endswith(".py"):
            return PurePath(word).name

    return program


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quote that was cut off
        return command.split()
