"""Questions about runs that an assistant can ask: each returns a bounded document, or an error that says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from traceml.cli.jobs.running_job import running_job
from traceml.cli.report import current_report
from traceml.cli.stacks import ask_ranks
from traceml.database.states import RunStatus
from traceml.diagnosis.kinds import Kind
from traceml.errors import RunNotFoundError, TraceMLError, UsageError
from traceml.runs.baseline import find_baseline
from traceml.runs.comparison.compare import compare_sides
from traceml.runs.comparison.compared_run import read_compared
from traceml.runs.find import find_run, list_runs
from traceml.runs.report.report_types import Report
from traceml.runs.run_query import RunFields, select_runs, sort_runs
from traceml.settings import load
from traceml.traces.query.measures import parse_measures
from traceml.traces.query.summary import summarize
from traceml.traces.reader.trace_files import discover

__all__ = ["MAX_CHARACTERS", "RunTools", "bounded"]

MAX_CHARACTERS = 30_000
"""Longest answer of a tool as JSON: about ten thousand tokens."""
_INDENT = 2  # of the text that the package `mcp` sends
_ITEMS = (100, 50, 25, 12, 6, 3, 1)
_LONGEST_TEXT = 2_000
_MAX_RUNS = 100
_NOT_ASKED = ("schema", "traceml_version", "hidden_metrics", "step_times")
_SECTIONS = tuple(name for name in Report.__struct_fields__ if name not in _NOT_ASKED)
_USUAL_SECTIONS = tuple(name for name in _SECTIONS if name != "source")
# Pages of the documentation: in the wheel, and in a checkout.
_PACKED = Path(__file__).parent / "pages"
_CHECKOUT = Path(__file__).parents[4] / "docs"
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


class RunTools:
    """Questions about the runs of one folder, and about traces below some folders.

    Nothing is written. Runs are named by id, not by path; traces must be below the runs folder or a folder that was
    given when the server was started, also after links are followed.
    """

    def __init__(self, runs_dir: Path, trace_dirs: Sequence[Path] = ()) -> None:
        self._runs_dir = runs_dir
        self._readable = [folder.resolve() for folder in (runs_dir, *trace_dirs)]

    def __repr__(self) -> str:
        return f"RunTools({self._runs_dir})"

    def tools(self) -> list[Callable[..., dict[str, Any]]]:
        """Return the functions that are offered as tools."""
        return [
            self.list_runs,
            self.report,
            self.findings,
            self.stacks,
            self.compare,
            self.analyze,
            self.explain_kind,
        ]

    def list_runs(self, where: str = "", sort: str = "", limit: int = 20) -> dict[str, Any]:
        """List training runs without archived ones, newest first: id, state, verdict, step time, tags.

        Args:
            where: conditions, such as `lr<0.1 tag:baseline state=finished`; names are columns, parameters or metrics.
            sort: a column, parameter or metric; the smallest first.
            limit: most runs to return, at most 100.
        """
        listed = [RunFields(info) for info in list_runs(self._runs_dir) if not info.archived]
        runs = select_runs(listed, where)
        runs = sort_runs(runs, sort) if sort else runs
        chosen = runs[: max(1, min(limit, _MAX_RUNS))]
        return bounded(
            {"total": len(runs), "runs": msgspec.to_builtins([run.record() for run in chosen], enc_hook=str)}
        )

    def report(self, run: str = "latest", sections: list[str] | None = None) -> dict[str, Any]:
        """Return the report of a run, running or ended: verdict, findings, time, steps, phases, ranks, memory, metrics.

        Args:
            run: id of the run, its last characters, or latest.
            sections: some of run, verdict, time, findings, steps, phases, ranks, lines, memory, system, metrics,
                trackers, telemetry, setup, source; all but `source` by default. `lines` has the lines of code that took
                the time, `source` uncommitted changes, packages and environment variables.
        """
        if unknown := sorted(set(sections or ()) - set(_SECTIONS)):
            raise UsageError(f"no such section: {', '.join(unknown)}. Sections: {', '.join(_SECTIONS)}")

        document = current_report(self._find(run)).to_dict()
        return bounded({name: document[name] for name in (sections or _USUAL_SECTIONS) if name in document})

    def findings(self, run: str = "latest") -> dict[str, Any]:
        """Return what limits a run: each finding with its summary, advice, cost, gain and evidence; the verdict first.

        Args:
            run: id of the run, its last characters, or latest.
        """
        report = current_report(self._find(run))
        found = [{"headline": each.headline, **msgspec.to_builtins(each)} for each in report.findings]
        return bounded({"run": report.run.id, "state": report.run.state, "findings": found})

    def stacks(self, run: str = "") -> dict[str, Any]:
        """Return what each rank of a running job is doing now: Python stack, step, phase, loader workers.

        Args:
            run: id of the run; by default the newest running job.
        """
        config = load(runs_dir=str(self._runs_dir))
        run_dir = running_job(self._find(run).name, config) if run else running_job(self._newest_running(), config)
        return bounded(msgspec.to_builtins(ask_ranks(run_dir, config)))

    def compare(self, run: str = "latest", baseline: str = "last-healthy") -> dict[str, Any]:
        """Return what got slower from a baseline to a run, by how much, and whether that is significant.

        Args:
            run: id of the run, its last characters, or latest.
            baseline: another run, a tag, a run name, or last-healthy: the newest earlier one without a warning.
        """
        other = self._find(run)
        self._refuse_path(baseline)
        first = self._inside(find_baseline(baseline, [other], self._runs_dir))
        if first == other:
            raise UsageError(f"the baseline and the run are the same, {other.name}: name another baseline")

        return bounded(compare_sides(read_compared(first), read_compared(other)).to_dict())

    def analyze(self, paths: list[str], by: str = "", where: str = "", agg: str = "", top: int = 20) -> dict[str, Any]:
        """Summarize trace files of dftracer, torch.profiler, Perfetto or traceml by groups of spans.

        Args:
            paths: files or folders below the runs folder, or below a folder given by `traceml mcp --traces`.
            by: fields to group by, such as `name,cat`; without it, by name, with an overview.
            where: conditions, such as `cat=POSIX,dur>100`.
            agg: more columns, such as `p95,std,sum:args.size`.
            top: number of groups.
        """
        if not paths:
            raise UsageError("name at least one trace file or folder")

        # Patterns and folders are resolved here, and each file is checked: a link may lead elsewhere.
        named = [self._readable_path(path) for path in paths]
        files = [self._readable_path(str(path)) for path in discover(named)]
        measures = parse_measures(agg.split(","), "agg") if agg else ()
        result = summarize(files, by=by or "name", where=where, measures=measures, report=not by, cached=False)
        return bounded({**result, "groups": result["groups"][: max(1, top)]})

    def explain_kind(self, kind: str) -> dict[str, Any]:
        """Explain a kind of finding: when it is raised, and what its evidence means.

        Args:
            kind: name of the kind, such as INPUT_BOUND.
        """
        name = kind.strip().upper().replace("-", "_")
        if name not in list(Kind):
            raise UsageError(f"no such kind: {kind!r}. Kinds: {', '.join(Kind)}")

        return bounded(
            {
                "kind": name,
                "raised": kind_text(name) or "",
                "shared_evidence": shared_evidence(),
                "all_kinds": [each.value for each in Kind],
            }
        )

    def _find(self, run: str) -> Path:
        self._refuse_path(run)
        return self._inside(find_run(run or None, self._runs_dir))

    def _refuse_path(self, run: str) -> None:
        if run and Path(run).name != run:
            raise UsageError(f"a run is named by its id or name, not by a path: {run!r}. list_runs has the ids")

    def _inside(self, path: Path) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(self._runs_dir.resolve()):
            raise RunNotFoundError(f"{path.name} is not in the runs folder {self._runs_dir}. list_runs has the ids")

        return resolved

    def _newest_running(self) -> str:
        running = [info.id for info in list_runs(self._runs_dir) if info.state == RunStatus.RUNNING]
        if not running:
            raise RunNotFoundError("no job is running in this runs folder; report and findings work on ended runs")

        return running[0]

    def _readable_path(self, path: str) -> Path:
        resolved = (self._runs_dir / path).resolve()
        if any(resolved.is_relative_to(folder) for folder in self._readable):
            return resolved

        raise UsageError(
            f"{path!r} is outside the folders that may be read: {', '.join(map(str, self._readable))}. "
            "The user can add its folder: traceml mcp --traces DIR"
        )


def bounded(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document whose JSON has at most `MAX_CHARACTERS`: long lists, maps and texts are cut.

    What was cut is in its key `cut`: the path, and how many of how many items are left.
    """
    for items in _ITEMS:
        cut: dict[str, str] = {}
        made: dict[str, Any] = _cut(document, "", items, cut)
        if cut:
            made["cut"] = dict(list(cut.items())[:20])

        if len(json.dumps(made, indent=_INDENT)) <= MAX_CHARACTERS:
            return made

    return {"cut": {"": f"the answer has more than {MAX_CHARACTERS} characters even without most items: ask for less"}}


