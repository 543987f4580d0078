"""`traceml serve`: an aggregator for scripts that call `traceml.init()`, one run after another or many at once."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from traceml import settings
from traceml.aggregator.aggregator import Aggregator
from traceml.aggregator.alerts.alert_targets import targets_of
from traceml.aggregator.alerts.finding_alerts import FindingAlerts
from traceml.aggregator.alerts.finding_profiles import FindingProfiles
from traceml.aggregator.relay.upstream import Upstream
from traceml.cli.options.number_range import PORT, NumberRange
from traceml.cli.options.parsing import CommandParser
from traceml.cli.options.shared_options import add_prometheus_option
from traceml.fail_open import fail_open
from traceml.helper_programs import helper_program
from traceml.loopback import is_loopback
from traceml.privacy.masker import Masker
from traceml.process_ends import ignore_slurm_warnings
from traceml.run_folder import RELAY_NAME
from traceml.supervise.listen_address import listen
from traceml.supervise.metrics_process import metrics_beside
from traceml.supervise.otlp_process import otlp_beside
from traceml.supervise.page_process import DEFAULT_PORT as PAGE_PORT
from traceml.supervise.page_process import PageProcess
from traceml.supervise.report_process import BESIDE_RUNS, ReportProcess
from traceml.track.tracker_state import states_of
from traceml.transport import auth
from traceml.transport.folder_aggregator import AggregatorAddress, FolderLock, address_of, folder_id, reachable
from traceml.transport.server import BACKLOG, BatchSelector
from traceml.transport.tls import make_identity

__all__ = ["main", "make_parser"]

_EPILOG = """\
Training scripts with traceml.init() and the same runs folder on this host find it automatically.
Scripts on other hosts need --host 0.0.0.0 here, and TRACEML_HOST and TRACEML_TOKEN there.
--upstream sends merged rows to the center, the aggregator of all hosts, with its TRACEML_TOKEN.
--web prints the address of a page with all runs, running and ended.
--prometheus 0.0.0.0:29767 lets other hosts read the metrics, with a bearer token.
Scripts with another runs folder need TRACEML_PORT: then their runs are stored here.
Reports are written to the runs folder when runs end; `traceml report` prints them."""

_log = logging.getLogger("traceml")


def main(argv: list[str]) -> int:
    """Serve until stopped; return the exit status."""
    options = make_parser().parse_args(argv)
    ignore_slurm_warnings()
    given = {name: getattr(options, name) for name in ("host", "port", "runs_dir", "upstream")}
    config = settings.load(**{name: value for name, value in given.items() if value is not None})
    usual = "warning" if options.terminal else "info"  # log lines would disturb the screen
    level = config.log_level if config.sources["log_level"] != "default" else usual
    with _log_to_stderr(level), _listener(options.fd, config.host, config.port, config.runs_dir) as sock:
        host, port = sock.getsockname()[:2]
        token = config.token or _previous_token(port)
        # Where the job is over, somebody waits for its verdict.
        reports = ReportProcess(0 if options.exit_when_idle else BESIDE_RUNS)
        if options.exit_when_idle:
            import numpy.ma  # noqa: F401 - which both will need: 12 ms once, not twice

            with fail_open(_log, "aggregator", "the first report is not prepared"):
                reports.fork()

        aggregator = Aggregator(
            config.runs_dir,
            token,
            run_id=options.run_id,
            launcher_pid=options.launcher_pid,
            exit_when_idle=options.exit_when_idle,
            on_rank=reports.prepare if options.exit_when_idle else None,
            on_left=partial(_tell, options.ranks_fd) if options.ranks_fd is not None else None,
            on_mute=partial(_tell, options.ranks_fd) if options.ranks_fd is not None else None,
            on_run_finished=lambda run_dir: _log.info("report: %s", reports.write(run_dir)),
            on_run_delivered=partial(_clean_up, reports, keep=config.keep_runs),
            delivery_nice=config.delivery_nice,
            profiles_deliveries=config.debug,
            retention_gb=None if config.retention == "off" else config.retention,
            alerts=FindingAlerts(
                targets_of(config.on_finding, local_only=config.local_only),
                config.on_finding_after,
                masker=Masker(config.mask),
            ),
            profiles=FindingProfiles(config.profile_on_finding),
            # On loopback, the ranks of a launched run are on this host, or come through ssh.
            tls=make_identity() if config.tls and (options.run_id is None or not is_loopback(host)) else None,
        )
        with (
            contextlib.closing(reports),
            _companions(config, options, aggregator),
            _published(host, port, token, aggregator, _folder_lock(options, config.runs_dir)),
            asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(BatchSelector())) as runner,
        ):
            runner.run(aggregator.serve(sock, lambda: _announce_ready(options, host, port, aggregator)))

    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command, which completion uses too."""
    parser = CommandParser(
        prog="traceml serve",
        description="Start an aggregator: it stores the rows of training scripts, and diagnoses what limits them.",
        epilog=_EPILOG,
        allow_abbrev=True,
    )
    parser.add_argument("--host", help="address to listen on (127.0.0.1: this host only)")
    parser.add_argument("--port", type=PORT, help="port to listen on (29765; 0: a free one)")
    parser.add_argument("--runs-dir", metavar="DIR", help="folder of the runs (default: the setting runs_dir)")
    parser.add_argument(
        "--web", nargs="?", type=PORT, const=PAGE_PORT, metavar="PORT", help="also serve the web page (29766)"
    )
    add_prometheus_option(parser)
    parser.add_argument(
        "--upstream",
        metavar="HOST:PORT",
        help="also send merged rows to a center, the aggregator of all hosts",
    )
    parser.add_argument("--terminal", action="store_true", help="show the running job on this terminal")
    # For `traceml run` and `init(local=True)`, which start an aggregator with a bound socket.
    for number in ("--fd", "--folder-fd", "--ready-fd", "--ranks-fd", "--launcher-pid"):
        parser.add_argument(number, type=NumberRange(minimum=0), help=argparse.SUPPRESS)

    parser.add_argument("--run-id", help=argparse.SUPPRESS)
    parser.add_argument("--exit-when-idle", action="store_true", help=argparse.SUPPRESS)
    return parser


