"""Finish runs that lost their aggregator, with the rows that their dead ranks left in flight files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.recovery_lock import RecoveryLock
from traceml.aggregator.registry import Registry
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME

__all__ = ["FinishedFlights", "finish_flights", "finish_run"]


def finish_run(run_dir: Path) -> bool:
    """Finish a run without an aggregator; return whether it is over now.

    A run with a live rank is left alone: the rank may find another aggregator. Call it with `RecoveryLock.FINISH`
    held since the run was seen to be open.

    Raises:
        StoreError: its store cannot be written, or an aggregator has it open.
    """
    with StoreReader(run_dir / STORE_NAME) as reader:
        facts = reader.meta().get("run", {})

    run = ActiveRun(run_dir, str(facts.get("job", run_dir.name)), named=bool(facts.get("named")))
    return _finish(run, Registry(run_dir.parent))


class FinishedFlights(NamedTuple):
    """Runs that are over now, and why those of other flight files cannot be opened."""

    runs: list[Path]
    failures: dict[Path, str]


def finish_flights(runs_dir: Path, silence_s: float | None = None, *, left_in: Path | None = None) -> FinishedFlights:
    """Store in a folder the rows that dead ranks of it, or of another one (`left_in`), left."""
    registry = Registry(runs_dir)
    if not registry.has_dead_flights(silence_s, left_in=left_in):  # perhaps there is no such folder
        return FinishedFlights([], registry.not_recovered)

    with RecoveryLock.FINISH.held(runs_dir):
        runs = [run.path for run in registry.recover_flights(silence_s, left_in=left_in) if _finish(run, registry)]

    return FinishedFlights(runs, registry.not_recovered)


def _finish(run: ActiveRun, registry: Registry) -> bool:
    run.recover_flights()
    run.check_absent()
    if any(not stream.ended and stream.seen_here for stream in run.streams):
        run.close()
        return False

    run.end_remaining(None)
    if not run.end():
        run.close()
        return False

    registry.mark_ended(run)
    return True
