"""Search for a running job on this host."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader
from traceml.errors import AggregatorUnavailableError, RunNotFoundError, TraceMLError
from traceml.run_folder import STORE_NAME, report_command
from traceml.runs.find import RunInfo, find_run, list_runs
from traceml.runs.live_run import LiveRun
from traceml.settings import Config
from traceml.transport import auth
from traceml.transport.client import Connection, connect
from traceml.transport.folder_aggregator import address_of, reachable
from traceml.transport.hello import Hello

__all__ = ["aggregator_of", "joined_run", "name_joined_run", "running_job"]

_CONNECT_S = 5.0
_POLL_S = 0.1


def running_job(target: str | None, config: Config, *, only_there: bool = False, of_other_nodes: bool = False) -> Path:
    """Return the folder of the chosen job.

    Args:
        target: a run's folder, id or name, or host:port of an aggregator on this host; None: the newest running job of
            the runs folder, else of the folder that an aggregator on the usual port serves.
        only_there: whether the user named the runs folder: a job of another one is not meant then.
        of_other_nodes: whether to return also the run of another node that ranks of this host belong to, whose folder
            is on that node.

    Raises:
        TraceMLError: it is not running, or no job is.
    """
    try:
        return _job_here(target, config, only_there=only_there)
    except RunNotFoundError as error:
        if of_other_nodes and (joined := joined_run(target)) is not None:
            return Path(joined.runs_dir, joined.run_id)

        raise name_joined_run(error, target) from error


def joined_run(target: str | None) -> auth.PublishedServer | None:
    """Return the run of another node that ranks of this host belong to; None without one.

    Args:
        target: its folder or id, or the beginning or end of the id; None: the newest.
    """
    name = Path(target or "").name
    meant = (each for each in auth.joined_runs() if each.run_id.startswith(name) or each.run_id.endswith(name))
    return next(meant, None)


def name_joined_run(error: RunNotFoundError, target: str | None) -> RunNotFoundError:
    """Return an error that says on which node the run of this host's ranks is; without one `error` itself."""
    joined = joined_run(target)
    if joined is None:
        return error

    return RunNotFoundError(
        f"the ranks of this host are part of run {joined.run_id} of {joined.node}: run this command there, for "
        f"{Path(joined.runs_dir, joined.run_id)}"
    )


def _job_here(target: str | None, config: Config, *, only_there: bool) -> Path:
    if target is None:
        return _newest([config.runs_dir.absolute()] if only_there else _places(config))

    host, _, port = target.rpartition(":")
    if host and port.isdigit() and not Path(target).exists():
        return _newest([_runs_of(host, int(port))])

    run_dir = find_run(target, config.runs_dir)
    live = LiveRun(run_dir)
    live.refresh()
    ended = live.ended
    live.close()
    if ended:
        raise TraceMLError(f"run {run_dir.name} has ended. Its verdict: {report_command(run_dir)}")

    return run_dir


def _places(config: Config) -> list[Path]:
    """Return the folders of runs to search: that of the settings, then that of a running aggregator."""
    served = auth.discover(config.port)
    places = [config.runs_dir.absolute()]
    if served is not None and served.runs_dir:
        places.append(Path(served.runs_dir))

    return list(dict.fromkeys(places))


def _runs_of(host: str, port: int) -> Path:
    served = auth.discover(port)
    if served is None or not served.runs_dir:
        raise RunNotFoundError(
            f"you have no aggregator at {host}:{port} on this host. If it is on another host, run this command there"
        )

    return Path(served.runs_dir)


def _newest(places: list[Path]) -> Path:
    infos: list[RunInfo] = []
    for place in places:
        infos += list_runs(place)
        running = [info for info in infos if info.state == RunStatus.RUNNING]
        if running:
            return max(running, key=_age).path

    where = " or ".join(map(str, places))
    hint = "Start one with `traceml run SCRIPT`, or name the folder of its runs with --runs-dir"
    if infos:
        latest = max(infos, key=_age)
        hint = f"The latest, {latest.id}, has ended ({latest.state}): {report_command(latest.path)}"

    raise RunNotFoundError(f"no job is running in {where}. {hint}")


def _age(info: RunInfo) -> tuple[float, str]:
    return info.started or 0.0, info.id


def _aggregator_facts(run_dir: Path) -> dict[str, Any]:
    """Return the facts of the aggregator that writes a run; a run that has just begun gets them in a moment."""
    deadline_s = time.monotonic() + _CONNECT_S
    while True:
        with StoreReader(run_dir / STORE_NAME) as reader:
            facts: dict[str, Any] = reader.meta().get("aggregator", {})

        if facts:
            return facts

        if time.monotonic() > deadline_s:
            raise TraceMLError(f"the aggregator of run {run_dir.name} has stored nothing yet: try again in a moment")

        time.sleep(_POLL_S)


def aggregator_of(run_dir: Path, config: Config, command: str) -> Connection:
    """Connect to the aggregator that has a run open.

    Raises:
        TraceMLError: it runs on another host, or no longer, or does not answer.
    """
    joined = joined_run(run_dir.name)
    if joined is not None and joined.run_id == run_dir.name:
        hello = Hello(role="client", run=joined.run_id)
        return connect(joined.host, joined.port, hello, joined.token, timeout_s=_CONNECT_S, tls=joined.tls)

    facts = _aggregator_facts(run_dir)
    host, pid = str(facts.get("host", "")), facts.get("pid")
    if host != socket.gethostname():
        raise TraceMLError(f"the aggregator of run {run_dir.name} runs on host {host}: run `traceml {command}` there")

    served = auth.published_by(pid) if isinstance(pid, int) else None
    if served is None:
        raise TraceMLError(
            f"the aggregator of run {run_dir.name} (pid {pid}) no longer runs, or belongs to another user. "
            f"The last state of the run: {report_command(run_dir.name)}"
        )

    known = address_of(run_dir.parent, served.port)
    tls = config.tls or (known is not None and known.port == served.port and known.tls)
    hello = Hello(role="client", run=run_dir.name)
    try:
        return connect(reachable(served.host), served.port, hello, served.token, timeout_s=_CONNECT_S, tls=tls)
    except AggregatorUnavailableError as error:
        if error.refused:
            raise

        raise TraceMLError(
            f"the aggregator of run {run_dir.name} (pid {pid}) did not answer within {_CONNECT_S:g} s: it was stopped "
            f"by a signal, or its host is overloaded. The last state of the run: {report_command(run_dir.name)}"
        ) from error
