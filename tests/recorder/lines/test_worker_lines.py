"""Lines of loader workers: sampled in the workers, whatever started them, and rows of the rank."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from torch.utils.data import DataLoader, Dataset

from tests.eventually import eventually
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import LINE_WORKERS, LINES
from traceml.inspection.switch_interval import switch_interval
from traceml.instrument import install
from traceml.recorder.lines import worker_lines
from traceml.recorder.lines.sampled_place import SampledPlace
from traceml.recorder.lines.worker_lines import WorkerLines, WorkerSampling

INTERVAL_S = 0.02
pytestmark = pytest.mark.process


def decode() -> None:
    """Take a while, as the work of a sample does."""
    until_s = time.perf_counter() + 0.02
    while time.perf_counter() < until_s:
        pass


class Photos(Dataset):
    """A data set with slow samples."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        decode()
        return index


@pytest.fixture
def flight(tmp_path: Path) -> Iterator[FlightFile]:
    """A flight file in a folder of its own."""
    made = FlightFile.create(tmp_path, {"rank": 0})
    yield made
    made.close(unlink=True)


def functions_of(flight: FlightFile) -> Counter[str]:
    """Return the samples of workers in the rows, by the function of the user's code."""
    ring, log, counts = flight.ring("lines"), flight.log("names"), Counter[str]()
    unpacker = msgpack.Unpacker()
    unpacker.feed(log.read(0, log.appended))
    names = {row["id"]: row["name"] for row in unpacker}
    for row in LINES.struct.iter_unpack(ring.take(0, ring.appended).data):
        named = dict(zip((column.name for column in LINES.columns), row, strict=True))
        if named["phase"] == LINE_WORKERS:
            counts[names.get(named["line_id"], "").rpartition(" ")[2]] += named["samples"]

    return counts


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_work_of_workers_has_its_line(flight: FlightFile, method: str) -> None:
    """Nearly all samples are in the function that takes the time; none is of a worker that waits for an order."""
    lines = WorkerLines(flight, lambda: False, INTERVAL_S)
    hooks = install(flight, in_worker=lines.sampling)
    try:
        iterator = iter(DataLoader(Photos(), batch_size=2, num_workers=2, multiprocessing_context=method))

        def seen() -> bool:
            next(iterator)
            lines(False)
            return functions_of(flight)["decode"] >= 20

        eventually(seen, "samples of the workers")
    finally:
        hooks.uninstall()

    counts = functions_of(flight)
    assert counts["decode"] > 0.8 * (counts.total() - counts[""])


def test_idle_workers_have_no_samples(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose batches are not taken waits for an order."""
    monkeypatch.setattr(worker_lines, "_ROWS_S", 0.0)
    lines = WorkerLines(flight, lambda: False, INTERVAL_S)
    hooks = install(flight, in_worker=lines.sampling)
    try:
        iterator = iter(DataLoader(Photos(), num_workers=1, prefetch_factor=2))
        next(iterator)
        time.sleep(1.5)  # the batches that it may make in advance take 40 ms
        lines(False)
        made = functions_of(flight).total()
        time.sleep(2.5)
        lines(True)
    finally:
        hooks.uninstall()

    assert functions_of(flight).total() == made


def test_workers_of_an_evaluation_do_not_count(flight: FlightFile) -> None:
    """What arrives while an evaluation runs is no work for a step."""
    lines = WorkerLines(flight, lambda: True, INTERVAL_S)
    os.write(lines.sampling.pipe, b'["train.py:3 decode", "", 7]\n')

    lines(False)

    assert functions_of(flight) == {}


def test_rows_are_added_up_over_messages_that_arrive_in_pieces(flight: FlightFile) -> None:
    """A message may be read in two parts; workers of one line are one row."""
    lines = WorkerLines(flight, lambda: False, INTERVAL_S)
    for part in (b'["train.py:3 decode", "", 7]\n["train.py:3 dec', b'ode", "", 2]\n["", "PIL.py:1 load", 1]\n'):
        os.write(lines.sampling.pipe, part)
        lines(False)

    lines(True)
    assert functions_of(flight) == {"decode": 9, "": 1}
    assert flight.ring("lines").appended == 2


def test_a_pipe_that_the_script_has_closed_is_not_touched(flight: FlightFile, tmp_path: Path) -> None:
    """Its number may be that of a file of the script."""
    lines = WorkerLines(flight, lambda: False, INTERVAL_S)
    number = lines._pipe.number
    os.close(number)
    (tmp_path / "own").write_bytes(b'["train.py:3 decode", "", 7]\n')
    own = os.open(tmp_path / "own", os.O_RDONLY)
    assert own == number

    lines(True)

    assert functions_of(flight) == {}
    assert os.read(own, 1) == b"["
    os.close(own)


def test_the_pipe_is_closed_with_the_recording(flight: FlightFile) -> None:
    """A process may record many times."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    lines = WorkerLines(flight, lambda: False, INTERVAL_S)
    os.write(lines.sampling.pipe, b'["train.py:3 decode", "", 7]\n')

    lines(True)

    assert functions_of(flight) == {"decode": 7}
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.timeout(60)
def test_sampling_ends_with_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipe is closed: the worker's thread ends."""
    read, write = os.pipe2(os.O_NONBLOCK)
    os.close(read)
    monkeypatch.setattr(worker_lines, "_worker_place", lambda *_: SampledPlace(decode.__code__, 1, None))
    try:
        WorkerSampling(os.getpid(), 0, 0.001)._run(write, threading.get_ident())
    finally:
        switch_interval.restore()
        os.close(write)


def test_a_worker_goes_on_where_it_cannot_be_sampled(caplog: pytest.LogCaptureFixture) -> None:
    """The rank's descriptors may be out of reach; each worker would warn of it."""
    before = threading.active_count()

    WorkerSampling(os.getpid(), 10_000, 0.001)()

    assert threading.active_count() == before
    assert caplog.text == ""
