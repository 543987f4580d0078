"""The terminal of a job that this process runs: its output above, its live view below."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from traceml.display.terminal.bottom_panel import BottomPanel
from traceml.errors import StoreError
from traceml.fail_open import fail_open
from traceml.renderers.text.viewport import plain_console
from traceml.renderers.views import run_view
from traceml.runs.live_run import LiveRun

__all__ = ["BottomPanel", "LiveScreen"]

# Reading and drawing take at most this share of a CPU core: the job needs the rest.
_SHARE = 0.05
_INTERVAL_S = 0.5  # between two draws; longer where reading takes long

_log = logging.getLogger("traceml")


class LiveScreen:
    """Shows a run below its output; call `tick` often, it draws when a draw is due.

    Args:
        run_dir: the run's folder; its store may be created later.
        console: the terminal; standard output where left out.
        follow: opens the run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        console: Console | None = None,
        follow: Callable[[Path], LiveRun] = LiveRun,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._panel = BottomPanel(console or plain_console(sys.stdout))
        self._run: LiveRun | None = follow(run_dir)
        self._clock = clock
        self._due_s = float("-inf")

    def tick(self) -> None:
        """Draw if a draw is due; a run that cannot be read loses its view, and continues."""
        began_s = self._clock()
        if self._run is None or began_s < self._due_s:
            return

        try:
            with fail_open(_log, "display", "the live view failed", reraise=StoreError) as guarded:
                self._draw(self._run)
        except StoreError as error:
            self._stop(f"the live view ended: {error}")
        else:
            if guarded.error is not None:
                self._stop("the live view ended because of an error in traceml; the job continues")

        ended_s = self._clock()
        self._due_s = ended_s + max(_INTERVAL_S, (ended_s - began_s) / _SHARE)

    def _draw(self, run: LiveRun) -> None:
        run.refresh()
        report = run.report()
        if report.ranks:  # the number of ranks is unknown before the first one connects
            self._panel.update(run_view(report, run.rates))

    def write(self, data: bytes) -> None:
        """Pass on output of the script, unchanged."""
        self._panel.write(data)

    def close(self) -> None:
        """Restore the terminal; may be called again."""
        self._panel.close()
        if self._run is not None:
            self._run.close()
            self._run = None

    def _stop(self, why: str) -> None:
        self.close()
        _log.warning(why)