def _listener(fd: int | None, host: str, port: int, runs_dir: Path) -> socket.socket:
    if fd is not None:
        return socket.socket(fileno=fd)

    def way_out(other: auth.PublishedServer | None) -> str:
        is_ours = other is not None and folder_id(Path(other.runs_dir)) == folder_id(runs_dir) != []
        use = "Scripts of this folder use that one; to have two, choose" if is_ours else "Choose"
        return (
            f"{use} another address with --host or --port: --port 0 takes a free one, which scripts with the same "
            "runs_dir on this host find; others need TRACEML_PORT."
        )

    return listen(host, port, auth.AGGREGATOR, way_out, BACKLOG)


def _previous_token(port: int) -> str:
    """Return the token of a dead aggregator on this port, so that its ranks can reconnect; else a new one."""
    before = auth.discover(port, include_dead=True)
    return before.token if before is not None and not before.alive else auth.new_token()


def _folder_lock(options: argparse.Namespace, runs_dir: Path) -> FolderLock | None:
    """Return the right to be the runs folder's aggregator, None without it; that of one run never has it."""
    if options.folder_fd is not None:
        return FolderLock(options.folder_fd)
    if options.run_id is not None:
        return None

    try:
        lock = FolderLock.acquire(runs_dir)
    except OSError as error:
        _log.warning("the address cannot be written into %s; scripts need TRACEML_PORT: %s", runs_dir, error)
        return None

    if lock is None and options.fd is None:
        other = address_of(runs_dir, 0)
        where = f"at {other.host}:{other.port}" if other is not None else "that is starting"
        _log.warning(
            "%s has an aggregator already, %s: jobs of this folder go there while it runs. Set TRACEML_PORT to send "
            "them here", runs_dir.absolute(), where,
        )  # fmt: skip

    return lock


@contextlib.contextmanager
def _published(host: str, port: int, token: str, aggregator: Aggregator, lock: FolderLock | None) -> Iterator[None]:
    path: Path | str = ""
    try:
        path = auth.publish(host, port, token, runs_dir=str(aggregator.registry.runs_dir))
        _log.debug("the token is in %s", path)
    except OSError as error:
        _log.warning("the token file cannot be written; scripts need TRACEML_TOKEN: %s", error)

    if lock is not None:
        lock.publish(AggregatorAddress(reachable(host), port, str(path), aggregator.server.tls is not None))

    try:
        yield
    finally:
        auth.withdraw(port)
        if lock is not None:  # it is kept until the end of this process: the next one could not open our stores
            lock.publish(None)


