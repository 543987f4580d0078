"""Removal of runs that have ended."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from traceml.database.states import RunStatus
from traceml.errors import StoreError, TraceMLError
from traceml.ids import is_new_run_id
from traceml.run_folder import RELAY_NAME, STORE_NAME
from traceml.runs.find import RunInfo, describe_run, list_runs
from traceml.runs.run_labels import read_labels
from traceml.track.tracker_state import DeliveryPhase, states_of
from traceml.trusted_files import replace_link

__all__ = ["check_removable", "is_delivered", "prune", "remove_ended", "remove_run"]


def prune(runs_dir: Path, keep: int) -> list[RunInfo]:
    """Remove all but the newest `keep` runs of this user; return what was removed.

    Runs that are running, that people gave a tag, such as baseline, or whose trackers or center are still missing data,
    are kept. What may be no run is neither counted nor removed.
    """
    own = [info for info in list_runs(runs_dir) if info.path.stat().st_uid == os.geteuid() and _is_run(info)]
    old = own[max(keep, 0) :]
    ended = [info for info in old if info.state != RunStatus.RUNNING and not read_labels(info.path).tags]
    removed = [info for info in ended if is_delivered(info.path) and not _waits_for_center(info.path)]
    for info in removed:
        remove_run(info.path)

    return removed


def check_removable(infos: Sequence[RunInfo]) -> None:
    """Raise if any of these is still running, or may be no run.

    Raises:
        TraceMLError: with the id of the run.
    """
    for info in infos:
        if not _is_run(info):
            raise TraceMLError(f"{info.path} may not be a run's folder: remove it by other means. Nothing was removed")

        if info.state == RunStatus.RUNNING:
            raise TraceMLError(
                f"run {info.id} is still running: end its job before removing it. If its host or container is gone, "
                "`traceml sync --ended` ends it. Nothing was removed"
            )


def remove_ended(infos: Sequence[RunInfo]) -> None:
    """Remove runs with everything in their folders.

    Raises:
        TraceMLError: one of them still runs, or may be no run; nothing was removed then.
        StoreError: a file cannot be removed.
    """
    infos = [describe_run(info.path) for info in infos]  # one may have started again since it was listed
    check_removable(infos)
    for info in infos:
        try:
            remove_run(info.path)
        except OSError as error:
            raise StoreError(f"cannot remove {info.path}: {error.strerror or error}") from error


def _is_run(info: RunInfo) -> bool:
    """Whether a folder is a run's, by its id or its store: other programs write a `report.json` or `store.db`, too."""
    return is_new_run_id(info.path.name) or (info.state != "damaged" and (info.path / STORE_NAME).is_file())


def is_delivered(run_dir: Path) -> bool:
    """Return whether every tracker of a run has received everything that was logged."""
    from traceml.database.store.reader import StoreReader  # imports numpy
    from traceml.track.delivery.delivery_plan import requested_backends

    done = {state.backend for state in states_of(run_dir) if state.phase is DeliveryPhase.DONE or state.fallback_done}
    try:
        with StoreReader(run_dir / STORE_NAME) as reader:
            return requested_backends(reader, run_dir) <= done
    except StoreError:
        return True  # what cannot be read cannot be delivered


def _waits_for_center(run_dir: Path) -> bool:
    """Return whether another aggregator, to which a run is sent, does not have all of it."""
    try:
        return json.loads((run_dir / RELAY_NAME).read_bytes())["sent"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False  # as the next aggregator, which sends it only by such a file


def remove_run(path: Path) -> None:
    """Remove the folder of a run; the link `latest` next to it points at the newest one that is left, if there is one.

    It gets another name first: a page or an aggregator that opens the store meanwhile would make files in the folder.
    """
    with TemporaryDirectory(prefix=".removed-", dir=path.parent) as place:
        path.rename(Path(place, path.name))

    latest = path.parent / "latest"
    if not latest.is_symlink() or latest.exists():
        return

    if left := list_runs(path.parent):
        replace_link(latest, left[0].id)
    else:
        latest.unlink()
