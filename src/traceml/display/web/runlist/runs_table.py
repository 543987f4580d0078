"""The table of runs: Quasar's, with its rows made by the server, a page at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from traceml.diagnosis.kinds import Kind
from traceml.display.web.elements import run_path
from traceml.display.web.runlist.list_query import ListPart, ListQuery
from traceml.formatting import printable
from traceml.renderers.run_cells import TEXT_FIELDS, run_cell
from traceml.runs.run_query import RunFields

__all__ = ["RunsTable"]

_LONGEST = 60
_PHONE = ("state", "verdict")  # the other columns are hidden where the screen is narrow
_PILLS = {"state", "verdict", "severity"}

# Vue's templates escape every value; `v-html` must never be used here.
_HEADER = """
<q-tr>
  <th scope="col" class="pickcell"><span class="visually-hidden">pick</span></th>
  <th v-for="col in props.cols" :key="col.name" scope="col" :class="col.look"
      :aria-sort="col.order || 'none'">
    <button type="button" class="sort" @click="$parent.$emit('sort', col.name)">{{ col.label }}<span
      aria-hidden="true">{{ col.order === 'ascending' ? ' \\u2191' : col.order ? ' \\u2193' : '' }}</span></button>
  </th>
</q-tr>
"""
_BODY = """
<tr v-if="props.row.heading" class="groupline" :key="'g' + props.row.id">
  <th :colspan="props.cols.length + 1" scope="colgroup">{{ props.row.heading }}</th>
</tr>
<tr :key="props.row.id" :class="{ picked: props.row.picked }">
  <td class="pickcell"><input type="checkbox" :data-run="props.row.id" :checked="props.row.picked"
    :aria-label="'pick ' + props.row.name"
    @change="$parent.$emit('pick', [props.row.id, $event.target.checked])"></td>
  <td v-for="col in props.cols" :key="col.name" :class="col.look">
    <template v-if="col.name === 'name'">
      <a class="name" :href="props.row.href">{{ props.row.name }}</a>
      <span class="id mono">{{ props.row.id }}</span>
      <span v-if="props.row.tags.length" class="tagline"><span v-for="tag in props.row.tags" :key="tag"
        class="pill">{{ tag }}</span></span>
      <span v-if="props.row.note" class="id">{{ props.row.note }}</span>
    </template>
    <span v-else-if="props.row.looks[col.name] !== undefined && props.row.cells[col.name] !== '-'"
      :class="'pill ' + props.row.looks[col.name]">{{ props.row.cells[col.name] }}</span>
    <template v-else>{{ props.row.cells[col.name] }}</template>
  </td>
</tr>
"""


class RunsTable:
    """The table, in one browser.

    Args:
        on_sort: called with the column whose heading was pressed.
        on_pick: called with the id of a run and whether it is picked now.
    """

    def __init__(self, on_sort: Callable[[str], None], on_pick: Callable[[str, bool], None]) -> None:
        self.element = ui.table(columns=[], rows=[], row_key="id")
        self.element.props("flat wrap-cells hide-bottom")
        self.element.props["table-class"] = "runs"
        self.element.add_slot("header", _HEADER)
        self.element.add_slot("body", _BODY)
        self.element.on("sort", lambda event: on_sort(str(event.args)))
        self.element.on("pick", lambda event: on_pick(str(event.args[0]), bool(event.args[1])))

    def show(self, part: ListPart, query: ListQuery, picked: set[str]) -> None:
        """Show the runs of a page of the list."""
        names = ["name", *query.columns]
        columns = [_column(name, query) for name in names]
        rows = [_row(run, heading, query, picked) for heading, run in _first_headings(part)]
        if (columns, rows) != (self._columns, self._rows):
            self._columns, self._rows = columns, rows
            self.element.props["columns"], self.element.props["rows"] = columns, rows
            self.element.update()

    _columns: list[dict[str, Any]] | None = None
    _rows: list[dict[str, Any]] | None = None


def _first_headings(part: ListPart) -> list[tuple[str, RunFields]]:
    """Return the runs with the heading of a group at its first run alone."""
    before = ["", *(heading for heading, _ in part.runs)][: len(part.runs)]
    pairs = zip(before, part.runs, strict=True)
    return [("" if last == heading else heading, run) for last, (heading, run) in pairs]


def _column(name: str, query: ListQuery) -> dict[str, Any]:
    look = " ".join(
        part for part in (f"{name}cell" if name in _PHONE else "", "" if name in TEXT_FIELDS else "n",
                          "" if name in (*_PHONE, "name") else "wide-only") if part
    )  # fmt: skip
    order = ("descending" if query.reverse else "ascending") if query.sort == name else ""
    label = _LABELS.get(name, printable(name))
    return {"name": name, "label": label, "field": name, "look": look, "order": order}


_LABELS = {"name": "Run", "state": "State", "verdict": "Verdict", "ranks": "Ranks", "samples/s": "Samples/s",
           "step_ms": "Step ms", "started": "Started", "took": "Took", "size": "Size", "project": "Project",
           "user": "User", "steps": "Steps", "severity": "Severity", "tags": "Tags", "note": "Note",
           "archived": "Archived", "git.commit": "Git commit", "git.branch": "Git branch",
           "git.dirty": "Uncommitted changes"}  # fmt: skip


def _row(run: RunFields, heading: str, query: ListQuery, picked: set[str]) -> dict[str, Any]:
    info = run.info
    cells = {name: _cell(run, name) for name in query.columns}
    severity = info.severity or ""
    judged = "" if info.verdict == Kind.INSUFFICIENT_DATA else severity  # else it would be green, as a healthy run
    looks = {"state": info.state, "verdict": judged, "severity": severity}
    return {
        "id": info.id,
        "name": printable(info.name),
        "href": run_path(info.id),
        "heading": heading,
        "picked": info.id in picked,
        "tags": [printable(tag) for tag in info.tags] + (["archived"] if info.archived else []),
        "note": printable(info.note),
        "cells": cells,
        "looks": {name: looks[name] for name in query.columns if name in _PILLS},
    }


def _kind_words(kind: str) -> str:
    """Return a kind of verdict in words, abbreviations in capitals."""
    first, *rest = kind.split("_")
    return " ".join([first if first in _ABBREVIATIONS else first.capitalize(), *map(str.lower, rest)])


_ABBREVIATIONS = ("CPU", "GC", "H2D")


def _cell(run: RunFields, name: str) -> str:
    text = run_cell(run, name)
    text = _kind_words(text) if name == "verdict" else text
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
