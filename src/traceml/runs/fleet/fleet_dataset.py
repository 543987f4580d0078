"""The fleet's dataset: Parquet files in folders by project and month, one file per run.

`project=NAME/month=2026-11/RUN-STARTED.parquet`, as DuckDB, Spark, Dask and polars read partitions. A file is written
under another name and then renamed, so readers see it whole, and writers on any host do not disturb each other.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from traceml.database.states import RunStatus
from traceml.errors import StoreError
from traceml.fail_open import writing
from traceml.run_folder import RELAY_NAME, REPORT_NAME, STORE_NAME
from traceml.runs.export.table_columns import parquet_library, parquet_schema
from traceml.runs.find import RunInfo, describe_run, run_folders
from traceml.runs.fleet.fleet_rows import COLUMNS, fleet_rows
from traceml.runs.json_document import read_keys
from traceml.runs.report.report import written_report
from traceml.runs.report.report_types import Report, RunSection, StepsSection

__all__ = ["DATASET_NAME", "FleetDataset", "FleetUpdate", "is_relayed", "partition_of"]

DATASET_NAME = "fleet"
"""Folder of the dataset in the folder of runs, where no other is set."""


class _PartOfReport(msgspec.Struct):
    """The part of a report that shows where its rows belong, and whether there are any."""

    run: RunSection
    steps: StepsSection = msgspec.field(default_factory=StepsSection)


@dataclass(slots=True)
class FleetUpdate:
    """Outcome of an update."""

    added: int = 0  # runs that were added or written again
    known: int = 0  # runs that were in the dataset already
    running: int = 0
    relayed: int = 0  # parts of runs, which their center adds
    without_steps: int = 0  # ended runs that have no step, and so no row
    damage: list[str] = field(default_factory=list)  # messages about runs that cannot be read


class FleetDataset:
    """The dataset in a folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"FleetDataset({str(self.folder)!r})"

    def files(self) -> list[Path]:
        """Return its files, in the order of their names."""
        return sorted(self.folder.glob("project=*/month=*/[!.]*.parquet"))

    def path_of(self, run: RunSection | RunInfo) -> Path:
        """Return the file of a run; ids that people choose may repeat, so the start is part of its name."""
        month = "unknown" if run.started is None else f"{datetime.fromtimestamp(run.started, UTC):%Y-%m}"
        folder = self.folder / f"project={quote(run.project, safe='')}" / f"month={month}"
        # Letters of other languages stay: quoted, each would take up to nine of the 255 bytes that a name may have.
        name = re.sub("[ -~]+", lambda text: quote(text[0], safe=""), run.id)
        return folder / f"{name}-{int(run.started or 0)}.parquet"

    def add(self, report: Report) -> Path | None:
        """Add a run, or replace it; return its file, None if it has no steps.

        Raises:
            UsageError: pyarrow is not installed.
            TraceMLError: the file cannot be written.
        """
        rows = fleet_rows(report)
        if not rows["rank"]:
            return None

        path = self.path_of(report.run)
        with writing(path, "Choose another folder: the setting fleet_dir"):
            _write(path, rows)

        return path

    def update(self, runs_dir: Path) -> FleetUpdate:
        """Add the ended runs of a folder that are missing, or whose report is newer.

        Raises:
            UsageError: pyarrow is not installed.
            TraceMLError: a file cannot be written.
        """
        done = FleetUpdate()
        for run_dir in sorted(run_folders(runs_dir)):
            try:
                self._update(run_dir, done)
            except StoreError as error:
                done.damage.append(str(error))

        return done

    def _update(self, run_dir: Path, done: FleetUpdate) -> None:
        if is_relayed(run_dir):
            done.relayed += 1
            return

        written = read_keys(run_dir / REPORT_NAME, _PartOfReport)
        run = describe_run(run_dir) if written is None else written.run
        if self._is_known(run, run_dir, REPORT_NAME if written is not None else STORE_NAME):
            done.known += 1
        elif run.state == RunStatus.RUNNING:
            done.running += 1
        elif (written is not None and not written.steps.count) or self.add(written_report(run_dir)) is None:
            done.without_steps += 1
        else:
            done.added += 1

    def _is_known(self, run: RunSection | RunInfo, run_dir: Path, name: str) -> bool:
        """Return whether the dataset has a run as a file of its folder shows it."""
        try:
            return self.path_of(run).stat().st_mtime_ns >= (run_dir / name).stat().st_mtime_ns
        except OSError:
            return False


def is_relayed(run_dir: Path) -> bool:
    """Whether a run is that of a host in the store of its host: the center has that of all hosts, which counts once."""
    return (run_dir / RELAY_NAME).exists()


def partition_of(path: Path) -> tuple[str, str]:
    """Return the project and the month that the folders of a file name."""
    parts = dict(part.split("=", 1) for part in path.parts[-3:-1] if "=" in part)
    return unquote(parts.get("project", "")), unquote(parts.get("month", ""))


def _write(path: Path, rows: Mapping[str, Sequence[Any]]) -> None:
    pa = parquet_library("the fleet's dataset")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")  # no other writer, on any host, has this name
    try:
        table = pa.table(dict(rows), schema=parquet_schema(pa, COLUMNS))
        pa.parquet.write_table(table, draft, compression="zstd")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
