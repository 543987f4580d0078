"""Search for runs: by id or path, or all in a folder."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from traceml.coerce import path_text
from traceml.diagnosis.findings import Finding
from traceml.errors import RunNotFoundError, StoreError, StoreVersionError
from traceml.ids import DEFAULT_PROJECT
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.json_document import read_keys
from traceml.runs.report.report_types import ReportSummary, RunOrigin, StepsSection, rate_of, read_report
from traceml.runs.run_labels import read_labels
from traceml.runs.run_state import state_of

if TYPE_CHECKING:
    from traceml.database.store.reader import RunEvent

__all__ = ["RunInfo", "describe_run", "find_run", "list_runs", "run_folders", "why_unreadable"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Facts of a run for lists.

    Examples:
        >>> for run in traceml.runs():
        ...     print(run.id, run.state, run.verdict, run.step_ms)

    Attributes:
        path: its folder.
        id: name of the folder.
        name: name that people gave it later, else that of the start.
        state: running, finished, stopped, failed, hung, lost; `damaged` if its store cannot be read, `newer` or `older`
            if another version of traceml is needed to read it.
        started: epoch seconds.
        duration_s: None while it runs.
        verdict: kind of the verdict in its report, or of the live verdict; None before there is one.
        severity: of that verdict: info, warning or critical.
        size_bytes: size on disk.
        samples_per_second: of the whole job, counting only time in steps, as on the card; None before the report.
        step_ms: mean step time; None before the report.
        steps: number of steps; 0 before the report.
        project: of the run.
        note, archived: labels that people gave it.
        tags: those that people gave it, then those that its script logged.
        user: owner of the folder; empty if the host does not know its name.
        commit, branch: of the script's git repository; None outside one, and before the report.
        dirty: whether it had uncommitted changes; None if git was not asked.
        renamed: whether people gave it its name.
    """

    path: Path
    id: str
    name: str
    state: str
    started: float | None
    duration_s: float | None
    world_size: int
    verdict: str | None
    severity: str | None
    size_bytes: int
    samples_per_second: float | None
    step_ms: float | None
    steps: int
    project: str
    tags: list[str]
    note: str
    archived: bool
    user: str
    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    renamed: bool = False

    def __fspath__(self) -> str:
        """Return its folder, so that it can be given where a run's folder is wanted."""
        return str(self.path)


@dataclass(frozen=True, slots=True)
class _StoredFacts:
    """Facts in the store of a run, about the run and about its last aggregator."""

    run: dict[str, Any]
    aggregator: dict[str, Any]
    verdict: Finding | None
    unreadable: str = ""
    written_s: float | None = None


def find_run(run: str | os.PathLike[str] | None, runs_dir: Path, *, by_name: bool = True) -> Path:
    """Return the folder of a run.

    Args:
        run: a folder (or its store or report), an id (or the beginning or end of one), the name that only this run
            has, or None for the latest.
        runs_dir: folder of all runs.
        by_name: take names too.

    Raises:
        ArgumentTypeError: `run` is no text or path.
        RunNotFoundError: there is none, or there are several; the message lists those that exist.
    """
    runs_dir, text = Path(runs_dir), "latest" if run is None else path_text(run, "a run")
    if text == "latest":
        return _latest(runs_dir)

    for path in (Path(text), runs_dir / text):
        folder = path.parent if path.name in (STORE_NAME, REPORT_NAME) else path  # one of its files names it, too
        if _is_run(folder):
            return folder.resolve()

    names = [path.name for path in run_folders(runs_dir)]
    # People type the four letters at the end.
    matching = [name for name in names if name.startswith(text) or name.endswith(text)] if text else []
    named = {info.id: info.name for info in list_runs(runs_dir)} if text and by_name and not matching else {}
    matching = matching or [run_id for run_id, name in named.items() if name == text]

    if len(matching) == 1:
        return (runs_dir / matching[0]).resolve()

    if matching:
        raise RunNotFoundError(
            f"{text!r} matches {len(matching)} runs in {runs_dir}: {_some(matching)}. Give the id, or more of it."
        )

    if text and (runs := _runs_in(Path(text))):
        raise RunNotFoundError(f"{text} is no run but a folder of them: name one, such as {max(runs)}")

    close = get_close_matches(text, named.values(), n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    what = _what_exists(runs_dir, names)
    raise RunNotFoundError(f"no run {text!r}: it is not the folder of a run, and {what}.{meant}")


def list_runs(runs_dir: Path) -> list[RunInfo]:
    """Return all runs in a folder, the newest first."""
    infos = [describe_run(path) for path in run_folders(Path(runs_dir))]
    return sorted(infos, key=lambda info: (info.started or 0.0, info.id), reverse=True)


def describe_run(path: Path) -> RunInfo:
    """Return the facts of a run; a run that cannot be read is `damaged`, `newer` or `older`."""
    summary = read_keys(path / REPORT_NAME, ReportSummary)
    stored = _stored(path, with_verdict=summary is None)
    run = stored.run
    verdict, steps = (stored.verdict, StepsSection()) if summary is None else (summary.verdict, summary.steps)
    source = RunOrigin() if summary is None else summary.run
    started, ended = run.get("started"), run.get("ended")
    labels = read_labels(path)
    return RunInfo(
        path=path,
        id=path.name,
        name=labels.name or str(run.get("name", path.name)),
        state=stored.unreadable or state_of(run, stored.aggregator, stored.written_s),
        started=started,
        duration_s=ended - started if started is not None and ended is not None else None,
        world_size=int(run.get("world_size", 1)),
        verdict=verdict.kind.value if verdict is not None else None,
        severity=verdict.severity.value if verdict is not None else None,
        size_bytes=_size(path),
        samples_per_second=rate_of(steps.samples_per_step, steps.speed(running=False)),
        step_ms=steps.mean_ms,
        steps=steps.count,
        project=source.project or str(run.get("project", DEFAULT_PROJECT)),
        tags=list(dict.fromkeys([*labels.tags, *source.tags])),
        note=labels.note,
        archived=labels.archived,
        user=_owner(path),
        commit=source.commit,
        branch=source.branch,
        dirty=source.dirty,
        renamed=bool(labels.name),
    )


def why_unreadable(path: Path) -> str:
    """Return why the store of a run that lists call `damaged`, `newer` or `older` cannot be read."""
    try:
        _read_store(path, with_verdict=True)
    except StoreError as error:
        return str(error)

    return "it can be read now"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):  # KeyError: a container that does not know the host's users
        return ""


