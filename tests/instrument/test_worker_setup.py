"""Loader workers that are spawned or forked and stand still: their lines are told."""

from __future__ import annotations

import threading
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from tests.eventually import eventually
from tests.instrument.conftest import Traced
from traceml.database.snapshots.rank_snapshot import WorkerSnapshot
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


@pytest.mark.process
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_line_of_a_worker_that_inherits_nothing(
    traced: Traced, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It registers by itself; the user's function for workers runs too, and is the loader's again."""
    set_forkserver_preload(["torch"])  # for both forms of the clock
    monkeypatch.chdir(tmp_path)
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
    assert traced.instrumentation.clock.errors == 0
