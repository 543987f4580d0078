"""The part of the runs that a browser looks at: conditions, order, groups, columns, page; kept in its address."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from traceml.errors import UsageError
from traceml.formatting import name_order, plural
from traceml.renderers.run_cells import run_cell
from traceml.runs.run_query import FIELDS, RunFields, select_runs, sort_runs

__all__ = ["COLUMNS", "PAGE_RUNS", "ListPart", "ListQuery", "field_names"]

COLUMNS = ("state", "verdict", "ranks", "step_ms", "samples/s", "started", "took", "size")
"""The columns that are shown at first, in addition to the name."""
PAGE_RUNS = 50
_MAX_COLUMNS = 24
_ALWAYS = ("id", "name", "tags", "note", "archived")  # next to the name, or by a switch


@dataclass(frozen=True, slots=True)
class ListPart:
    """The runs of one page of the list."""

    runs: tuple[tuple[str, RunFields], ...]  # each with the heading of its group, where the list is grouped
    found: int  # number of runs that meet the conditions, pages: number of pages they fill
    pages: int
    problem: str = ""  # why the conditions, the order or the group were not understood; the list is without those then


@dataclass(frozen=True, slots=True)
class ListQuery:
    """Conditions, order, groups, columns and page of one browser.

    Attributes:
        where: conditions as in `traceml runs --where`.
        sort, reverse: the field to sort by; the newest first without one.
        group: the field whose equal values are together; empty for none.
        page: number of the page, from 1.
    """

    where: str = ""
    sort: str = ""
    reverse: bool = False
    group: str = ""
    columns: tuple[str, ...] = COLUMNS
    page: int = 1
    archived: bool = False

    @classmethod
    def of_address(cls, values: Mapping[str, str]) -> ListQuery:
        """Return the query in the address of a page; what is missing or wrong there has its default."""
        columns = tuple(name for name in values.get("columns", "").split(",") if name)[:_MAX_COLUMNS]
        page = values.get("page", "")
        return cls(
            where=values.get("where", ""),
            sort=values.get("sort", "").removeprefix("-"),
            reverse=values.get("sort", "").startswith("-"),
            group=values.get("group", ""),
            columns=columns or COLUMNS,
            page=int(page) if page.isdecimal() and 0 < int(page) < 10**6 else 1,
            archived=values.get("archived") == "1",
        )

    @property
    def address(self) -> str:
        """The address of the list with this query."""
        values = {
            "where": self.where,
            "sort": f"{'-' if self.reverse else ''}{self.sort}" if self.sort else "",
            "group": self.group,
            "columns": ",".join(self.columns) if self.columns != COLUMNS else "",
            "page": str(self.page) if self.page > 1 else "",
            "archived": "1" if self.archived else "",
        }
        query = urlencode({name: value for name, value in values.items() if value})
        return f"/?{query}" if query else "/"

    @property
    def is_light(self) -> bool:
        """Whether no report has to be read: the names are fields, and there are no conditions."""
        return not self.where and all(name in FIELDS for name in (*self.columns, self.sort or "id", self.group or "id"))

    def sorted_by(self, name: str) -> ListQuery:
        """Return the query after a click on a heading: downwards, upwards, then the newest first."""
        if self.sort != name:
            return replace(self, sort=name, reverse=False, page=1)

        return replace(self, reverse=True, page=1) if not self.reverse else replace(self, sort="", reverse=False)

    def part(self, runs: Sequence[RunFields]) -> ListPart:
        """Return the runs of the page, of those that are listed newest first."""
        listed = [run for run in runs if self.archived or not run.info.archived]
        chosen, problems = listed, []
        for change in (self._selected, self._sorted, self._grouped):
            try:
                chosen = change(chosen)
            except UsageError as error:
                problems.append(str(error))

        pages = max(1, -(-len(chosen) // PAGE_RUNS))
        first = (min(self.page, pages) - 1) * PAGE_RUNS
        shown = chosen[first : first + PAGE_RUNS]
        headings = self._headings(chosen)
        rows = tuple((headings.get(self._key(run), ""), run) for run in shown)
        return ListPart(rows, len(chosen), pages, "; ".join(problems))

    def _selected(self, runs: list[RunFields]) -> list[RunFields]:
        return select_runs(runs, self.where)

    def _sorted(self, runs: list[RunFields]) -> list[RunFields]:
        return sort_runs(runs, self.sort, reverse=self.reverse) if self.sort and runs else runs

    def _grouped(self, runs: list[RunFields]) -> list[RunFields]:
        return sort_runs(runs, self.group) if self.group and runs else runs

    def _key(self, run: RunFields) -> str:
        return run_cell(run, self.group) if self.group else ""

    def _headings(self, runs: Sequence[RunFields]) -> dict[str, str]:
        """Return the heading of each group, with the number of its runs on all pages."""
        if not self.group:
            return {}

        sizes = Counter(self._key(run) for run in runs)
        return {
            key: f"{self.group}: {'none' if key == '-' else key} ({plural(size, 'run')})" for key, size in sizes.items()
        }


def field_names(runs: Iterable[RunFields]) -> list[str]:
    """Return every name that can be a column: fields, then parameters and metrics of the runs."""
    logged = sorted({name for run in runs for name in run.logged_names()}, key=name_order)
    fields = [name for name in FIELDS if name not in _ALWAYS]
    return [*fields, *(name for name in logged if name not in FIELDS)]
