"""Queries over runs: fields of a run by name, conditions such as `lr<0.1 tag:baseline`, and sorting."""

from __future__ import annotations

import operator
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Protocol, TypeVar

import msgspec

from traceml.errors import UsageError
from traceml.run_folder import REPORT_NAME
from traceml.runs.find import RunInfo
from traceml.runs.json_document import read_keys
from traceml.runs.report.report_types import MetricSection, SetupSection

__all__ = ["FIELDS", "RunFields", "RunRecord", "SearchedRun", "select_runs", "sort_runs"]

FIELDS: dict[str, Callable[[RunInfo], Any]] = {
    "id": lambda info: info.id,
    "name": lambda info: info.name,
    "project": lambda info: info.project,
    "user": lambda info: info.user or None,
    "state": lambda info: info.state,
    "verdict": lambda info: info.verdict,
    "severity": lambda info: info.severity,
    "ranks": lambda info: info.world_size,
    "samples/s": lambda info: info.samples_per_second,
    "step_ms": lambda info: info.step_ms,
    "steps": lambda info: info.steps,
    "took": lambda info: info.duration_s,
    "size": lambda info: info.size_bytes,
    "started": lambda info: info.started,
    "tags": lambda info: ",".join(info.tags),
    "note": lambda info: info.note or None,
    "archived": lambda info: info.archived,
    "git.commit": lambda info: info.commit,
    "git.branch": lambda info: info.branch,
    "git.dirty": lambda info: info.dirty,
}
"""Fields that every run has; any other name is a logged parameter or, after that, the last value of a metric.

Trainings often log parameters called `commit` and `branch`, so ours have a prefix.
"""

_NAMES_IN_JSON = {"world_size": "ranks", "samples_per_second": "samples/s", "duration_s": "took", "size_bytes": "size"}
"""Names of fields in `traceml runs --json`; a parameter of such a name, as `world_size` often is one, comes first."""

_TERM = re.compile(r"^([^<>=!~]*?)(<=|>=|!=|==|<|>|=|~)(.*)$", re.DOTALL)
_ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_COMPARES: dict[str, Callable[[Any, Any], bool]] = {"=": operator.eq, "!=": operator.ne, **_ORDERS}


class SearchedRun(Protocol):
    """A run whose values are found by name."""

    @property
    def tags(self) -> Sequence[str]:
        """Its tags."""

    @property
    def texts(self) -> Sequence[str]:
        """The texts in which a single word is looked for."""

    def unknown_name(self, name: str) -> str:
        """Return the text of an error for a name that no run has, with the names that there are."""

    def value(self, name: str) -> Any:
        """Return a value; None if the run has none of this name."""

    def has(self, name: str) -> bool:
        """Return whether the run has a value of this name."""


_R = TypeVar("_R", bound=SearchedRun)


@dataclass(frozen=True, slots=True)
class RunRecord(RunInfo):
    """A run in `traceml runs --json`; `values` has the columns that were asked for by name.

    Times are epoch seconds; see `RunInfo` for the others.
    """

    values: dict[str, bool | int | float | str | None] = field(default_factory=dict)


class _LoggedFigures(msgspec.Struct):
    """The parts of a report that hold what was logged."""

    setup: SetupSection = msgspec.field(default_factory=SetupSection)
    metrics: dict[str, MetricSection] = {}


class RunFields:
    """A run whose fields, parameters and metrics are found by name; its report is read when it is needed."""

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self._logged: _LoggedFigures | None = None

    def __repr__(self) -> str:
        return f"RunFields({self.info.id})"

    @property
    def tags(self) -> Sequence[str]:
        """Its tags."""
        return self.info.tags

    @property
    def texts(self) -> Sequence[str]:
        """Its id, name, project, state, verdict and tags."""
        info = self.info
        return info.id, info.name, info.project, info.state, info.verdict or "", *info.tags

    def unknown_name(self, name: str) -> str:
        """Return the text of an error for a name that no run has, with the fields."""
        return (
            f"no run has a field, parameter or metric {name!r}. Fields: {', '.join(FIELDS)}; others are what was logged"
        )

    def value(self, name: str) -> Any:
        """Return a field, a parameter, or a metric's last value; None if the run has none of this name."""
        if name in FIELDS:
            return FIELDS[name](self.info)

        logged = self._read()
        if name in logged.setup.params:
            return logged.setup.params[name]

        if name in logged.metrics:
            return logged.metrics[name].last

        return FIELDS[_NAMES_IN_JSON[name]](self.info) if name in _NAMES_IN_JSON else None

    def has(self, name: str) -> bool:
        """Return whether the run has a field, parameter or metric of this name."""
        known = name in FIELDS or name in _NAMES_IN_JSON
        return known or name in self._read().setup.params or name in self._read().metrics

    def logged_names(self) -> list[str]:
        """Return the names of the parameters and metrics of the run."""
        return [*self._read().setup.params, *self._read().metrics]

    def record(self, columns: Sequence[str] = ()) -> RunRecord:
        """Return the run for JSON, with the values of some columns."""
        facts = {each.name: getattr(self.info, each.name) for each in fields(self.info)}
        return RunRecord(
            **facts | {"path": self.info.path.resolve()}, values={name: self.value(name) for name in columns}
        )

    def _read(self) -> _LoggedFigures:
        if self._logged is None:
            # A run whose report is not written, or cannot be read, has no such values.
            self._logged = read_keys(self.info.path / REPORT_NAME, _LoggedFigures) or _LoggedFigures()

        return self._logged


