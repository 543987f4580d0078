"""Lines of loader workers: sampled in the workers, whatever started them, and rows of the rank."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.eventually import eventually
from tests.forked import client as forked
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import LINE_WORKERS, LINES
from traceml.inspection.switch_interval import switch_interval
from traceml.instrument import install
from traceml.instrument.workers.loader_workers import worker_pids
from traceml.recorder.lines import worker_lines
from traceml.recorder.lines.sampled_place import SampledPlace
from traceml.recorder.lines.worker_lines import WorkerLines, WorkerSampling
from traceml.trusted_files import GuardedDescriptor

INTERVAL_S = 0.02
# Those that inherit nothing take longer to start than all else: one of them shows as much as two.
WORKERS = {"fork": 2, "spawn": 1, "forkserver": 1}
pytestmark = pytest.mark.process


def ignore(*_: object, **__: object) -> None:
    """Take an info row that a test does not look at."""


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


def rows_of(flight: FlightFile) -> Iterator[dict[str, int]]:
    """Yield the rows of lines."""
    ring = flight.ring("lines")
    for row in LINES.struct.iter_unpack(ring.read_from(0, ring.appended).data):
        yield dict(zip((column.name for column in LINES.columns), row, strict=True))


def functions_of(flight: FlightFile) -> Counter[str]:
    """Return the samples of workers in the rows, by the function of the user's code."""
    log, counts, unpacker = flight.log("names"), Counter[str](), msgpack.Unpacker()
    unpacker.feed(log.read(0, log.appended))
    names = {row["id"]: row["name"] for row in unpacker}
    for row in rows_of(flight):
        if row["phase"] <= LINE_WORKERS:
            counts[names.get(row["line_id"], "").rpartition(" ")[2]] += row["samples"]

    return counts


def end(iterator: Any) -> None:
    """End the workers: in the middle of an epoch they may abort, as their queue's thread is in torch's C++ code."""
    with suppress(RuntimeError):
        iterator._shutdown_workers()


def see_the_line(folder: str, method: str, loader_type: type[DataLoader[Any]]) -> None:
    """See that nearly all samples are in `decode`."""
    flight = FlightFile.create(Path(folder), {"rank": 0})
    set_forkserver_preload(["torch"])
    lines = WorkerLines(flight, worker_pids, INTERVAL_S, note=ignore)
    hooks = install(flight, in_worker=lines.sampling)
    try:
        iterator = iter(
            loader_type(Photos(), batch_size=2, num_workers=WORKERS[method], multiprocessing_context=method)
        )

        def seen() -> bool:
            next(iterator)
            lines(False)
            return functions_of(flight)["decode"] >= 60  # the first, dense ones may be of imports by the first batch

        eventually(seen, "samples of the workers")
        lines(True)
        end(iterator)
    finally:
        hooks.uninstall()

    counts = functions_of(flight)
    assert counts["decode"] > 0.8 * (counts.total() - counts[""])
    flight.close(unlink=True)


@pytest.mark.parametrize("loader_type", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_work_of_workers_has_its_line(tmp_path: Path, method: str, loader_type: type[DataLoader[Any]]) -> None:
    """Nearly all samples are in the function that takes the time; none is of a worker that waits for an order."""
    name = loader_type.__name__
    code = f"from {__name__} import {name}, see_the_line; see_the_line({str(tmp_path)!r}, {method!r}, {name})"
    done = forked.run_code(code, cwd=Path(__file__).parents[3], forks=True, text=True)  # forks what is spawned, too

    assert done.returncode == 0, done.stderr


class Requests(Photos):
    """A data set whose samples wait for a server."""

    def __getitem__(self, index: int) -> int:
        time.sleep(0.2)  # after which it may wait for a busy core
        return index


@pytest.mark.parametrize(("data", "computes"), [(Photos(), True), (Requests(), False)])
def test_computing_is_told_from_waiting(flight: FlightFile, data: Photos, *, computes: bool) -> None:
    """Within a second, which a worker of a short epoch lives for; waiting for a busy core counts as computing."""
    lines = WorkerLines(flight, worker_pids, INTERVAL_S, note=ignore)
    hooks = install(flight, in_worker=lines.sampling)
    try:
        iterator = iter(DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="fork"))

        def watched_ns() -> int:
            next(iterator)
            lines(False)
            return sum(sums[1] for sums in lines._counts.values())

        eventually(lambda: watched_ns() > 5e8, "half a second of making batches")
        lines(True)
        end(iterator)
    finally:
        hooks.uninstall()

    rows = [row for row in rows_of(flight) if row["phase"] <= LINE_WORKERS]
    ready = sum(row["cpu_ns"] for row in rows) / sum(row["watched_ns"] for row in rows)
    assert ready > 0.8 if computes else ready < 0.5