def _announce_ready(options: argparse.Namespace, host: str, port: int, aggregator: Aggregator) -> None:
    if options.ready_fd is not None:
        os.write(options.ready_fd, f"{port}\n".encode())
        os.close(options.ready_fd)

    if options.fd is None:
        print(f"traceml aggregator at {host}:{port}, runs go to {aggregator.registry.runs_dir}", flush=True)


def _tell(descriptor: int, stuck: Mapping[str, Any] | None = None) -> None:
    """Write a line for the launcher, which may have died, or may not read.

    Args:
        stuck: facts of `stuck_line`; None: all ranks have said bye.
    """
    with contextlib.suppress(OSError):
        os.write(descriptor, (json.dumps(stuck) if stuck is not None else "").encode() + b"\n")


def _clean_up(reports: ReportProcess, run_dir: Path, *, keep: int | None) -> None:
    """Update the report, and remove old runs if `keep_runs` is set."""
    if states_of(run_dir):  # somebody waits for the end of the run: no import for nothing
        _update_trackers(reports, run_dir)

    if keep is not None:
        from traceml.runs.remove import prune

        for removed in prune(run_dir.parent, keep):
            _log.info("removed the old run %s", removed.id)


def _update_trackers(reports: ReportProcess, run_dir: Path) -> None:
    from traceml.run_folder import PAGE_NAME
    from traceml.runs.report.report import update_trackers

    if update_trackers(run_dir) and (run_dir / PAGE_NAME).exists():
        reports.write(run_dir, run_dir / PAGE_NAME)


@contextlib.contextmanager
def _log_to_stderr(level: int | str) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = _log.level, _log.propagate
    _log.addHandler(handler)
    _log.setLevel(settings.level_number(level))
    _log.propagate = False
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(before[0])
        _log.propagate = before[1]


@contextlib.contextmanager
def _background_thread(work: Callable[[Callable[[float], bool]], None], *, name: str) -> Iterator[None]:
    """Run `work` on a thread until the block ends; its argument waits some seconds, and returns True at the end."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended.wait,), name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _companions(config: settings.Config, options: argparse.Namespace, aggregator: Aggregator) -> Iterator[None]:
    """Run what was asked for beside the aggregator, in processes and threads of their own, and print addresses."""
    with contextlib.ExitStack() as stack:

        def keep_alive(restart_if_dead: Callable[[], object], name: str) -> None:
            stack.enter_context(_background_thread(partial(_keep_alive, restart_if_dead), name=name))

        if options.web is not None:
            page = stack.enter_context(PageProcess(config.runs_dir, options.web))
            print(f"traceml page at {page.address()}", flush=True)
            keep_alive(page.restart_if_dead, "traceml-page")

        announce = partial(print, flush=True)
        keep = stack.enter_context(metrics_beside(config.runs_dir, options.prometheus, config.token, announce))
        if options.prometheus is not None:
            keep_alive(keep, "traceml-metrics")

        if (exporter := stack.enter_context(otlp_beside(config, os.environ))) is not None:
            keep_alive(exporter.restart_if_dead, "traceml-otlp")

        if config.upstream is not None and options.run_id is None:  # that of a launched job has no other's token
            upstream = Upstream(config.upstream, aggregator.registry.runs_dir, config.token, tls=config.tls)
            send = partial(upstream.run, partial(_unsent_runs, aggregator))
            stack.enter_context(_background_thread(send, name="traceml-upstream"))

        if options.terminal:
            stack.enter_context(_background_thread(partial(_show_runs, aggregator), name="traceml-screen"))

        yield


def _keep_alive(restart_if_dead: Callable[[], object], ended: Callable[[float], bool]) -> None:
    while not ended(0.3):
        restart_if_dead()


def _unsent_runs(aggregator: Aggregator) -> list[Path]:
    """Return the open runs, and those that were over before they were seen here."""
    runs = aggregator.registry.runs
    return [run.path for run in runs if not run.ended or not (run.path / RELAY_NAME).exists()]


def _show_runs(aggregator: Aggregator, ended: Callable[[float], bool]) -> None:
    """Show each new run by `traceml top`, in a separate process: a slow terminal must not slow the store."""
    shown: set[Path] = set()
    top: subprocess.Popen[bytes] | None = None
    while not ended(0.3):
        runs = [run.path for run in aggregator.registry.open_runs if run.path not in shown]
        if runs and (top is None or top.poll() is not None):
            shown.add(runs[-1])
            top = subprocess.Popen(helper_program("traceml", "top", str(runs[-1])))

    if top is not None and top.poll() is None:
        top.terminate()
        top.wait()
