"""The screen of a job that this process runs: its output above, its live view below."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from traceml.display.terminal.terminal_driver import TerminalDriver
from traceml.errors import StoreError
from traceml.renderers.views import live_view
from traceml.runs.live_run import LiveRun
from traceml.runs.report_types import Report

__all__ = ["RunScreen", "TerminalDriver"]

# Reading and drawing take at most this share of a core: the job needs them all.
_SHARE = 0.05

_log = logging.getLogger("traceml")


class FollowedRun(Protocol):
    """A run that goes on, as `runs.live.LiveRun` follows it."""

    rates: Any

    def refresh(self) -> bool:
        """Take in what came."""

    def report(self) -> Report:
        """Return the report so far."""

    def close(self) -> None:
        """Stop following."""


class RunScreen:
    """Shows a run below its output; call `tick` often, it draws when it is time.

    Args:
        run_dir: the run's folder; its store may come later.
        console: the terminal; standard output where it is not given.
        interval_s: time between two draws; more where reading takes long.
        follow: opens the run.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        console: Console | None = None,
        interval_s: float = 0.5,
        follow: Callable[[Path], FollowedRun] = LiveRun,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._driver = TerminalDriver(console or Console(file=sys.stdout, highlight=False), interval_s=0.0)
        self._run: FollowedRun | None = follow(run_dir)
        self._interval_s = interval_s
        self._clock = clock
        self._due_s = float("-inf")

    def tick(self) -> None:
        """Draw anew if it is time; a run that cannot be read has no view, and goes on without."""
        began_s = self._clock()
        if self._run is None or began_s < self._due_s:
            return

        try:
            self._run.refresh()
            report = self._run.report()
            if report.ranks:  # before the first rank is there, nobody knows how many there will be
                self._driver.update(live_view(report, self._run.rates))
        except StoreError as error:
            self._give_up(f"the live view ended: {error}")
        except Exception:  # noqa: BLE001 - the job must go on whatever is wrong with its picture
            _log.exception("the live view failed")
            self._give_up("the live view ended because of an error in traceml; the job goes on")

        ended_s = self._clock()
        self._due_s = ended_s + max(self._interval_s, (ended_s - began_s) / _SHARE)

    def write(self, data: bytes) -> None:
        """Show output of the script, unchanged."""
        self._driver.write(data)

    def close(self) -> None:
        """Leave the terminal as it was; may be called again."""
        self._driver.close()
        if self._run is not None:
            self._run.close()
            self._run = None

    def _give_up(self, why: str) -> None:
        self.close()
        _log.warning(why)
