"""Search of a running job on this host."""

from __future__ import annotations

from pathlib import Path

from traceml.errors import RunNotFoundError, TraceMLError
from traceml.runs.find import RunInfo, find_run, list_runs
from traceml.runs.live_run import LiveRun
from traceml.settings import Config
from traceml.transport import auth

__all__ = ["running_job"]


def running_job(target: str | None, config: Config) -> Path:
    """Return the folder of the chosen job.

    Args:
        target: a run's folder or id, or host:port of an aggregator on this host; None: the newest running job.
        config: the settings.

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
            f"no aggregator of yours at {host}:{port} on this host. On another host, run this command there"
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
