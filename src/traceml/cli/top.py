"""`traceml top`: watch a running job on this host."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from traceml.cli.parsing import parse
from traceml.cli.report import current_report
from traceml.display.terminal.fullscreen import FullScreen
from traceml.display.terminal.top_app import TopApp
from traceml.errors import RunNotFoundError, TraceMLError, UsageError
from traceml.renderers.text.card import print_report
from traceml.runs.find import RunInfo, find_run, list_runs
from traceml.runs.live_run import LiveRun
from traceml.settings import Config, load
from traceml.transport import auth

__all__ = ["main"]

_INTERVAL_S = 0.5
_SHARE = 0.1  # of a CPU core: a job with very many ranks is drawn less often
_QUIT = ("q", "Q", "escape")


@dataclass(frozen=True)
class TopOptions:
    """Watch a running job: speed, phases of each rank, and what limits it so far.

    Keys: o p r m t l s (or Tab) switch between overview, phases, ranks, memory, metrics, logs, system.

    Arrows, PgUp and PgDn scroll; ? lists the keys; q or Ctrl-C quits, and the job continues.
    """

    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RUN|ADDRESS]", help_behavior_hint="")] = (
        None
    )
    """A run's folder or id, or host:port of an aggregator on this host (default: the newest running job)."""
    runs_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the runs (default: the setting runs_dir)."""


def main(argv: list[str]) -> int:
    """Show a running job until it ends or a key is pressed."""
    options = parse(TopOptions, argv, prog="traceml top")
    config = load() if options.runs_dir is None else load(runs_dir=options.runs_dir)
    console = Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        raise UsageError("top needs a terminal; in a pipe use `traceml report`, which also works on a running job")

    run_dir = _running(options.run, config)
    if _watch(run_dir, console):
        print_report(current_report(run_dir), run_dir, console=console)

    return 0


def _running(target: str | None, config: Config) -> Path:
    """Return the folder of the chosen job.

    Raises:
        TraceMLError: it is not running, or no job is.
    """
    if target is None:
        return _newest(_places(config))

    host, _, port = target.rpartition(":")
    if host and port.isdigit() and not Path(target).exists():
        return _newest([_runs_of(host, int(port))])

    run_dir = find_run(target, config.runs_dir)
    live = LiveRun(run_dir)
    live.refresh()
    ended = live.ended
    live.close()
    if ended:
        raise TraceMLError(f"run {run_dir.name} has ended. Its verdict: traceml report {target}")

    return run_dir


def _places(config: Config) -> list[Path]:
    """Return the folders of runs to search: that of the settings, and that of a running aggregator."""
    served = auth.discover(config.port)
    places = [config.runs_dir.absolute()]
    if served is not None and served.runs_dir:
        places.append(Path(served.runs_dir))

    return list(dict.fromkeys(places))


def _runs_of(host: str, port: int) -> Path:
    served = auth.discover(port)
    if served is None or not served.runs_dir:
        raise RunNotFoundError(
            f"no aggregator of yours at {host}:{port} on this host. On another host, run `traceml top` there"
        )

    return Path(served.runs_dir)


def _newest(places: list[Path]) -> Path:
    infos = [info for place in places for info in list_runs(place)]
    running = [info for info in infos if info.state == "running"]
    if running:
        return max(running, key=_age).path

    where = " or ".join(map(str, places))
    hint = "Start one with `traceml run SCRIPT`"
    if infos:
        latest = max(infos, key=_age)
        hint = f"The latest, {latest.id}, has ended ({latest.state}): traceml report {latest.path}"

    raise RunNotFoundError(f"no job is running in {where}. {hint}")


def _age(info: RunInfo) -> tuple[float, str]:
    return info.started or 0.0, info.id


def _watch(run_dir: Path, console: Console) -> bool:
    """Draw until the run ends (then True) or the user quits (False)."""
    live = LiveRun(run_dir)
    try:
        with FullScreen(console) as screen:
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
    except KeyboardInterrupt:
        return False
    finally:
        live.close()
