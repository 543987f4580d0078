"""Loader workers that die for real, while a script is traced."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.eventually import eventually
from tests.instrument.conftest import Traced
from traceml.database.schema import Slot


class Dying(Dataset):
    """A data set whose tenth sample ends the process that reads it."""

    def __init__(self, end) -> None:
        self.end = end

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        if index == 10:
            self.end()

        return index


@pytest.fixture(autouse=True, scope="module")
def joined_soon() -> Iterator[None]:
    """Let torch wait a moment, in place of 5 s, for the other worker of one that has died: it ends that one then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
        yield
        gc.collect()


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def left() -> None:
    os._exit(3)


@pytest.mark.process
@pytest.mark.parametrize(
    ("end", "how", "method"),
    [
        (killed, {"signal": signal.SIGKILL}, "fork"),
        (left, {"code": 3}, "fork"),
        (killed, {"signal": signal.SIGKILL}, "forkserver"),
    ],
)
def test_a_worker_that_dies_is_noted_and_torch_raises_as_before(traced: Traced, end, how, method) -> None:
    """Process, number and signal or status are known, also where the script catches the exception."""
    options = {"batch_size": 2, "collate_fn": list}  # a tensor needs its worker
    with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
        list(DataLoader(Dying(end), num_workers=2, multiprocessing_context=method, **options))

    (lost,) = traced.instrumentation.lost_workers
    assert {name: lost.get(name) for name in how} == how
    assert (lost["worker"], lost["workers"]) == (1, 2)  # sample 10 is in batch 5
    assert str(lost["pid"]) in str(raised.value)
    assert traced.instrumentation.clock.errors == 0


@pytest.mark.process
def test_the_report_of_an_end_is_not_interrupted(traced: Traced) -> None:
    """A worker that dies when the script has failed is noted, and its exception is not raised in our code."""
    batches = iter(DataLoader(torch.randn(64, 4), batch_size=2, num_workers=1))
    traced.instrumentation.clock.open_slots[Slot.EXIT_START] = 1
    os.kill(batches._workers[0].pid, signal.SIGKILL)

    assert eventually(lambda: traced.instrumentation.lost_workers)


@pytest.mark.process
def test_workers_that_end_with_their_loader_are_not_lost(traced: Traced) -> None:
    """An epoch to its end, and an iterator that is dropped."""
    loader = DataLoader(torch.randn(64, 4), batch_size=2, num_workers=2)
    list(loader)
    next(iter(loader))

    assert not traced.instrumentation.lost_workers