def _cut(value: Any, path: str, items: int, cut: dict[str, str]) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        cut[path] = f"{_LONGEST_TEXT} of {len(value)} characters"
        return value[:_LONGEST_TEXT]

    if isinstance(value, list | tuple):
        if len(value) > items:
            cut[path] = f"{items} of {len(value)}"

        return [_cut(each, f"{path}[]", items, cut) for each in value[:items]]

    if not isinstance(value, dict):
        return value

    if path and len(value) > max(items, 20):
        cut[path] = f"{max(items, 20)} of {len(value)}"
        value = dict(list(value.items())[: max(items, 20)])

    return {key: _cut(each, f"{path}.{key}" if path else str(key), items, cut) for key, each in value.items()}


def page_text(name: str) -> str:
    """Return a page of the documentation.

    Args:
        name: its file name, such as `verdicts.md`.

    Raises:
        TraceMLError: the installation does not have it.
    """
    for folder in (_PACKED, _CHECKOUT):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")

    raise TraceMLError(f"the page {name} is missing in this installation: install traceml-torch again")


def kind_text(kind: str) -> str | None:
    """Return when a kind of finding is raised, and its details; None if the rules have no section of it.

    Args:
        kind: name of the kind, in capitals.
    """
    page = page_text("verdicts.md")
    section = re.search(rf"^### .*`{re.escape(kind)}`.*\n((?:(?!#).*\n)*)", page, re.MULTILINE)
    return None if section is None else _plain(section.group(1))


def shared_evidence() -> dict[str, str]:
    """Return keys of evidence that mean the same in all kinds, with their meaning."""
    table = page_text("verdicts.md").partition("| key | meaning |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.+) \| (.+) \|$", table, re.MULTILINE)
    return {keys.replace("`", ""): _plain(meaning) for keys, meaning in rows}


def _plain(markdown: str) -> str:
    """Return a text without links, each paragraph and each entry of a list in one line."""
    return _LINK.sub(r"\1", re.sub(r"(?<!\n)\n *(?![\n-])", " ", markdown.strip()))
