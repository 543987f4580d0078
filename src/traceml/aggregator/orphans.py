"""Runs that lost their aggregator before they were over: finished here, with what their dead ranks left behind."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

from traceml.aggregator.recovery import Found, dead_flights
from traceml.aggregator.registry import Registry, prepare_runs_dir
from traceml.aggregator.run import Run
from traceml.database.flight import FALLBACK_FOLDER, default_folder, find_flights, is_alive, read_flight
from traceml.database.store import STORE_NAME, StoreReader
from traceml.errors import StoreError
from traceml.ids import new_run_id
from traceml.transport.server import RefusedError

__all__ = ["finish_orphan", "take_in_lost_flights"]

_log = logging.getLogger("traceml")


def finish_orphan(run_dir: Path) -> bool:
    """Finish a run that nobody looks after any more; return whether it is over now.

    A run with a rank that lives is left alone: it may find another aggregator.

    Raises:
        StoreError: its store cannot be written, or an aggregator is at it.
    """
    with closing(StoreReader(run_dir / STORE_NAME)) as reader:
        facts = reader.meta().get("run", {})

    if facts.get("ended") is not None:
        return True

    run = Run(run_dir, str(facts.get("job", run_dir.name)), named=bool(facts.get("named")))
    return _finish(run, Registry(run_dir.parent))


def take_in_lost_flights(runs_dir: Path) -> list[Path]:
    """Make runs of what dead ranks logged that never reached any aggregator; return their folders.

    Raises:
        StoreError: a run's folder cannot be written.
    """
    lost: dict[str, list[Found]] = {}
    for found in _dead(runs_dir):
        lost.setdefault(found.job, []).append(found)

    made = []
    registry = Registry(runs_dir)
    for job, flights in lost.items():
        if _is_known(registry, job):
            continue  # it has a run: `finish_orphan` takes them in

        prepare_runs_dir(runs_dir)
        try:
            run = registry.begin(new_run_id(str(flights[0].image.identity.get("name") or "run")), job, named=False)
        except RefusedError as error:
            raise StoreError(str(error)) from error

        if _finish(run, registry):
            made.append(run.path)

    return made


def _finish(run: Run, registry: Registry) -> bool:
    for found in dead_flights(run.key, run.path.parent / FALLBACK_FOLDER, but=run.recovered):
        run.adopt(found)

    run.look_around()
    if any(not stream.ended and stream.seen_here for stream in run.streams):
        run.close()
        return False

    run.give_up_waiting(None)
    if not run.end():
        run.close()
        return False

    registry.over(run)
    return True


def _dead(runs_dir: Path) -> list[Found]:
    """Return the flight files of dead ranks that hold something which was logged for a run in this folder."""
    found = []
    for folder in (default_folder(), runs_dir / FALLBACK_FOLDER):
        for path in find_flights(folder):
            if is_alive(path):
                continue

            try:
                flight = Found(path, read_flight(path))
            except (StoreError, ValueError, TypeError) as error:
                _log.debug("cannot use a flight file: %s", error)
                continue

            if str(flight.image.identity.get("runs_dir", "")) == str(runs_dir.absolute()):
                found.append(flight)

    return found


def _is_known(registry: Registry, job: str) -> bool:
    """Whether a run of this job is in the folder, open or over."""
    for path in registry.runs_dir.glob("*"):
        if path.is_symlink() or not (path / STORE_NAME).is_file():
            continue

        try:
            with closing(StoreReader(path / STORE_NAME)) as reader:
                if reader.meta().get("run", {}).get("job") == job:
                    return True
        except StoreError:
            continue

    return False
