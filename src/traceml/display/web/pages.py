"""Routes: the list of runs, a run, several runs compared. Each browser subscribes to what it shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from nicegui import Client, ui
from starlette.requests import Request
from starlette.responses import Response

from traceml.display.web.chart_cache import THEMES
from traceml.display.web.compare_page import ComparePage, CompareSource, CompareState
from traceml.display.web.first_paint import with_first_paint
from traceml.display.web.layout import add_head, theme_of
from traceml.display.web.panels.overlay_panel import LETTERS
from traceml.display.web.pollers import PollerRegistry
from traceml.display.web.run_page import RunPage
from traceml.display.web.run_sources import RunSource, RunsSource, RunsState, RunState, is_run_id
from traceml.display.web.runs_page import RunsPage

__all__ = ["Pages"]

_LIST_S, _RUN_S, _COMPARE_S = 2.0, 1.0, 5.0
# Data read within this time is on the page at its first paint; the rest follows.
_FIRST_S = 0.7
# A page is built slowly while the training uses every core.
_RESPONSE_TIMEOUT_S = 60.0

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
        return with_first_paint(client, request)

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

        return with_first_paint(client, request)

    async def _show_comparison(self, client: Client, request: Request, runs: str) -> Response:
        add_head(request.cookies)
        names = runs.split("/")[: len(LETTERS)]
        page = ComparePage(client, names, theme_of(request.cookies))
        ui.on("traceml_theme", lambda event: self._set_theme(page, event.args))
        if len(names) > 1 and all(is_run_id(name) for name in names):
            await self._follow(client, self._compared, tuple(names), page.show)
        else:
            page.show(CompareState(problem="There is no such run."))

        return with_first_paint(client, request)

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
