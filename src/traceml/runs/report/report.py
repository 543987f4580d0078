"""Builds the report of a run (`traceml.report/1`) from its store, and writes it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from traceml.clock import SteadyClock
from traceml.database.flight.flight_owner import waiting_steps
from traceml.database.schema import PROCESS
from traceml.database.states import ENDED_BADLY, RunStatus
from traceml.database.store.reader import StoreReader
from traceml.database.store.store_file import last_written_s
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.wall_time import wall_time
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.errors import StoreError
from traceml.formatting import line_text, ms_text
from traceml.ids import DEFAULT_PROJECT
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.about import about_run
from traceml.runs.report import sections
from traceml.runs.report.comparison_facts import add_source, setup_section, step_times_section
from traceml.runs.report.report_types import SCHEMA, Report, RunSection, TelemetrySection, read_report
from traceml.runs.report.restarts import earlier_hangs_s, restarts
from traceml.runs.report.trackers import trackers
from traceml.runs.rows.run_summary_reader import MAX_STEP_ROWS, RunSummaryReader, read_run_summary
from traceml.trusted_files import replace_file
from traceml.version import __version__

__all__ = [
    "build_report", "full_report", "make_report", "report_window", "run_wall_time", "save_report", "update_trackers",
    "write_atomic", "written_report",
]  # fmt: skip


def build_report(run_dir: Path, max_step_rows: int = MAX_STEP_ROWS) -> Report:
    """Return the report of a run, running or ended.

    Args:
        max_step_rows: largest number of step rows, of all ranks together, that the verdict of a long run rests on.

    Raises:
        StoreError: the store is missing, damaged, or of another version.
    """
    run_dir = Path(run_dir)
    with StoreReader(run_dir / STORE_NAME) as reader:
        return full_report(read_run_summary(reader, max_step_rows), reader, run_dir)


def written_report(run_dir: Path) -> Report:
    """Return the report that was written at the end of a run, or one made from its store.

    Raises:
        StoreError: neither can be read.
    """
    try:
        return read_report(run_dir / REPORT_NAME)
    except (OSError, StoreError):
        return build_report(run_dir)


def full_report(summary: RunSummaryReader, reader: StoreReader, run_dir: Path) -> Report:
    """Return the report on all steps of a summary."""
    summary.facts_builder.time = run_wall_time(summary, reader, run_dir)
    window = summary.all_aligned()
    findings = summary.diagnose(window, sections.present_state(summary))
    if any((hung_s := _hung_s(summary, reader, findings)).values()):
        summary.facts_builder.time = run_wall_time(summary, reader, run_dir, hung_s)

    report = make_report(summary, reader, window if len(window) else _first_steps(summary), findings, run_dir)
    about = about_run(reader)
    report.setup, report.step_times = setup_section(summary, reader, about), step_times_section(window)
    add_source(report, about)
    return report


def run_wall_time(
    summary: RunSummaryReader, reader: StoreReader, run_dir: Path, hung_s: Mapping[int, float] | None = None
) -> RunTime | None:
    """Return the wall time of a run by part, until now where it runs; None if its start is not known.

    Args:
        hung_s: seconds without progress before an attempt was ended, by attempt.
    """
    state = sections.present_state(summary)
    started_s, _, duration_s = run_times(summary, state, run_dir)
    if started_s is None or duration_s is None:
        return None

    sums = summary.step_sums or reader.step_sums()
    known, is_running = summary.facts_builder.for_wall_time(summary.ranks), state == RunStatus.RUNNING
    ended_s = started_s + duration_s
    return wall_time(reader.streams(), sums, started_s, ended_s, known, is_running=is_running, hung_s=hung_s)


def _hung_s(summary: RunSummaryReader, reader: StoreReader, findings: Sequence[Finding]) -> dict[int, float]:
    """Return for how many seconds attempts had made no progress when they were ended, or until now."""
    last_s = sum(each.evidence["quiet_s"] for each in findings if each.kind is Kind.HANG)
    return {**earlier_hangs_s(reader), summary.attempt: last_s}


def report_window(summary: RunSummaryReader) -> AlignedSteps:
    """Return the steps that a report describes: those of the diagnosis, or the first ones of a very short run."""
    window = summary.kept.aligned()
    return window if len(window) else _first_steps(summary)


def _first_steps(summary: RunSummaryReader) -> AlignedSteps:
    return summary.kept.aligned(skip_first=0)


def save_report(run_dir: Path, report: Report) -> Path:
    """Write a report into the run's folder, atomically, and return its path.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(run_dir) / REPORT_NAME
    write_atomic(path, report.to_json() + "\n")
    return path


def update_trackers(run_dir: Path) -> bool:
    """Bring the section on trackers of a written report up to date; return whether it changed.

    Raises:
        StoreError: the store cannot be read.
        OSError: the folder cannot be written.
    """
    path = Path(run_dir) / REPORT_NAME
    try:
        report = read_report(path)
    except (FileNotFoundError, StoreError):
        return False

    with StoreReader(Path(run_dir) / STORE_NAME) as reader:
        now = trackers(Path(run_dir), reader)

    if report.trackers == now:
        return False

    report.trackers = now
    save_report(run_dir, report)
    return True


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or all of the new one.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, text.encode("utf-8", "replace"))


