"""`traceml top`: watch a running job on this host."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console

from traceml.cli.jobs.running_job import running_job
from traceml.cli.options.parsing import Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.cli.report import current_report
from traceml.display.terminal.fullscreen import FullScreen
from traceml.display.terminal.top_app import TopApp
from traceml.errors import UsageError
from traceml.process_ends import BY_OTHERS, EndedBySignal, ended_by
from traceml.renderers.text.card import print_report
from traceml.renderers.text.viewport import plain_console
from traceml.runs.live_run import LiveRun

__all__ = ["main"]

_INTERVAL_S = 0.5
_SHARE = 0.1  # of a CPU core: a job with very many ranks is drawn less often
_QUIT = ("q", "Q", "escape")


@dataclass(frozen=True)
class TopOptions(RunsDirOptions):
    """Watch a running job: speed, phases of each rank, and what limits it so far.

    Keys: o p r m t l s (or Tab) switch between overview, phases, ranks, memory, metrics, logs, system.

    Arrows, PgUp and PgDn scroll; ? lists the keys; q or Ctrl-C quits, and the job continues.
    """

    run: Annotated[str | None, Positional("[RUN|ADDRESS]")] = None
    """A run's folder, id or name, or host:port of an aggregator on this host (default: the newest running job)."""
    json: bool = False
    """Print the report so far as JSON, once, and nothing else; needs no terminal."""


def main(argv: list[str]) -> int:
    """Show a running job until it ends or a key is pressed."""
    options = parse(TopOptions, argv, prog="traceml top")
    is_named = options.runs_dir is not None
    config = options.config
    if options.json:
        print(current_report(running_job(options.run, config, only_there=is_named)).to_json())
        return 0

    console = plain_console()
    if not console.is_terminal or console.is_dumb_terminal:
        raise UsageError("top needs a terminal; in a pipe use `traceml report`, which also works on a running job")

    run_dir = running_job(options.run, config, only_there=is_named)
    if _watch(run_dir, console):
        print_report(current_report(run_dir), run_dir, console=console)

    return 0


def _watch(run_dir: Path, console: Console) -> bool:
    """Draw until the run ends (then True) or the user quits (False)."""
    live = LiveRun(run_dir)
    try:
        # Else they would leave the terminal as the screen had it.
        with ended_by(*BY_OTHERS, signal.SIGQUIT), FullScreen(console) as screen:
            top = TopApp(live)
            while True:
                began_s = time.monotonic()
                top.refresh()
                top.draw(screen)
                if live.ended:
                    return True

                until_s = time.monotonic() + max(_INTERVAL_S, (time.monotonic() - began_s) / _SHARE)
                while (key := screen.key(until_s - time.monotonic())) is not None:
                    if key in _QUIT:
                        return False

                    top.press(key, screen)
                    top.draw(screen)
    except EndedBySignal as ended:
        sys.exit(128 + ended.number)
    except KeyboardInterrupt:
        return False
    finally:
        live.close()
