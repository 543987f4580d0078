"""`traceml sync`: upload what a tracker is still missing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from traceml.aggregator.recovery_lock import RecoveryLock
from traceml.aggregator.unfinished_runs import finish_flights, finish_run
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.database.flight.flight_owner import silent_elsewhere
from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import merge_wal
from traceml.database.store.store_file import last_written_s
from traceml.display.report_files import refresh_reports, write_reports
from traceml.errors import PluginError, RunNotFoundError, TraceMLError, UsageError
from traceml.formatting import plural, printable, shell_quoted
from traceml.renderers.text.viewport import plain_console
from traceml.renderers.wording import tracker_text
from traceml.run_folder import STORE_NAME
from traceml.runs.find import find_run, list_runs, why_unreadable
from traceml.runs.report.report_types import TrackerSection
from traceml.runs.run_state import UNREADABLE_STATES, is_watched
from traceml.settings import Config
from traceml.track.delivery.delivery_plan import DeliveryPlan
from traceml.track.delivery.delivery_process import DeliveryProcess
from traceml.track.delivery.record_reader import logged_rows
from traceml.track.filters import delivery_settings
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN, check_name
from traceml.track.rank.announcement import check_options, refuse_secrets
from traceml.track.rank.tracker_places import moved_options, place_options
from traceml.track.tracker_state import DeliveryPhase, TrackerState, locked

__all__ = ["SYNC_STALL_LIMIT_S", "main"]

EXIT_UNDELIVERED = 3
_POLL_S = 0.1
_ENDING_S = 3.0  # a script may have ended a moment ago, and its aggregator is about to end the run
_SILENT_S = 60.0  # with --ended: a network filesystem shows writes of another host within that time
# A tracker that accepts nothing for this long, neither failing nor in a long call, is skipped.
SYNC_STALL_LIMIT_S = 120.0
_PRINTED = ("backend", "state", "delivered", "pending", "failed", "error", "fallback")


@dataclass(frozen=True)
class SyncOptions(RunsDirOptions):
    """Upload what a tracker is still missing.

    For runs whose tracker was down; with --backend also to a tracker that a run did not use.

    Exits with 3 when something could not be delivered: it stays in the run, for another try.
    """

    runs: Annotated[tuple[str, ...], Positional("[RUN ...]")] = ()
    """Folders or ids of runs (default: all that have something to deliver)."""
    backend: Annotated[tuple[str, ...], Metavar("NAME")] = ()
    """Only these trackers, also ones that the run did not use, with options and addresses of the present settings."""
    json: bool = False
    """Print the result as JSON and nothing else."""
    wait: bool = False
    """Wait for runs that are still running, instead of leaving them to their aggregator."""
    ended: bool = False
    """Treat all jobs of the folder as ended: also store what ranks on other hosts left in it, and end its runs whose
    aggregators were there."""
    from_dir: Annotated[str | None, Metavar("DIR")] = None
    """Store here what ranks of this other folder of runs left in memory, where that folder cannot be written."""


def main(argv: list[str]) -> int:
    """Deliver; return 0, or 3 when something is left."""
    options = parse(SyncOptions, argv, prog="traceml sync")
    config = options.config
    if options.backend and not options.runs:
        *names, last = options.backend
        if names and last not in BUILT_IN[PluginType.BACKEND] and _is_run(last, config.runs_dir):
            raise UsageError(f"RUN comes before --backend: traceml sync {last} --backend {' '.join(names)}")

    outcomes: list[tuple[str, TrackerSection]] = []
    console = plain_console(stderr=True)
    has_stored = _store_left(options, config)
    for run_dir in _wanted(options, config):
        try:
            found = _sync(run_dir, options, config, console)
        except UsageError:
            raise
        except TraceMLError as error:
            if options.runs:
                raise

            _warn(str(error))
            continue

        outcomes += found
        if not options.json:
            _print(found)

    if options.json:
        rows = [{"run": run, **{name: getattr(tracker, name) for name in _PRINTED}} for run, tracker in outcomes]
        print(json.dumps(rows, indent=2))
    elif not outcomes and has_stored:
        named = [Path(options.from_dir)] if options.from_dir else []
        named += [config.runs_dir] if options.runs_dir is not None else []
        misspelt = next((folder for folder in named if not folder.is_dir()), None)
        print("Nothing to deliver" if misspelt is None else printable(f"There is no folder {misspelt}"))

    left = [
        each
        for _, each in outcomes
        if each.state != DeliveryPhase.DONE and (each.pending or each.state != DeliveryPhase.OPEN)
    ]
    return EXIT_UNDELIVERED if left or not has_stored else 0


def _store_left(options: SyncOptions, config: Config) -> bool:
    """Store what dead ranks left in memory; return whether nothing of it had to stay there."""
    if options.runs and not options.ended and options.from_dir is None:
        return True

    left_in = None if options.from_dir is None else Path(options.from_dir)
    found = finish_flights(config.runs_dir, _SILENT_S if options.ended else None, left_in=left_in)
    for run_dir in found.runs:
        _report_stored(run_dir)

    for path, why in found.failures.items():
        _warn(f"the rows in {path} are not stored, and stay there: {why}")

    if found.failures and left_in is None:
        folder = shell_quoted(str(config.runs_dir.absolute()))
        _warn(f"another folder can take them: `traceml sync --from-dir {folder} --runs-dir OTHER`")

    _warn_of_silent(left_in or config.runs_dir)
    return not found.failures


def _is_run(word: str, runs_dir: Path) -> bool:
    try:
        find_run(word, runs_dir)
    except RunNotFoundError:
        return False

    return True


def _wanted(options: SyncOptions, config: Config) -> Iterator[Path]:
    runs_dir = config.runs_dir
    if options.runs:
        yield from (find_run(run, runs_dir) for run in options.runs)
        return

    foreign, unreadable = [], []
    for info in reversed(list_runs(runs_dir)):
        if info.state == RunStatus.RUNNING and not options.wait and not _is_left(info.path, options):
            continue

        if info.state in UNREADABLE_STATES:
            unreadable.append(info)
        elif not (info.path / STORE_NAME).exists():  # only the report was kept
            continue
        elif info.path.stat().st_uid == os.geteuid():
            yield info.path.resolve()
        else:
            foreign.append(info.id)

    if unreadable:
        count, last = plural(len(unreadable), "run"), unreadable[-1]
        _warn(f"{count} that cannot be read left out: {last.id}: {why_unreadable(last.path)}")

    if foreign:
        _warn(
            f"{plural(len(foreign), 'run')} of other users left out ({foreign[-1]}): a delivery uses your keys, and "
            "imports the plugins that the run names. Name a run to deliver it all the same"
        )


def _warn_of_silent(runs_dir: Path) -> None:
    """Name the hosts whose ranks may live, as they were heard of within a day; their rows are left alone."""
    hosts = {str(snapshot.identity.get("host") or "an unknown host") for snapshot in silent_elsewhere(runs_dir)}
    if hosts:
        _warn(
            f"ranks on {', '.join(sorted(hosts))} left rows in {runs_dir}. They may still be running: this host cannot "
            "tell. Once their jobs have ended for a minute, `traceml sync --ended` stores the rows"
        )


def _warn(text: str) -> None:
    print(printable(f"traceml sync: {text}", lines=True), file=sys.stderr, flush=True)


def _sync(run_dir: Path, options: SyncOptions, config: Config, console: Console) -> list[tuple[str, TrackerSection]]:
    """Deliver one run to all its trackers at once; return its name with the state of each."""
    merge_wal(run_dir / STORE_NAME)  # a killed writer may have left a transaction, which a reader may not undo
    _finish(run_dir, options)
    with StoreReader(run_dir / STORE_NAME) as reader:
        processes = []
        for process in _processes(run_dir, reader, options, config):
            if _is_due(process):
                processes.append(process)
            elif options.runs and process.backend in options.backend:
                _warn(_delivered_text(process))

        if processes:
            logged = logged_rows(reader)
            _deliver(processes, logged, console)

    if processes:
        merge_wal(run_dir / STORE_NAME)
        refresh_reports(run_dir)

    return [(run_dir.name, _outcome(process, logged)) for process in processes]


def _is_left(run_dir: Path, options: SyncOptions) -> bool:
    """Whether the user says that all jobs have ended, and nothing shows that this one has not."""
    return options.ended and not _is_watched(run_dir, options)


def _is_watched(run_dir: Path, options: SyncOptions) -> bool:
    aggregator, written_s = _meta(run_dir).get("aggregator", {}), last_written_s(run_dir / STORE_NAME)
    return is_watched(aggregator, written_s, _SILENT_S) if options.ended else is_watched(aggregator, written_s)


def _finish(run_dir: Path, options: SyncOptions) -> None:
    """Check that a run is over, or wait for that, and add the rows that its dead ranks left."""
    until_s = time.monotonic() + _ENDING_S
    while not _is_ended(run_dir) and not _finish_unwatched(run_dir, options):
        if not options.wait and time.monotonic() > until_s:
            raise TraceMLError(
                f"run {run_dir.name} is still running: its aggregator delivers what it logs (--wait waits for its end)"
            )

        time.sleep(_POLL_S)


def _finish_unwatched(run_dir: Path, options: SyncOptions) -> bool:
    """Finish a run that has no aggregator; return whether it is over now."""
    with RecoveryLock.FINISH.held(run_dir.parent):
        if _is_ended(run_dir):
            return True
        if _is_watched(run_dir, options):
            return False

        is_over = finish_run(run_dir)

    if not is_over:
        raise TraceMLError(
            f"run {run_dir.name} no longer has an aggregator, but its ranks are still running: end them first"
        )

    _report_stored(run_dir)
    return True


def _is_ended(run_dir: Path) -> bool:
    return _meta(run_dir).get("run", {}).get("ended") is not None


def _meta(run_dir: Path) -> dict[str, Any]:
    with StoreReader(run_dir / STORE_NAME) as reader:
        return reader.meta()


def _report_stored(run_dir: Path) -> None:
    write_reports(run_dir)
    print(f"{run_dir.name}: stored what its ranks left in memory", file=sys.stderr, flush=True)


def _processes(run_dir: Path, reader: StoreReader, options: SyncOptions, config: Config) -> Iterator[DeliveryProcess]:
    plan = DeliveryPlan(reader, run_dir)
    plan.refresh()
    asked, is_own = plan.backends(), plan.is_own
    for backend in options.backend or asked:
        if backend not in asked:
            _check_backend(backend)

        # Who names a plugin wants its code; who names a run, or nothing, may not know what is in it.
        is_wanted = backend in options.backend and backend not in BUILT_IN[PluginType.BACKEND]
        installed_only = not (is_own or is_wanted)
        start = partial(
            DeliveryProcess, run_dir, backend, once=True, nice=0, installed_only=installed_only, profile=config.debug
        )
        own = config.backend_options.get(backend, {})
        announced = asked[backend].options(backend) if backend in asked else {}
        wrong, is_named = _wrong_option(backend, announced), backend in options.backend
        moved = None
        if is_named:
            present = {**own, **place_options(backend, own)}
            moved = present if wrong else moved_options(backend, announced, own)

        if backend in asked and moved is None:
            process = start(announced)
            if wrong and process.state.phase is not DeliveryPhase.DONE:
                _warn(
                    f"{wrong}. The run has stored this; traceml sync {run_dir.name} --backend {backend} "
                    "takes the present settings"
                )

            yield process
        else:
            own = own if moved is None else moved
            refuse_secrets({backend: own})
            yield start(own, forced=own, settings=delivery_settings(config))


def _wrong_option(backend: str, announced: Mapping[str, Any]) -> str:
    """Return what is wrong with the options that a run has stored for a tracker; empty if nothing is."""
    try:
        check_options(backend, announced)
    except PluginError as error:
        return str(error)

    return ""


def _check_backend(name: str) -> None:
    """Refuse a misspelled tracker: its state would make the run's report list it as broken."""
    try:
        check_name(PluginType.BACKEND, name)
    except PluginError as error:
        raise UsageError(f"--backend: {error}") from error