def make_report(
    summary: RunSummaryReader,
    reader: StoreReader,
    window: AlignedSteps,
    findings: Sequence[Finding],
    run_dir: Path,
    telemetry: TelemetrySection | None = None,
) -> Report:
    """Return the report on a summary.

    Args:
        window: the steps to describe.
        findings: the diagnosis, the verdict first.
        telemetry: that section, if it was made a moment ago.
    """
    steps, run, time = sections.steps(summary, window), _run(summary, reader, run_dir), sections.time(summary)
    if time is not None:
        ended_badly = run.state in ENDED_BADLY
        time.count_failures(len(run.restarts) + ended_badly, sum(_hung_s(summary, reader, findings).values()))

    rounded = [finding.rounded() for finding in with_operators(findings, reader)]
    return Report(
        schema=SCHEMA,
        traceml_version=__version__,
        run=run,
        verdict=rounded[0],
        time=time,
        findings=rounded,
        steps=steps,
        phases=sections.phases(summary, window),
        ranks=sections.ranks(summary, is_hung=any(finding.kind is Kind.HANG for finding in findings)),
        lines=sections.lines(summary),
        memory=sections.memory(summary),
        system=sections.system(summary),
        metrics=sections.metrics(summary.metrics),
        hidden_metrics=len(summary.metrics.hidden),
        trackers=trackers(run_dir, reader),
        telemetry=telemetry or sections.telemetry(summary, reader, steps.mean_ms),
    )


def _run(summary: RunSummaryReader, reader: StoreReader, run_dir: Path) -> RunSection:
    run = summary.run
    state = sections.present_state(summary)
    started, ended, duration_s = run_times(summary, state, run_dir)
    return RunSection(
        id=str(run.get("id", run_dir.name)),
        name=str(run.get("name", run_dir.name)),
        project=str(run.get("project", DEFAULT_PROJECT)),
        attempt=max((stream.attempt for stream in summary.streams.values()), default=int(run.get("attempt", 0))),
        started=started,
        ended=ended,
        duration_s=duration_s,
        state=state,
        world_size=int(run.get("world_size", max(len(summary.ranks), 1))),
        hosts=sorted({stream.host for stream in summary.ranks.values()}) or list(run.get("hosts", [])),
        command=run.get("command", ""),
        restarts=restarts(reader) if summary.attempt > 0 else [],
        steps_waiting=waiting_steps(run_dir) if state == RunStatus.LOST else 0,
    )


def with_operators(findings: Sequence[Finding], reader: StoreReader) -> list[Finding]:
    """Return the findings; the one that was profiled has the longest operators, and the file of the profile."""
    event = reader.last_event("profile")
    if event is None:
        return list(findings)

    measured = {"operators": [_text(each) for each in event.data["operators"]], "profile": event.data["file"]}
    return [
        msgspec.structs.replace(each, evidence={**each.evidence, **measured})
        if each.kind == event.data["kind"]
        else each
        for each in findings
    ]


def _text(operator: dict[str, Any]) -> str:
    """Return `aten::mm 2.32 ms (train.py:9 step)`: time per step, on the device if there is one."""
    time = ms_text(operator["device_ms"] or operator["self_cpu_ms"])
    place = f" ({line_text(operator['file'], operator['line'], operator['function'])})" if operator.get("file") else ""
    return f"{operator['name']} {time}{place}"


def run_times(summary: RunSummaryReader, state: str, run_dir: Path) -> tuple[float | None, float | None, float | None]:
    """Return (started, ended, duration): epoch seconds and seconds; a running run has not ended."""
    started, ended = summary.run.get("started"), summary.run.get("ended")
    if ended is None and state != RunStatus.RUNNING:  # the process that would have noted it is gone
        ended = _last_row_s(summary) or last_written_s(run_dir / STORE_NAME)

    if started is None:
        return None, ended, None

    clock = SteadyClock.from_facts(summary.run.get("clock"))
    now = time.time() if clock is None else clock.now_s()
    if ended is not None:
        ended = max(ended, started)  # the wall clock may have been set

    return started, ended, max((now if ended is None else ended) - started, 0.0)


def _last_row_s(summary: RunSummaryReader) -> float | None:
    """Return the date of the last step or sample of the ranks on the aggregator's host; None without any."""
    clock = SteadyClock.from_facts(summary.run.get("clock"))
    if clock is None:
        return None

    ends = summary.kept.end_ns
    stamps = []
    for rank, stream in summary.ranks.items():
        if stream.facts.get("boot_id") == clock.boot:
            sample = summary.samples.last(PROCESS.name, rank)
            stamps += [] if sample is None else [int(sample["t_ns"])]
            stamps += [int(ends[rank])] if rank < len(ends) else []

    latest = max(stamps, default=0)
    return clock.epoch_s(latest) if latest > clock.mono_ns else None
