"""State of `traceml top`: the table on the screen, its first row, and the effect of keys."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text

from traceml.display.terminal.fullscreen import FullScreen
from traceml.renderers.text import top_tables
from traceml.renderers.text.top_screen import MIN_HEIGHT, Tab, help_lines, page_rows, table_lines
from traceml.renderers.text.viewport import Viewport
from traceml.renderers.views import RunView, run_view
from traceml.runs.live_run import LiveRun
from traceml.runs.log_tails import output_lines

__all__ = ["TABS", "TopApp"]

TABS = (
    Tab("o", "overview"),
    Tab("p", "phases"),
    Tab("r", "ranks"),
    Tab("m", "memory"),
    Tab("t", "metrics"),
    Tab("l", "logs"),
    Tab("s", "system"),
)
_KEYS = " ".join(tab.key for tab in TABS)
_FOOTER = "q quits; the job continues"


class TopApp:
    """The screens of a job."""

    def __init__(self, live: LiveRun) -> None:
        self._live = live
        self._report = live.report()
        self._view: RunView = run_view(self._report)
        self._shown = 0
        self._first = 0
        self._help_open = False
        self._cached_table: top_tables.TableView | None = None
        self._factories: dict[str, Callable[[], top_tables.TableView]] = {
            "p": lambda: top_tables.phases_table(self._report),
            "r": lambda: top_tables.ranks_table(self._view),
            "m": lambda: top_tables.memory_table(self._report),
            "t": self._metrics,
            "l": lambda: top_tables.logs_table(self._live.notes(), output_lines(self._live.path)),
            "s": lambda: top_tables.system_table(self._report),
        }

    def refresh(self) -> None:
        """Read new data.

        Raises:
            StoreError: the run cannot be read.
        """
        self._live.refresh()
        self._report = self._live.report()
        self._view = run_view(self._report, self._live.rates)
        self._cached_table = None

    def draw(self, screen: FullScreen) -> None:
        """Draw the chosen table."""
        tab = TABS[self._shown]
        if self._help_open:
            screen.show(
                lambda viewport: help_lines(self._view, TABS, viewport), footer="any key: back", least=MIN_HEIGHT
            )
        elif tab.key not in self._factories:
            screen.draw(self._view, footer=f"{_FOOTER}   ?: keys   Tab or {_KEYS[2:]}: tables")
        else:
            screen.show(self._lines, footer=f"{_FOOTER}   ?: keys   Tab, {_KEYS}: tables   PgUp PgDn",
                        least=MIN_HEIGHT)  # fmt: skip

    def press(self, key: str, screen: FullScreen) -> None:
        """Apply a key."""
        if key == "resize":
            return

        if self._help_open or key in ("?", "h"):
            self._help_open = not self._help_open
            return

        found = next((at for at, tab in enumerate(TABS) if tab.key == key.lower()), None)
        if found is None and key in ("tab", "right", "backtab", "left"):
            found = (self._shown + (1 if key in ("tab", "right") else -1)) % len(TABS)

        if found is not None:
            self._shown, self._first, self._cached_table = found, 0, None
        else:
            self._move(key, page_rows(screen.viewport))

    def _move(self, key: str, page: int) -> None:
        far = 1 << 30
        by = {"down": 1, "j": 1, "up": -1, "k": -1, "pagedown": page, " ": page, "pageup": -page, "b": -page,
              "home": -far, "g": -far, "end": far, "G": far}.get(key, 0)  # fmt: skip
        self._first += by

    def _lines(self, viewport: Viewport) -> list[Text]:
        if self._cached_table is None:
            self._cached_table = self._factories[TABS[self._shown].key]()

        most = max(len(self._cached_table.rows) - page_rows(viewport), 0)
        self._first = min(max(self._first, 0), most)
        return table_lines(self._view, TABS, self._cached_table, self._first, viewport)

    def _metrics(self) -> top_tables.TableView:
        series = self._live.series()
        lines = {line.name: line.values.tolist() for line in series.metrics} if series is not None else {}
        return top_tables.metrics_table(self._report, lines)
