"""The report's facts about the code and the environment of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traceml.ids import DEFAULT_PROJECT
from traceml.runs.about import About, package_versions
from traceml.runs.report.report_types import Report, SourceSection

__all__ = ["about_report", "add_source"]


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
