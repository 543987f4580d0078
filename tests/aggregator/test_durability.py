"""Guarantees when the aggregator is killed, and when its disk is full."""

from __future__ import annotations

import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.aggregator.conftest import Serving, step_rows, wait_for_acks
from tests.eventually import eventually
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError
from traceml.transport.client import Connection

KILLS = 30
RANKS = 10
FRAME_ROWS = 25


class Training(threading.Thread):
    """A rank that appends rows and sends them as the recorder does: from where the welcome says, after every loss."""

    def __init__(self, aggregator: Serving, rank: int) -> None:
        super().__init__()
        self.aggregator, self.rank = aggregator, rank
        self.appended = 0
        self.acked = 0
        self.reconnects = 0
        self.over = threading.Event()

    def run(self) -> None:
        connection, sent = None, 0
        while not (self.over.is_set() and self.acked == self.appended):
            if not self.over.is_set():
                self.appended += FRAME_ROWS

            try:
                if connection is None:
                    connection = self.aggregator.rank(self.rank, RANKS)
                    self.acked = sent = connection.acked.get("steps", 0)
                    self.reconnects += 1

                while sent < self.appended:
                    count = min(FRAME_ROWS, self.appended - sent)
                    connection.send_rows("steps", sent, count, step_rows(sent, count))
                    sent += count

                connection.receive(0.02)
                self.acked = connection.acked.get("steps", 0)
            except (ConnectionError, AggregatorUnavailableError):
                if connection is not None:
                    connection.close()
                    connection = None

        assert connection is not None
        connection.finish("finished", timeout_s=60)


def test_thirty_kills_lose_nothing_and_double_nothing(serving):
    """SIGKILL of the aggregator at random moments under load: every row of every rank is stored exactly once."""
    aggregator = serving()
    ranks = [Training(aggregator, rank) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()

    def reconnects() -> int:
        return sum(rank.reconnects for rank in ranks)

    chance, before = random.Random(7), 0
    for _ in range(KILLS):
        # On a busy machine none may be back so soon, and the kills would be of an aggregator without ranks.
        eventually(lambda before=before: reconnects() > before, "a rank to be back")
        time.sleep(chance.uniform(0.0, 0.25))
        before = reconnects()
        aggregator.kill()
        aggregator.start()

    for rank in ranks:
        rank.over.set()

    for rank in ranks:
        rank.join(240)
        assert not rank.is_alive()

    eventually(lambda: aggregator.state() == "finished")
    assert len(aggregator.run_dirs) == 1
    assert reconnects() > KILLS
    with aggregator.store() as store:
        numbers = {record.rank: record.id for record in store.streams()}
        assert len(numbers) == len(store.streams()) == RANKS
        for rank in ranks:
            assert store.rows("steps", [numbers[rank.rank]])["step"].tolist() == [*range(rank.appended)]

        assert store.lost("steps") == 0


def test_full_disk_holds_the_ranks_back_and_loses_nothing(serving, tiny_disk):
    """While the disk is full nothing is acknowledged; with space again everything is stored, once."""
    disk = tiny_disk(2 << 20)
    aggregator = serving(folder=disk / "runs")
    rank = aggregator.rank()
    rank.send_rows("steps", 0, 10, step_rows(0, 10))
    wait_for_acks(rank, "steps", 10)
    ballast = fill(disk)

    sent, received = 10, []
    while "trying again" not in aggregator.log.read_text():
        rank.send_rows("steps", sent, 1000, step_rows(sent, 1000))
        sent += 1000
        received += rank.receive(0.05)

    told = eventually(lambda: [each for each in [*received, *rank.receive(0.2)] if each["t"] == "stalled"])
    assert "database or disk is full" in told[0]["why"]
    stuck = rank.acked["steps"]
    assert stuck < sent
    assert aggregator.process.poll() is None
    ballast.unlink()

    wait_for_acks(rank, "steps", sent)
    assert "can be written again" in aggregator.log.read_text()
    assert rank.finish("finished", timeout_s=60)
    eventually(lambda: aggregator.state() == "finished")
    with aggregator.store() as store:
        assert store.rows("steps")["step"].tolist() == [*range(sent)]


def test_rank_that_leaves_while_the_disk_is_full(serving, tiny_disk):
    """A rank that says bye then is answered when there is space; the run ends after that."""
    disk = tiny_disk(2 << 20)
    aggregator = serving(folder=disk / "runs")
    rank = aggregator.rank()
    ballast = fill(disk)
    rank.send_rows("steps", 0, 4000, step_rows(0, 4000))
    rank.send({"t": "bye", "reason": "finished"})
    eventually(lambda: "trying again" in aggregator.log.read_text())

    ballast.unlink()

    assert eventually(lambda: any(message["t"] == "bye" for message in rank.receive(0.2)))
    rank.close()
    eventually(lambda: aggregator.state() == "finished")
    with aggregator.store() as store:
        assert store.stored("steps") == 4000


def test_newcomer_to_a_full_disk_may_come_again(serving, tiny_disk):
    """A run that cannot be begun for want of space is refused for now, not for good."""
    disk = tiny_disk(2 << 20)
    aggregator = serving(folder=disk / "runs")
    ballast = fill(disk)
    for _ in range(3):
        with pytest.raises(AggregatorUnavailableError, match=r"cannot accept this process: .* full\. Free some space"):
            _dial(aggregator)

    assert len(aggregator.run_dirs) == 1
    log = aggregator.log.read_text()
    assert log.count("WARNING") == log.count("WARNING refused rank") == 1
    ballast.unlink()
    _dial(aggregator).close()
    assert len(aggregator.run_dirs) == 1


def test_the_aggregator_of_a_run_starts_on_a_full_disk(serving, tiny_disk):
    """It tells ranks the reason, and begins its run once there is space."""
    disk = tiny_disk(2 << 20)
    (disk / "runs").mkdir()
    ballast = fill(disk)
    aggregator = serving("--run-id", "named", folder=disk / "runs")
    with pytest.raises(AggregatorUnavailableError, match=r"named.* full\. Free some space"):
        _dial(aggregator, run_id="named")

    ballast.unlink()
    _dial(aggregator, run_id="named").close()
    assert [path.name for path in aggregator.run_dirs] == ["named"]


def test_folder_that_cannot_be_written_is_a_reason(serving, tmp_path):
    """Where no run can be created, `init` is refused with the folder's name and the reason."""
    aggregator = serving()
    shutil.rmtree(aggregator.folder)
    aggregator.folder.write_text("a file where the folder was")

    with pytest.raises(AggregatorRefusedError, match=f"{aggregator.folder}.*Not a directory"):
        _dial(aggregator)


def _dial(aggregator: Serving, run_id: str = "") -> Connection:
    from tests.aggregator.conftest import TOKEN
    from traceml.transport.hello import Hello

    hello = Hello(role="rank", run="job", run_id=run_id, recorder="r")
    return Connection.connect("127.0.0.1", aggregator.port, hello, TOKEN, timeout_s=60)


def fill(disk: Path) -> Path:
    """Fill a filesystem; return the file to remove."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue

    return ballast
