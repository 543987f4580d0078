"""The table of runs, a page at a time; the browser's side is in `runs_table.js`."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from nicegui import ui

from traceml.display.web.elements import run_path
from traceml.display.web.runlist.list_query import ListPart, ListQuery
from traceml.formatting import cut_text, printable
from traceml.renderers.run_cells import TEXT_FIELDS, run_cell
from traceml.renderers.views import verdict_look
from traceml.runs.run_query import RunFields

__all__ = ["RunsTable"]

_LONGEST = 60  # text of a cell
_LONGEST_NAME = 160  # and note: all of them is on the run's page
_PHONE = ("state", "verdict")  # the other columns are hidden where the screen is narrow
_PILLS = {"state", "verdict", "severity"}


class RunsTable(ui.element, component="runs_table.js"):  # type: ignore[misc, call-arg]  # checked without NiceGUI
    """The table, in one browser."""

    def __init__(self, on_sort: Callable[[str], None], on_pick: Callable[[str, bool], None]) -> None:
        super().__init__()
        self.props["columns"], self.props["rows"] = [], []
        self.on("sort", lambda event: on_sort(str(event.args)))
        self.on("pick", lambda event: on_pick(str(event.args[0]), bool(event.args[1])))

    def show(self, part: ListPart, query: ListQuery, picked: set[str]) -> None:
        """Show the runs of a page of the list."""
        names = ["name", *query.columns]
        columns = [_column(name, query) for name in names]
        rows = [_row(run, heading, query, picked) for heading, run in _first_headings(part)]
        if (columns, rows) != (self.props["columns"], self.props["rows"]):
            self.props["columns"], self.props["rows"] = columns, rows
            self.update()

    def html(self) -> str:
        """Return what the template of `runs_table.js` builds."""
        columns, rows = self.props["columns"], self.props["rows"]
        return (
            '<div class="scroll"><table><thead><tr><th scope="col" class="pickcell"><span class="visually-hidden">'
            f"select</span></th>{''.join(map(_html_heading, columns))}</tr></thead>"
            f"<tbody>{''.join(_html_row(row, columns) for row in rows)}</tbody></table></div>"
        )


def _html_row(row: dict[str, Any], columns: list[dict[str, Any]]) -> str:
    heading = row["heading"]
    group = f'<tr class="groupline"><th colspan="{len(columns) + 1}" scope="colgroup">{escape(heading)}</th></tr>'
    look = ' class="picked"' if row["picked"] else ""
    name = escape(row["name"])
    pick = f'<input type="checkbox" inert{" checked" if row["picked"] else ""} aria-label="select {name}">'
    cells = "".join(f'<td class="{col["look"]}">{_html_cell(row, col["name"])}</td>' for col in columns)
    return f'{group if heading else ""}<tr{look}><td class="pickcell">{pick}</td>{cells}</tr>'


def _html_cell(row: dict[str, Any], name: str) -> str:
    if name == "name":
        tags = "".join(f'<span class="pill">{escape(tag)}</span>' for tag in row["tags"])
        return (
            f'<a class="name" href="{escape(row["href"])}">{escape(row["name"])}</a>'
            f'<span class="id mono">{escape(row["id"])}</span>'
            + (f'<span class="tagline">{tags}</span>' if tags else "")
            + (f'<span class="id">{escape(row["note"])}</span>' if row["note"] else "")
        )

    text = escape(row["cells"][name])
    return f'<span class="pill {row["looks"][name]}">{text}</span>' if name in row["looks"] and text != "-" else text


def _html_heading(column: dict[str, Any]) -> str:
    arrow = {"ascending": " \u2191", "descending": " \u2193", "": ""}[column["order"]]
    return (
        f'<th scope="col" class="{column["look"]}" aria-sort="{column["order"] or "none"}"><button type="button" inert '
        f'class="sort">{escape(column["label"])}<span aria-hidden="true">{arrow}</span></button></th>'
    )


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
           "step_ms": "Step", "started": "Started", "took": "Took", "size": "Size", "project": "Project",
           "user": "User", "steps": "Steps", "severity": "Severity", "tags": "Tags", "note": "Note",
           "archived": "Archived", "git.commit": "Git commit", "git.branch": "Git branch",
           "git.dirty": "Uncommitted changes"}  # fmt: skip


def _row(run: RunFields, heading: str, query: ListQuery, picked: set[str]) -> dict[str, Any]:
    info = run.info
    cells = {name: _cell(run, name) for name in query.columns}
    look = verdict_look(info.verdict, info.severity)
    looks = {"state": info.state, "verdict": look, "severity": info.severity or ""}
    return {
        "id": info.id,
        "name": cut_text(printable(info.name), _LONGEST_NAME),
        "href": run_path(info.id),
        "heading": heading,
        "picked": info.id in picked,
        "tags": [printable(tag) for tag in info.tags] + (["archived"] if info.archived else []),
        "note": cut_text(printable(info.note), _LONGEST_NAME),
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
    return cut_text(text, _LONGEST)
