"""Loader workers that are spawned or forked and stand still: their lines are told."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from tests.eventually import eventually
from tests.forked import client as forked
from tests.instrument.conftest import FEW_ROWS
from traceml.database.flight.flight import FlightFile
from traceml.database.snapshots.rank_snapshot import WorkerSnapshot
from traceml.instrument import install
from traceml.instrument.workers.loader_workers import follow_iterator
from traceml.recorder.no_progress.worker_snapshots import WorkerSnapshots

STUCK = "lock.acquire()  # STUCK"


class Waiting(Dataset):
    """A data set whose second sample never comes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 1:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()  # STUCK

        return index


def touch(worker: int) -> None:
    """Be the user's own worker_init_fn."""
    assert worker == 0
    Path("touched").touch()


def look_at_a_worker(method: str) -> None:
    """See that it registers by itself."""
    flight = FlightFile.create(Path("flight"), {}, capacities=FEW_ROWS)
    instrumentation = install(flight)
    loader = DataLoader(Waiting(), num_workers=1, multiprocessing_context=method, worker_init_fn=touch)
    iterator = iter(loader)
    follow_iterator(iterator)
    assert loader.worker_init_fn is touch
    next(iterator)

    def stuck() -> WorkerSnapshot | None:
        (found,) = WorkerSnapshots(None, 10.0).make(60.0, id(iterator))
        return found if found.frames and found.frames[0].function == "__getitem__" else None

    found = eventually(stuck, "the stack of the worker")
    source = Path(__file__).read_text().splitlines()
    assert source[found.frames[0].line - 1].strip() == STUCK
    assert (found.waits_for_batch, found.start_method) == (1, method)
    assert Path("touched").exists()
    assert found.frames[-1].function == "_worker_loop"
    assert instrumentation.clock.errors == 0
    instrumentation.uninstall()
    flight.close(unlink=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an exception
    iterator._workers[0].kill()
    iterator._workers[0].join()


@pytest.mark.process
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("native", ["1", "0"])
def test_the_line_of_a_worker_that_inherits_nothing(method: str, native: str, tmp_path: Path) -> None:
    """It registers by itself; the user's function for workers runs too, and is the loader's again."""
    code = f"import os; os.environ['TRACEML_NATIVE'] = '{native}'; from {__name__} import look_at_a_worker; "
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
    done = forked.run_code(f"{path}{code}look_at_a_worker({method!r})", cwd=tmp_path, forks=True, text=True)

    assert done.returncode == 0, done.stderr
