"""Search for the run that others are compared with: by id, tag or name, or the last healthy one of a project."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from traceml.database.states import RunStatus
from traceml.diagnosis.kinds import Kind, Severity
from traceml.errors import RunNotFoundError
from traceml.formatting import plural
from traceml.run_folder import STORE_NAME
from traceml.runs.find import RunInfo, describe_run, find_run, list_runs
from traceml.runs.report.report_types import read_report

__all__ = ["LAST_HEALTHY", "find_baseline", "find_compared"]

LAST_HEALTHY = "last-healthy"


def find_compared(run: str | None, runs_dir: Path, *, by_name: bool = True) -> Path:
    """Return a run's folder, or its report where that is all there is, as on a build server.

    Args:
        run: a run as `find_run` takes it, or a `report.json`.

    Raises:
        RunNotFoundError: there is no such run.
    """
    path = Path(run) if run is not None else None
    if path is None or path.suffix != ".json" or not path.is_file():
        return find_run(run, runs_dir, by_name=by_name)

    return path.parent.resolve() if (path.parent / STORE_NAME).is_file() else path.resolve()


def find_baseline(name: str, compared: Collection[Path], runs_dir: Path) -> Path:
    """Return the run to compare others with.

    Args:
        name: `last-healthy` (the newest earlier run of the project with as many ranks), an id or a path as
            `find_compared` takes it, a tag, or the name of runs; the newest run counts.
        compared: the runs that are compared with it; none of them is the baseline, unless an id or a path names it.

    Raises:
        RunNotFoundError: there is none.
    """
    if name == LAST_HEALTHY:
        return _last_healthy(compared, runs_dir)

    try:
        return find_compared(name, runs_dir, by_name=False)
    except RunNotFoundError as error:
        infos = _others(compared, runs_dir)
        named = [info for info in infos if name in info.tags] or [info for info in infos if info.name == name]
        if named:
            return named[0].path.resolve()

        raise RunNotFoundError(f"no baseline {name!r}: {error} No other run has this tag or name.") from error


def _last_healthy(compared: Collection[Path], runs_dir: Path) -> Path:
    facts = [describe_run(path) if path.is_dir() else read_report(path).run for path in compared]
    projects = {each.project for each in facts}
    if len(projects) != 1:
        raise RunNotFoundError(f"{LAST_HEALTHY}: the runs are of several projects: {', '.join(sorted(projects))}")

    sizes, before = {each.world_size for each in facts}, min((each.started or 0.0 for each in facts), default=0.0)
    earlier = [
        info
        for info in _others(compared, runs_dir)
        if info.project in projects and info.world_size in sizes and (info.started or 0.0) <= before
    ]
    healthy = next((info for info in earlier if _is_healthy(info)), None)
    if healthy is not None:
        return healthy.path.resolve()

    raise RunNotFoundError(
        f"{LAST_HEALTHY}: of {plural(len(earlier), 'earlier run')} of project {projects.pop()!r} with as many ranks in "
        f"{runs_dir}, none has finished without a warning. Name a baseline: --baseline RUN"
    )


def _is_healthy(info: RunInfo) -> bool:
    """Return whether a run has finished and nothing was wrong with it."""
    is_known = info.verdict != Kind.INSUFFICIENT_DATA
    return info.state == RunStatus.FINISHED and info.severity == Severity.INFO and is_known


def _others(compared: Collection[Path], runs_dir: Path) -> list[RunInfo]:
    ids = {path.name if path.is_dir() else read_report(path).run.id for path in compared}
    return [info for info in list_runs(runs_dir) if info.id not in ids]