def _latest(runs_dir: Path) -> Path:
    latest = runs_dir / "latest"
    # In a folder of several users the link that another one has made cannot be replaced, and stays behind.
    if _is_run(latest) and latest.lstat().st_uid == os.geteuid():
        return latest.resolve()

    if runs := list_runs(runs_dir):
        return runs[0].path.resolve()

    raise RunNotFoundError(f"no run yet: {_what_exists(runs_dir, [])}. Make one with `traceml run SCRIPT`.")


def _what_exists(runs_dir: Path, names: list[str]) -> str:
    if not runs_dir.is_dir():
        return f"there is no folder {runs_dir} (name that of your runs with --runs-dir or TRACEML_RUNS_DIR)"

    return f"{runs_dir} contains {_some(names)}" if names else f"{runs_dir} contains no runs"


def _some(names: list[str]) -> str:
    newest = sorted(names, reverse=True)
    more = f" and {len(newest) - _SHOWN} more" if len(newest) > _SHOWN else ""
    return ", ".join(newest[:_SHOWN]) + more


def run_folders(runs_dir: Path) -> list[Path]:
    """Return the folders of all runs in a folder, in no particular order.

    Raises:
        RunNotFoundError: there is something else than a folder.
    """
    if not runs_dir.is_dir():
        if runs_dir.exists():
            raise RunNotFoundError(f"{runs_dir} is no folder of runs: name one with --runs-dir or TRACEML_RUNS_DIR.")

        return []

    return [path for path in runs_dir.iterdir() if not path.is_symlink() and _is_run(path)]


def _runs_in(path: Path) -> list[Path]:
    """Return the runs in what may be a folder of runs."""
    try:
        return run_folders(path) if path.is_dir() else []
    except OSError:  # a name that is too long, or a folder that may not be read
        return []


def _is_run(path: Path) -> bool:
    try:
        return (path / STORE_NAME).is_file() or (path / REPORT_NAME).is_file()
    except OSError:  # a name that is too long, or a folder that may not be searched
        return False


def _stored(path: Path, *, with_verdict: bool) -> _StoredFacts:
    if not (path / STORE_NAME).exists():
        return _reported(path)

    try:
        meta, event = _read_store(path, with_verdict=with_verdict)
    except StoreVersionError as error:
        return replace(_reported(path), unreadable="newer" if error.is_newer else "older")
    except StoreError:
        return replace(_reported(path), unreadable="damaged")

    findings = event.data.get("findings") if event is not None else None
    try:
        verdict = Finding.from_dict(findings[0]) if isinstance(findings, list) and findings else None
    except msgspec.ValidationError:  # another version's verdict: the run is listed without it
        verdict = None

    run, aggregator = meta.get("run", {}), meta.get("aggregator", {})
    is_whole = _has_valid_types(run) and isinstance(aggregator, dict)
    if not is_whole:
        return replace(_reported(path), verdict=verdict, unreadable="damaged")

    from traceml.database.store.store_file import last_written_s  # loaded with the reader

    return _StoredFacts(run, aggregator, verdict, written_s=last_written_s(path / STORE_NAME))


def _has_valid_types(run: Any) -> bool:
    """Return whether a run's facts have the right types; values of a damaged store may have any."""
    if not isinstance(run, dict):
        return False

    times = (run.get("started"), run.get("ended"))
    is_timed = all(time is None or type(time) in (int, float) for time in times)
    return is_timed and type(run.get("world_size", 1)) is int


def _read_store(path: Path, *, with_verdict: bool) -> tuple[dict[str, Any], RunEvent | None]:
    from traceml.database.store.reader import StoreReader  # imports numpy, which a run by its id does not need

    with StoreReader(path / STORE_NAME) as reader:
        return reader.meta(), reader.last_event("verdict") if with_verdict else None


def _reported(path: Path) -> _StoredFacts:
    """Return the facts of a run of which only the report was kept, as on a build server."""
    try:
        run = read_report(path / REPORT_NAME).run
    except (OSError, StoreError):
        return _StoredFacts({}, {}, None, "damaged")

    return _StoredFacts(msgspec.to_builtins(run), {}, None)


def _size(path: str | os.PathLike[str]) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(path) as entries:  # it may be removed meanwhile
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += _size(entry)
                elif entry.is_file():
                    total += entry.stat().st_size

    return total