def _is_due(process: DeliveryProcess) -> bool:
    """Whether there is something to deliver; a tracker that failed before gets all its tries again."""
    with locked(process.run_dir, process.backend) as is_locked:
        state = process.state
        if state.phase is DeliveryPhase.DONE:
            return False
        if is_locked:
            state.retries, state.retry_at, state.phase = 0, 0.0, DeliveryPhase.STARTING
            state.save(process.run_dir)

    return True


def _delivered_text(process: DeliveryProcess) -> str:
    """Return where a tracker that was asked for has everything: present settings may name another place."""
    run_dir, backend, target = process.run_dir, process.backend, process.state.target
    path = shell_quoted(str(TrackerState.path_in(run_dir, backend)))
    return (
        f"{backend} has all of {run_dir.name} already{f', at {target}' if target else ''}. To deliver it to another "
        f"place too, remove {path} before"
    )


def _deliver(processes: Sequence[DeliveryProcess], logged: int, console: Console) -> None:
    try:
        with _progress(console, processes, logged) as show:
            while any(not process.over for process in processes):
                for process in processes:
                    process.poll()
                    if process.is_given_up or process.is_stuck(SYNC_STALL_LIMIT_S):
                        process.stop()

                show()
                time.sleep(_POLL_S)
    finally:
        for process in processes:
            process.stop()
        for process in processes:
            process.join()


@contextlib.contextmanager
def _progress(console: Console, processes: Sequence[DeliveryProcess], logged: int) -> Iterator[Any]:
    """Show a bar per tracker on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda: None
        return

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {
            process: bars.add_task(f"{process.run_dir.name} {process.backend}", total=logged) for process in processes
        }

        def show() -> None:
            for process, task in tasks.items():
                bars.update(task, completed=min(process.state.passed, logged))

        yield show


def _outcome(process: DeliveryProcess, logged: int) -> TrackerSection:
    state = process.state
    return TrackerSection(
        backend=process.backend,
        state=str(state.phase),
        delivered=state.delivered,
        pending=state.pending(logged),
        failed=state.failed,
        error=state.error,
        fallback=state.fallback,
        derived=state.derived,
    )


def _print(outcomes: Sequence[tuple[str, TrackerSection]]) -> None:
    for run, tracker in outcomes:
        text = tracker_text(tracker, most_chars=len(tracker.error))  # whole: its end says what to do
        print(printable(f"{run}: {text}"), file=sys.stdout, flush=True)
