"""The list of runs: conditions, columns, order, groups and pages, and changes of the runs that are selected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from nicegui import Client, background_tasks, run

from traceml.display.web.elements import EMIT_VALUE, Container, TextNode, set_visible
from traceml.display.web.layout import Banner, top_bar
from traceml.display.web.runlist.edit_bar import EditBar
from traceml.display.web.runlist.list_query import ListPart, ListQuery, field_names
from traceml.display.web.runlist.runs_table import RunsTable
from traceml.formatting import count_text, plural, printable
from traceml.runs.runs_source import RunsState

__all__ = ["RunsPage"]

_HELP = "Words, lr<0.1, tag:baseline, state=finished, !verdict~straggler"


class RunsPage:
    """The list, in one browser."""

    def __init__(self, client: Client, runs_dir: Path, address: Mapping[str, str], refresh: Callable[[], None]) -> None:
        self._client = client
        self._query = ListQuery.of_address(address)
        self._state: RunsState | None = None
        self._part: ListPart | None = None
        self._picked: set[str] = set()
        self._names: list[str] = []
        top_bar()
        self._banner = Banner()
        with Container("div", "page", id="content", tabindex="-1"):
            self._head()
            self._problem = TextNode("p", "", "note problem", role="status")
            self._columns_box()
            self._edits = EditBar(client, refresh)
            with Container("div", "card runs") as self._card:
                self._table = RunsTable(lambda name: self._go(self._query.sorted_by(name)), self._pick)
                self._none = TextNode("p", "No run meets these conditions.", "note", id="none-found")

            self._pager()
            with Container("div", "card empty-state") as self._empty_state:
                TextNode("h2", "No runs yet")
                TextNode("p", f"They appear here as soon as one starts in {runs_dir}.")
                TextNode("code", "traceml run train.py")

        self._banner.show("Reading the runs ...")
        for part in (self._card, self._empty_state):
            set_visible(part, False)

    def show(self, state: RunsState) -> None:
        """Show the current list."""
        self._state = state
        if self._query.is_light:
            with self._client:
                self._show_part(state, self._query.part(state.fields))
        else:
            background_tasks.create(self._show(), name="list of runs")

    async def _show(self) -> None:
        """Make the page of the list, in a thread as conditions may read many reports, and show it if it is current."""
        state, query = self._state, self._query
        if state is None:
            return

        part = await run.io_bound(query.part, state.fields)
        if part is not None and (state, query) == (self._state, self._query) and not self._client.is_deleted:
            with self._client:
                self._show_part(state, part)

    def _show_part(self, state: RunsState, part: ListPart) -> None:
        self._part = part
        self._banner.show(state.problem)
        set_visible(self._empty_state, not state.runs and not state.problem)
        set_visible(self._card, bool(state.runs))
        set_visible(self._none, bool(state.runs) and not part.runs)
        self._problem.set_text(printable(part.problem))
        set_visible(self._problem, bool(part.problem))
        self._picked &= {info.id for info in state.runs}
        self._table.show(part, self._query, self._picked)
        self._show_picked()
        archived = sum(info.archived for info in state.runs)
        self._found.set_text(_found(part, archived, shown=self._query.archived))
        set_visible(self._found, bool(state.runs))
        self._place.set_text(f"Page {min(self._query.page, part.pages)} of {part.pages}")
        for each in (self._previous, self._next, self._place):
            set_visible(each, part.pages > 1)

    def _head(self) -> None:
        with Container("div", "head"):
            TextNode("h1", "Runs")
            attributes = {"type": "search", "placeholder": _HELP, "aria_label": "search runs", "title": _HELP}
            box = Container("input", "search where", id="search", autocomplete="off", **attributes)
            box.props["^value"] = self._query.where  # the initial one: Vue would write `value` over what is typed
            box.on("input", lambda event: self._change(where=str(event.args)), js_handler=EMIT_VALUE, throttle=0.2)
            columns = TextNode("button", "Columns and groups", "tool", type="button", id="columns")
            columns.on("click", self._open_columns)
            archived = TextNode("button", "Archived", "tool", type="button", id="archived",
                                aria_pressed=str(self._query.archived).lower())  # fmt: skip
            archived.on("click", lambda: self._toggle_archived(archived))

    def _columns_box(self) -> None:
        with Container("div", "card pad columns", role="region", aria_label="columns and groups") as self._box:
            with Container("label", "toolbar"):
                TextNode("span", "Group by")
                self._groups = Container("select", "tool", id="group")
                self._groups.on("change", lambda event: self._change(group=str(event.args)), js_handler=EMIT_VALUE)

            self._choices = Container("div", "choices")

        set_visible(self._box, False)

    def _pager(self) -> None:
        with Container("div", "toolbar pager"):
            self._found = TextNode("span", "", id="found")
            self._previous = TextNode("button", "Previous", "tool", type="button")
            self._place = TextNode("span")
            self._next = TextNode("button", "Next", "tool", type="button")
            self._previous.on("click", lambda: self._turn(-1))
            self._next.on("click", lambda: self._turn(1))

    def _change(self, **values: object) -> None:
        """Change the query, in the address too, and show its first page."""
        self._go(replace(self._query, **{"page": 1, **values}))  # type: ignore[arg-type]

    def _go(self, query: ListQuery) -> None:
        self._query = query
        self._client.run_javascript(f"history.replaceState(null, '', {query.address!r})")
        background_tasks.create(self._show(), name="list of runs")

    def _turn(self, by: int) -> None:
        pages = self._part.pages if self._part is not None else 1
        self._go(replace(self._query, page=min(max(self._query.page + by, 1), pages)))

    def _toggle_archived(self, button: TextNode) -> None:
        self._change(archived=not self._query.archived)
        button.props["aria-pressed"] = str(self._query.archived).lower()

    def _pick(self, run_id: str, picked: bool) -> None:
        (self._picked.add if picked else self._picked.discard)(run_id)
        self._show_picked()
        if self._part is not None:
            self._table.show(self._part, self._query, self._picked)

    def _show_picked(self) -> None:
        runs = self._state.runs if self._state is not None else ()
        self._edits.show([info for info in reversed(runs) if info.id in self._picked])

    async def _open_columns(self) -> None:
        """Show or hide the choice of columns; the names that were logged are in the reports."""
        if not self._box.props.get("hidden"):
            set_visible(self._box, False)
            return

        fields = self._state.fields if self._state is not None else ()
        self._names = await run.io_bound(field_names, fields) or []
        with self._client:
            self._draw_choices()
            set_visible(self._box, True)

    def _draw_choices(self) -> None:
        self._groups.clear()
        self._choices.clear()
        with self._groups:
            for name in ("", *self._names):
                TextNode("option", printable(name) or "nothing", value=name, selected=name == self._query.group)

        with self._choices:
            for name in self._names:
                self._draw_choice(name)

    def _draw_choice(self, name: str) -> None:
        with Container("label", "choice"):
            box = Container("input", "", type="checkbox", checked=name in self._query.columns)
            box.on("change", lambda event: self._choose(name, chosen=bool(event.args)),
                   js_handler="(event) => emit(event.target.checked)")  # fmt: skip
            TextNode("span", printable(name))

    def _choose(self, name: str, *, chosen: bool) -> None:
        others = [each for each in self._query.columns if each != name]
        self._change(columns=tuple([*others, name] if chosen else others))


def _found(part: ListPart, archived: int, *, shown: bool) -> str:
    hidden = f", {count_text(archived)} archived not listed" if archived and not shown else ""
    return f"{plural(part.found, 'run')}{hidden}"