def test_a_worker_that_waits_between_batches_is_idle(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches are taken later than it makes them. While none is taken, it is not known to wait for the next one."""
    monkeypatch.setattr(worker_lines, "_ROWS_S", 0.0)
    lines = WorkerLines(flight, worker_pids, INTERVAL_S, note=ignore)
    hooks = install(flight, in_worker=lines.sampling)
    try:
        iterator = iter(DataLoader(Photos(), num_workers=1, prefetch_factor=2))

        def idle() -> int:
            lines(False)
            return functions_of(flight)[""]

        def has_made_all() -> bool:
            idle()
            before = functions_of(flight)["decode"]
            time.sleep(0.7)
            idle()
            return 0 < before == functions_of(flight)["decode"]

        next(iterator)
        eventually(has_made_all, "the batches in advance")
        before = idle()
        time.sleep(0.7)
        assert idle() == before

        def took() -> bool:
            next(iterator)
            time.sleep(0.1)
            return idle() > before + 5

        eventually(took, "idle samples")
        end(iterator)
    finally:
        hooks.uninstall()
        lines.close()


class Group(NamedTuple):
    """Workers of one loader."""

    loader: int
    pids: tuple[int, ...]


def test_workers_have_the_number_of_their_loader(flight: FlightFile) -> None:
    """A loader of an evaluation is another one; of a process that is no worker any more, nothing counts."""
    groups = [Group(0, (11,)), Group(2, (22, 23))]
    lines = WorkerLines(flight, lambda: groups, INTERVAL_S, note=ignore)  # type: ignore[arg-type,return-value]
    for pid in (11, 22, 23, 99):
        os.write(lines.sampling.number, b'[%d, "train.py:3 decode", "", 7, 0, 0]\n' % pid)

    lines(True)

    rows = list(rows_of(flight))
    assert sorted((row["phase"], row["samples"]) for row in rows) == [(LINE_WORKERS - 2, 14), (LINE_WORKERS, 7)]


def test_how_often_each_worker_made_a_batch_is_noted(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noted again when it is more than twice as much, and at the end; what a worker waited for counts for none."""
    monkeypatch.setattr(worker_lines, "_ROWS_S", 0.0)
    noted: list[tuple[int, list[int]]] = []
    groups = [Group(0, (21, 22, 23)), Group(4, (31,))]

    def take(_kind: str, **fields: Any) -> None:
        noted.append((fields["number"], fields["samples"]))

    lines = WorkerLines(flight, lambda: groups, INTERVAL_S, note=take)  # type: ignore[arg-type,return-value]
    lines._due_s = 0.0
    for pid, line, library, samples in (
        (22, "train.py:3 decode", "", 7),
        (22, "", "", 50),
        (31, "train.py:9 other", "", 1),
        (21, "", "PIL.py:1 load", 6),
        (22, "train.py:3 decode", "", 90),
        (23, "train.py:3 decode", "", 1),
    ):
        os.write(
            lines.sampling.number, b'[%d, "%s", "%s", %d, 0, 0]\n' % (pid, line.encode(), library.encode(), samples)
        )
        lines(False)

    lines(True)
    assert noted == [(0, [0, 7]), (4, [1]), (0, [6, 97]), (0, [6, 97, 1])]


def test_rows_are_added_up_over_messages_that_arrive_in_pieces(flight: FlightFile) -> None:
    """A message may be read in two parts; workers of one line are one row."""
    lines = WorkerLines(flight, lambda: [Group(0, (11,))], INTERVAL_S, note=ignore)  # type: ignore[list-item]
    for part in (
        b'[11, "train.py:3 decode", "", 7, 50, 40]\n[11, "train.py:3 dec',
        b'ode", "", 2, 9, 3]\n[11, "", "PIL.py:1 load", 1, 0, 0]\n',
    ):
        os.write(lines.sampling.number, part)
        lines(False)

    lines(True)
    assert functions_of(flight) == {"decode": 9, "": 1}
    assert [(row["watched_ns"], row["cpu_ns"]) for row in rows_of(flight)] == [(59, 43), (0, 0)]
    assert flight.ring("lines").appended == 2


def test_a_pipe_that_the_script_has_closed_is_not_touched(flight: FlightFile, tmp_path: Path) -> None:
    """Its number may be that of a file of the script."""
    lines = WorkerLines(flight, worker_pids, INTERVAL_S, note=ignore)
    number = lines._pipe.number
    os.close(number)
    (tmp_path / "own").write_bytes(b'["train.py:3 decode", "", 7, 0, 0]\n')
    own = os.open(tmp_path / "own", os.O_RDONLY)
    assert own == number

    lines(True)

    assert functions_of(flight) == {}
    assert os.read(own, 1) == b"["
    os.close(own)


def test_the_pipe_is_closed_with_the_recording(flight: FlightFile) -> None:
    """A process may record many times."""
    lines = WorkerLines(flight, lambda: [Group(0, (11,))], INTERVAL_S, note=ignore)  # type: ignore[list-item]
    ends = lines._pipe.number, lines.sampling.number
    os.write(lines.sampling.number, b'[11, "train.py:3 decode", "", 7, 0, 0]\n')

    lines(True)

    assert functions_of(flight) == {"decode": 7}
    assert [Path(f"/proc/self/fd/{end}").exists() for end in ends] == [False, False]


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, WorkerSampling]]:
    """The end for reading of a pipe, and the sampling of a worker that always makes a batch and writes into it."""
    monkeypatch.setattr(worker_lines, "_worker_place", lambda *_: SampledPlace(decode.__code__, 1, None))
    monkeypatch.setattr(worker_lines, "_FLUSH_S", 0.0)
    monkeypatch.setattr(worker_lines, "MAX_SLEEP_S", worker_lines.MIN_SLEEP_S)
    read, write = os.pipe2(os.O_NONBLOCK)
    status = os.fstat(write)
    yield read, WorkerSampling(os.getpid(), write, (status.st_dev, status.st_ino), 0.001)

    switch_interval.restore()
    for end in (read, write):
        with suppress(OSError):
            os.close(end)


