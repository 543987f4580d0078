"""Routes: the list of runs, a run, several runs compared. Each browser subscribes to what it shows."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Hashable
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from nicegui import Client, ui
from nicegui.elements.mixins.text_element import TextElement
from starlette.requests import Request
from starlette.responses import Response

from traceml.display.web.chart_cache import THEMES
from traceml.display.web.compare_page import ComparePage, CompareSource, CompareState
from traceml.display.web.layout import add_head, theme_of
from traceml.display.web.panels.overlay_panel import LETTERS
from traceml.display.web.pollers import PollerRegistry
from traceml.display.web.run_page import RunPage
from traceml.display.web.run_sources import RunSource, RunState, is_run_id
from traceml.display.web.runlist.runs_table import RunsTable
from traceml.display.web.runs_page import RunsPage
from traceml.runs.runs_source import RunsSource, RunsState

__all__ = ["Pages"]

_LIST_S, _RUN_S, _COMPARE_S = 2.0, 1.0, 5.0
# Data read within this time is on the page at its first paint; the rest follows.
_FIRST_S = 0.7
# A page is built slowly while the training uses every core.
_RESPONSE_TIMEOUT_S = 60.0
# Parts of NiceGUI's template: style sheets that our own replaces, and the element that Vue empties and fills. Where
# another version has none like them, the page is shown later.
_STYLE_SHEET = re.compile(rb'@import url\("[^"]*"\) layer\(\w+\);')
_APP = re.compile(rb'<div id="app"[^>]*>')
_VOID = ("br", "img", "input")
# These do nothing before the scripts run; a click or a key would be lost.
_INERT = {"button": " inert", "input": " inert readonly", "select": " inert"}

T = TypeVar("T")


class Pages:
    """The pages of one folder of runs."""

    def __init__(self, runs_dir: Path) -> None:
        self._runs_dir = runs_dir
        self._themes: set[str] = set()
        runs = RunsSource(runs_dir)  # one for all visits: what it knows of old runs is read once
        self._list: PollerRegistry[RunsState] = PollerRegistry(lambda _: runs, interval_s=_LIST_S)
        self._runs: PollerRegistry[RunState] = PollerRegistry(self._open_run, interval_s=_RUN_S)
        self._compared: PollerRegistry[CompareState] = PollerRegistry(self._open_comparison, interval_s=_COMPARE_S)

    def register(self) -> None:
        """Add the routes to NiceGUI's application."""
        ui.page("/", title="Runs - traceml", response_timeout=_RESPONSE_TIMEOUT_S)(self._show_list)
        ui.page("/run/{run_id}", response_timeout=_RESPONSE_TIMEOUT_S)(self._show_run)
        compare = ui.page("/compare/{runs:path}", title="Compare - traceml", response_timeout=_RESPONSE_TIMEOUT_S)
        compare(self._show_comparison)

    def read_ahead(self) -> None:
        """Read the list now, so that the first visit finds it; called in the event loop."""
        self._list.subscribe("", _ignore)
        self._list.unsubscribe("", _ignore)

    def refresh(self) -> None:
        """Read the list and the open runs again, now."""
        self._runs.refresh()
        self._list.refresh()

    async def _show_list(self, client: Client, request: Request) -> Response:
        add_head(request.cookies)
        page = RunsPage(client, self._runs_dir, request.query_params, self._list.refresh)
        await self._follow(client, self._list, "", page.show)
        return _with_first_paint(client, request)

    async def _show_run(self, client: Client, request: Request, run_id: str) -> Response:
        add_head(request.cookies)
        ui.page_title(f"{run_id} - traceml")
        theme = theme_of(request.cookies)
        self._themes.add(theme)
        page = RunPage(client, self._runs_dir / run_id, theme)
        ui.on("traceml_theme", lambda event: self._set_theme(page, event.args))
        if is_run_id(run_id):
            await self._follow(client, self._runs, run_id, page.show)
        else:
            page.show(RunState(run_id, exists=False))

        return _with_first_paint(client, request)

    async def _show_comparison(self, client: Client, request: Request, runs: str) -> Response:
        add_head(request.cookies)
        names = runs.split("/")[: len(LETTERS)]
        page = ComparePage(client, names, theme_of(request.cookies))
        ui.on("traceml_theme", lambda event: self._set_theme(page, event.args))
        if len(names) > 1 and all(is_run_id(name) for name in names):
            await self._follow(client, self._compared, tuple(names), page.show)
        else:
            page.show(CompareState(problem="There is no such run."))

        return _with_first_paint(client, request)

    def _set_theme(self, page: RunPage | ComparePage, theme: object) -> None:
        if isinstance(theme, str) and theme in THEMES:
            self._themes.add(theme)
            page.set_theme(theme)

    def _open_run(self, key: Hashable) -> RunSource:
        return RunSource(self._runs_dir / str(key), self._themes)

    def _open_comparison(self, key: Any) -> CompareSource:
        return CompareSource([self._runs_dir / name for name in key])

    async def _follow(
        self, client: Client, pollers: PollerRegistry[T], key: Hashable, show: Callable[[T], None]
    ) -> None:
        """Show a browser each state until it leaves; return after the first one, or when that takes too long."""
        first = asyncio.Event()

        def listen(state: T) -> None:
            show(state)
            first.set()

        pollers.subscribe(key, listen)
        client.on_delete(lambda: pollers.unsubscribe(key, listen))
        try:
            await asyncio.wait_for(first.wait(), _FIRST_S)
        except TimeoutError:
            pass  # the page shows that it is waiting


def _ignore(_state: object) -> None:
    """Ignore a state."""


def _with_first_paint(client: Client, request: Request) -> Response:
    """Return NiceGUI's response to a request of a page, with the page's elements as HTML in it.

    The scripts are a megabyte. Without this HTML the browser shows nothing of a run before it has run them.
    """
    response = client.build_response(request)
    if response.headers["content-type"].startswith("text/html"):
        painted = f'<div id="first-paint">{"".join(map(_html, client.content.default_slot.children))}</div>'.encode()
        body = _STYLE_SHEET.sub(b"", bytes(response.body))
        response.body = _APP.sub(lambda found: found[0] + painted, body, count=1)
        response.headers["content-length"] = str(len(response.body))

    return response


def _html(element: ui.element) -> str:
    if isinstance(element, RunsTable):
        return element.html()

    tag, attributes = ("div", {}) if element.component else (element.tag, dict(element.props))
    attributes["class"] = " ".join(element.classes)
    attributes["style"] = "".join(f"{name}:{value};" for name, value in element.style.items())
    start = f"<{tag}{_INERT.get(tag, '')}{''.join(_attribute(*each) for each in attributes.items())}>"
    if tag in _VOID:
        return start

    text = escape(element.text) if isinstance(element, TextElement) else ""
    return f"{start}{text}{''.join(map(_html, element.default_slot.children))}</{tag}>"


def _attribute(name: str, value: object) -> str:
    if value is None or value is False or value == "":
        return ""

    name = name.removeprefix("^")  # NiceGUI's mark of an attribute that Vue sets once
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