def select_runs(runs: Sequence[_R], conditions: str) -> list[_R]:
    """Return the runs that meet all conditions.

    Args:
        conditions: terms with spaces, commas or AND between them: `NAME<VALUE` (also <= > >= = != ~ for "contains"; a
            value may be a date), `tag:TAG` or `tags=TAG`, or a word that the id, name, project, state, verdict or a
            tag contains; `!` before a term negates it.

    Raises:
        UsageError: a term cannot be understood, or names something that no run has.
    """
    try:
        terms = _terms_of(conditions)
    except ValueError as error:
        raise UsageError(f"conditions: {error}") from error

    if any(term.lower() == "or" for term in terms):
        raise UsageError("conditions: a run must meet all conditions; there is no OR")

    tests = [_test_of(term, runs) for term in terms if term.lower() != "and"]
    return [run for run in runs if all(test(run) for test in tests)]


def _terms_of(conditions: str) -> list[str]:
    """Return the terms; a comma or a space in quotes is part of one.

    Raises:
        ValueError: a quote has no end.
    """
    words = shlex.shlex(conditions, posix=True)
    words.whitespace += ","
    words.whitespace_split, words.commenters = True, ""
    return list(words)


def sort_runs(runs: Sequence[_R], name: str, *, reverse: bool = False) -> list[_R]:
    """Return runs by a field, the smallest first; those without it last.

    Raises:
        UsageError: no run has such a field.
    """
    _check(name, runs)
    known = [run for run in runs if run.value(name) is not None]
    return [
        *sorted(known, key=lambda run: _order_key(run.value(name)), reverse=reverse),
        *(run for run in runs if run.value(name) is None),
    ]


def _test_of(term: str, runs: Sequence[SearchedRun]) -> Callable[[SearchedRun], bool]:
    if not term.startswith("!"):
        return _test(term, runs)

    test = _test(term.removeprefix("!"), runs)
    return lambda run: not test(run)


def _test(term: str, runs: Sequence[SearchedRun]) -> Callable[[SearchedRun], bool]:
    if term.startswith("tag:"):
        tag = term.removeprefix("tag:")
        return lambda run: tag in run.tags

    found = _TERM.match(term)
    if found is None:
        word = term.lower()
        return lambda run: any(word in text.lower() for text in run.texts)

    name, sign, wanted = found.groups()
    if not name:
        raise UsageError(f"condition {term} has no name before {sign}, as in lr{sign}{wanted or 0.1}")

    if sign in _ORDERS and not wanted:
        raise UsageError(f"condition {term} has no value, as in {term}0.1")

    _check(name, runs)
    if sign in _ORDERS and _number(wanted) is None and _is_number_in_all(name, runs):
        raise UsageError(f"condition {term} compares numbers with {wanted!r}, which is no number and no date")

    compared = "=" if sign == "==" else sign
    if name == "tags" and wanted and compared in ("=", "!="):  # one of them; `tags=` is a run without any
        return lambda run: any(_holds(tag, "=", wanted) for tag in run.tags) == (compared == "=")

    return lambda run: _holds(run.value(name), compared, wanted)


def _check(name: str, runs: Sequence[SearchedRun]) -> None:
    if runs and not any(run.has(name) for run in runs):
        raise UsageError(runs[0].unknown_name(name))


def _is_number_in_all(name: str, runs: Sequence[SearchedRun]) -> bool:
    values = [value for run in runs if (value := run.value(name)) is not None]
    return bool(values) and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _holds(value: Any, sign: str, wanted: str) -> bool:
    if value is None:
        return sign == "!="

    if sign == "~":
        return wanted.lower() in str(value).lower()

    number = _number(wanted)
    is_numeric = _is_number(value) and number is not None
    compared = (value, number) if is_numeric else (str(value).lower(), wanted.lower())
    return _COMPARES[sign](*compared)


def _number(text: str) -> float | None:
    """Return a number, of a local date or time (`2026-11-24`, `2026-11-24T08:30`) its epoch seconds; else None."""
    with suppress(ValueError):
        return float(text)

    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()

    return None


def _order_key(value: Any) -> tuple[int, int | float, str]:
    """Return a key that orders numbers before texts."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0.0, str(value).lower())