@pytest.mark.timeout(60)
def test_sampling_ends_with_the_rank(sampling: tuple[int, WorkerSampling]) -> None:
    """Its pipe is closed, or nobody reads what is written, as with a worker that has the other end, too."""
    read, started = sampling
    os.set_blocking(started.number, False)
    with suppress(BlockingIOError):
        while True:
            os.write(started.number, b"x" * 4096)

    started._run(GuardedDescriptor(os.dup(started.number)), threading.get_ident(), threading.get_native_id())
    os.close(read)
    started._run(GuardedDescriptor(os.dup(started.number)), threading.get_ident(), threading.get_native_id())


def test_a_file_of_the_script_is_not_written_to(sampling: tuple[int, WorkerSampling], tmp_path: Path) -> None:
    """The script may have closed the pipe, and have a file under its number."""
    _, started = sampling
    own = os.open(tmp_path / "log.txt", os.O_WRONLY | os.O_CREAT)

    replace(started, number=own)._run(GuardedDescriptor(own), threading.get_ident(), threading.get_native_id())

    assert (tmp_path / "log.txt").read_bytes() == b""


def test_a_worker_goes_on_where_it_cannot_be_sampled(caplog: pytest.LogCaptureFixture) -> None:
    """The rank's descriptors may be out of reach; each worker would warn of it."""
    before = set(threading.enumerate())

    WorkerSampling(os.getpid(), 10_000, (0, 0), 0.001)()

    assert set(threading.enumerate()) <= before  # one of an earlier test may have ended
    assert caplog.text == ""
