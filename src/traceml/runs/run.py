"""Run as an object: `load_run(path)`. `traceml.load_run` adds charts for notebooks to it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from traceml.coerce import path_text
from traceml.database.schema import METRICS, NAMES, STEPS, other_ns, unpack_bits
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.database.store.records import names_of
from traceml.diagnosis.findings import Finding
from traceml.errors import StoreError
from traceml.formatting import capitalized, ms_text, percent_text, phase_label, plural, sample_text, summed_text
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.find import RunInfo, find_run, list_runs
from traceml.runs.report.report import build_report
from traceml.runs.report.report_types import Report, read_report

__all__ = ["RecordArray", "Run", "finding_lines", "load_run", "runs"]


class RecordArray(np.ndarray):
    """Rows of a table: a numpy structured array that converts to data frames."""

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return import_module("pandas").DataFrame(self._columns())

    def to_polars(self) -> Any:
        """Return a polars DataFrame.

        Raises:
            ImportError: polars is not installed.
        """
        return import_module("polars").DataFrame(self._columns())

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {name: np.ascontiguousarray(np.asarray(self[name])) for name in self.dtype.names or ()}


class Run:
    """Run on disk, ended or still running; made by `load_run`.

    The report is read on first use; `refresh` reads that of a running run again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._report: Report | None = None

    def __repr__(self) -> str:
        return f"load_run({str(self.path)!r})"

    @property
    def id(self) -> str:
        """Id of the run: the name of its folder."""
        return self.path.name

    @property
    def report(self) -> dict[str, Any]:
        """The report (`traceml.report/1`) as plain data, made from the store; if that is damaged, as it was written.

        Raises:
            StoreError: neither can be read.
        """
        return self._built().to_dict()

    def _built(self) -> Report:
        if self._report is None:
            self._report = self._read()

        return self._report

    def _read(self) -> Report:
        try:
            return build_report(self.path)
        except StoreError:
            with suppress(OSError, StoreError):
                return read_report(self.path / REPORT_NAME)

            raise

    @property
    def state(self) -> str:
        """State of the run: running, finished, stopped, failed, hung or lost."""
        return self._built().run.state

    @property
    def verdict(self) -> Finding:
        """Most important finding: the bottleneck of the run."""
        return self.findings[0]

    @property
    def findings(self) -> list[Finding]:
        """All findings, the verdict first."""
        return list(self._built().findings)

    def summary(self) -> dict[str, float]:
        """Return the run's numbers as one flat map, with the names that trackers get: `traceml/step_ms`, ….

        Numbers that are not known are missing.

        Raises:
            StoreError: the store cannot be read.
        """
        return _numbers(self._built())

    def refresh(self) -> None:
        """Read the run again on the next use."""
        self._report = None

    def steps(self) -> RecordArray:
        """Return the steps of the last attempt, one row per rank and step, durations in nanoseconds.

        Columns: rank, those of the table `steps` (step, t_end_ns on the monotonic clock, total_ns, the phases,
        backward_own_ns, -1 where not measured, elements, samples), other_ns, micro_batches, flags (`StepFlag`),
        sequence (collectives issued so far).
        """
        rows = self.table(STEPS.name)
        stored = [name for name in rows.dtype.names or () if name != "bits"]
        made = ("other_ns", "micro_batches", "flags", "sequence")
        steps = np.empty(len(rows), [(name, "<i8") for name in (*stored, *made)])
        for name in stored:
            steps[name] = rows[name]

        steps["other_ns"] = other_ns(rows)
        steps["micro_batches"], steps["flags"], steps["sequence"] = unpack_bits(rows["bits"])
        return steps.view(RecordArray)

    def table(self, name: str, attempt: int | None = None) -> RecordArray:
        """Return the rows of a table with the rank as first column, sorted by rank.

        Args:
            name: a packed table of `traceml.database.schema`, such as `steps`, `process` or `host`.
            attempt: attempt of the job; by default the last one.

        Raises:
            TableNotFoundError: there is no such table; a KeyError.
            StoreError: the store cannot be read.
        """
        with StoreReader(self.path / STORE_NAME) as reader:
            streams = reader.streams()
            wanted = max((stream.attempt for stream in streams), default=0) if attempt is None else attempt
            ranks = {stream.id: stream.rank for stream in streams if stream.attempt == wanted}
            rows = reader.rows(name, ranks)

        return _by_rank(rows, ranks)

    def metrics(self) -> RecordArray:
        """Return the numbers that the training and its frameworks have logged, of all attempts and ranks.

        Columns: name, rank, attempt, step, value, time (epoch seconds of the call). Those of a rank are in the order of
        the calls.

        Raises:
            StoreError: the store cannot be read.
        """
        with StoreReader(self.path / STORE_NAME) as reader:
            rows = reader.rows(METRICS.name)
            rows_of_names = reader.log_rows(NAMES.name)
            names = {(stream, number): name for stream, row in rows_of_names for number, name in names_of([row])}
            streams = {stream.id: stream for stream in reader.streams()}  # last: while it runs, ranks may join

        return _logged(rows, streams, names)

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return a log's maps (`info`, `names`) with their rank.

        Raises:
            StoreError: there is no such log, or the store cannot be read.
        """
        with StoreReader(self.path / STORE_NAME) as reader:
            rows = [*reader.log_rows(name)]
            ranks = {stream.id: stream.rank for stream in reader.streams()}  # last: while it runs, ranks may join
            return [{"rank": ranks[stream], **row} for stream, row in rows]

    def show(self, file: TextIO | None = None) -> None:
        """Write verdict, steps and phases as a few lines of text.

        Args:
            file: by default standard output.
        """
        (file or sys.stdout).write("\n".join(_lines(self._built())) + "\n")


def load_run(path: str | os.PathLike[str] | None = None) -> Run:
    """Return a run, ended or still running.

    Args:
        path: its folder, id or name, or None for the latest; ids and names are those in `runs_dir` of the settings.

    Raises:
        RunNotFoundError: there is no such run.
    """
    from traceml.settings import load

    return Run(find_run(path, Path(load().runs_dir)))


def runs(runs_dir: str | os.PathLike[str] | None = None) -> list[RunInfo]:
    """Return the runs in a folder, the newest first.

    Examples:
        >>> [run.id for run in traceml.runs() if run.state == "finished"]

    Args:
        runs_dir: the folder; by default the `runs_dir` of the settings.

    Raises:
        ArgumentTypeError: it is no text or path.
    """
    from traceml.settings import load

    return list_runs(Path(load().runs_dir if runs_dir is None else path_text(runs_dir, "runs_dir")))


def _numbers(report: Report) -> dict[str, float]:
    steps, verdict, time = report.steps, report.verdict, report.time
    numbers: dict[str, float | None] = {
        "traceml/steps": steps.count,
        "traceml/step_ms": steps.mean_ms,
        "traceml/step_p95_ms": steps.p95_ms,
        "traceml/steps_per_s": steps.per_second,
        "traceml/samples_per_s": steps.samples_per_second,
        "traceml/cost_share": verdict.cost_share,
        "traceml/speedup_if_fixed": verdict.speedup_if_fixed,
        **{f"traceml/share/{phase.phase}": phase.share for phase in report.phases},
        **{f"traceml/time/{part.part}": part.share for part in (time.parts if time is not None else ())},
    }
    return {name: value for name, value in numbers.items() if value is not None}


def finding_lines(finding: Finding) -> list[str]:
    """Return a finding as lines of text: kind, summary, advice."""
    lines = [f"{finding.kind} ({finding.severity})", finding.summary]
    return [*lines, f"Next: {finding.next}"] if finding.next else lines


def _by_rank(rows: NDArray[np.void], ranks: dict[int, int]) -> RecordArray:
    columns = [("rank", "<i8"), *(field for field in rows.dtype.descr if field[0] != "stream")]
    table = np.empty(len(rows), columns)
    ids, back = np.unique(rows["stream"], return_inverse=True)
    table["rank"] = np.array([ranks[stream] for stream in ids.tolist()], np.int64)[back] if len(rows) else 0
    for name in (field[0] for field in columns[1:]):
        table[name] = rows[name]

    return table[np.argsort(table["rank"], kind="stable")].view(RecordArray)


def _logged(rows: NDArray[np.void], streams: dict[int, StreamRecord], names: dict[tuple[int, int], str]) -> RecordArray:
    pairs = zip(rows["stream"].tolist(), rows["name_id"].tolist(), strict=True)
    named = [names.get(pair, f"(name {pair[1]})") for pair in pairs]
    # Objects: an array of texts gives each row the bytes of the longest name, of any length.
    columns = [("name", "O"), ("rank", "<i8"), ("attempt", "<i8"), ("step", "<i8"), ("value", "<f8")]
    table = np.empty(len(rows), [*columns, ("time", "<f8")])
    table["name"], table["time"] = named, rows["t_ns"] / 1e9
    table["rank"] = [streams[stream].rank for stream in rows["stream"].tolist()]
    table["attempt"] = [streams[stream].attempt for stream in rows["stream"].tolist()]
    table["step"], table["value"] = rows["step"], rows["value"]
    return table[np.argsort(table["rank"], kind="stable")].view(RecordArray)


def _lines(report: Report) -> list[str]:
    run, steps = report.run, report.steps
    lines = [f"{run.id}: {run.state}, {plural(run.world_size, 'rank')}"]
    lines += finding_lines(report.verdict)
    if steps.mean_ms is not None:
        lines.append(f"{plural(steps.count, 'step')}, mean {ms_text(steps.mean_ms)}, p99 {ms_text(steps.p99_ms)}")

    if steps.summed_ranks:
        lines.append(capitalized(summed_text(steps.summed_ranks)))

    if steps.cut:
        lines.append(capitalized(sample_text(steps.diagnosed, steps.count)))

    parts = [
        f"{phase_label(phase.phase)} {percent_text(phase.share)}" for phase in report.phases if phase.share >= 0.005
    ]
    return [*lines, ", ".join(parts)] if parts else lines
