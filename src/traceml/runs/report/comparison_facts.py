"""The report's facts for comparisons: model, parameters, code, environment, and times of single steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.info_kinds import InfoKind
from traceml.database.schema import INFO
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.facts.trainings.models_and_loaders import is_first_trained
from traceml.diagnosis.findings import significant
from traceml.diagnosis.steps.aligned_steps import AlignedSteps, spread_ranges
from traceml.ids import DEFAULT_PROJECT
from traceml.runs.about import About, package_versions
from traceml.runs.report.report_types import Report, SetupSection, SourceSection, StepTimes
from traceml.runs.rows.run_summary_reader import RunSummaryReader
from traceml.track.backends.safe_names import flattened

__all__ = ["about_report", "add_source", "job_times", "setup_section", "step_times_section"]

_MS = 1e6
_STEPS, _RANGE = 1024, 64  # 1,024 steps decide a change of a few percent, and take 8 kB
_MAX_PARAMS, _MAX_TEXT = 500, 200
_MODEL_FACTS = ("model", "parameters", "dtype", "device", "parallel", "compiled")


def setup_section(summary: RunSummaryReader, reader: StoreReader, about: About) -> SetupSection:
    """Return the facts that decide whether two runs can be compared.

    Args:
        about: the run's other facts, which have the parameters.
    """
    facts = summary.facts_builder.build()
    batch_size = None if facts.loader is None else facts.loader.batch_size
    return SetupSection(
        model=_model(reader),
        batch_size=batch_size if isinstance(batch_size, int) else None,  # a library's loader may have other words
        params={name: _value(value) for name, value in list(flattened(about.params, ".").items())[:_MAX_PARAMS]},
        core_wait_share=significant(facts.wait_share) if facts.wait_of_ready_time else None,
    )


def job_times(window: AlignedSteps) -> NDArray[Any]:
    """Return milliseconds of each step: the mean over ranks, as they wait for each other."""
    return window.total.mean(axis=0, dtype=np.float64) / _MS if window.total.size else np.empty(0)


def step_times_section(window: AlignedSteps) -> StepTimes:
    """Return times of single steps; of more than 1,024, ranges of 64 that are spread evenly."""
    times = job_times(window)
    chosen = spread_ranges(times, _STEPS, _RANGE)
    return StepTimes(ms=[float(f"{value:.6g}") for value in chosen.tolist()], of_steps=len(times))


def _model(reader: StoreReader) -> dict[str, Any]:
    """Return the first trained model of any rank."""
    model: Mapping[str, Any] | None = None
    for _, row in reader.log_rows(INFO.name):
        if row.get("kind") == InfoKind.MODEL and is_first_trained(model, row):
            model = row

    return {} if model is None else {name: model.get(name) for name in _MODEL_FACTS}


def _value(value: Any) -> bool | int | float | str | None:
    is_number = (isinstance(value, int) and abs(value) < 2**53) or (isinstance(value, float) and math.isfinite(value))
    return value if value is None or is_number else str(value)[:_MAX_TEXT]


def add_source(report: Report, about: About) -> None:
    """Add what is known to a report; a value of another type is ignored."""
    git, run = about.git, report.run
    dirty, variables = git.get("dirty"), about.environment.get("variables")
    run.commit, run.branch = _text(git, "commit"), _text(git, "branch")
    run.dirty = dirty if isinstance(dirty, bool) else None
    run.tags = about.tag_texts
    if run.project == DEFAULT_PROJECT and about.project:
        run.project = about.project

    report.source = SourceSection(
        remote=_text(git, "remote"),
        diff=_text(git, "diff") or "",
        diff_truncated=bool(git.get("diff_truncated")),
        packages=package_versions(about.environment),
        variables={str(name): str(value) for name, value in variables.items()}
        if isinstance(variables, Mapping)
        else {},
        not_read=about.not_read,
    )


def about_report(report: Report) -> About:
    """Return the facts of a run of which only the report is left."""
    run, source = report.run, report.source
    git = {"commit": run.commit, "branch": run.branch, "dirty": run.dirty, "remote": source.remote, "diff": source.diff,
           "diff_truncated": source.diff_truncated}  # fmt: skip
    packages = [f"{name}=={version}" for name, version in source.packages.items()]
    environment = {"packages": packages, "variables": source.variables} if packages or source.variables else {}
    return About(model=report.setup.model, params=report.setup.params, git=git, environment=environment)


def _text(facts: Mapping[str, Any], name: str) -> str | None:
    value = facts.get(name)
    return value if isinstance(value, str) else None
