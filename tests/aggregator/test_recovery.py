"""What dead ranks leave is found and stored, wherever it lies; what others planted is not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.aggregator.conftest import Serving
from tests.track.conftest import Script, Stored, finish, runs_in, script  # noqa: F401 - a fixture
from traceml.aggregator import recovery
from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.recovery import dead_flights
from traceml.aggregator.unfinished_runs import finish_flights, finish_run
from traceml.clock import boot_time_s, monotonic_ns
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import FALLBACK_FOLDER, default_folder, find_flights
from traceml.database.flight.postmortem import read_flight
from traceml.database.store.reader import StoreReader
from traceml.database.store.run_clocks import RunClocks
from traceml.diagnosis.kinds import Kind
from traceml.run_folder import COPIES_FOLDER, STORE_NAME
from traceml.runs.report.report import build_report

KILLED = """
    import os, pathlib, time, traceml
    traceml.init(on_missing="warn", connect_timeout=0.1)
    for i in range(60_000):
        traceml.log_metric("loss", float(i), i)
        if i == 30_000:
            traceml.log_metric("late", 1.0, 0)
    pathlib.Path("model.bin").write_bytes(b"weights" * 1000)
    traceml.log_artifact("model.bin", "best")
    # The copy gets its name last, when its row is written.
    while not list(pathlib.Path("traceml_runs").glob(".flights/*.files/[!.]*")):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""
KILLED_EARLY = """
    import os, traceml
    traceml.init(on_missing="warn", connect_timeout=0.1)
    traceml.log_metric("loss", 0.5, 7)
    os.kill(os.getpid(), 9)
"""
# Each life of the process traces some steps and becomes the next one.
LIVES = """
    import os, sys, traceml
    recorder = traceml.init(on_missing="warn", connect_timeout=0.1)
    traceml.log_metric("life", float(sys.argv[1]))
    if sys.argv[1] < "3":
        os.execv(sys.executable, [sys.executable, *sys.argv[:-1], str(int(sys.argv[1]) + 1)])
    os.kill(os.getpid(), 9)
"""
# It is killed in a function, once a sample has seen it there.
KILLED_IN_A_LINE = """
    import os, traceml
    from traceml.clock import process_start_ticks
    from traceml.database.flight.flight_folders import default_folder
    from traceml.database.flight.postmortem import FlightSnapshot
    traceml.init(on_missing="warn", connect_timeout=0.1)
    traceml.log_metric("loss", 0.5, 7)
    mine = f"{os.getpid()}-{process_start_ticks(os.getpid())}-*"
    (path,) = default_folder().glob(mine)
    def load():
        while FlightSnapshot(path, path.read_bytes()).line_id < 0:
            pass
        os.kill(os.getpid(), 9)
    with traceml.trace_step():
        load()
"""
TICK_S = 0.1  # the kernel counts starts of processes in hundredths


@pytest.fixture
def earlier() -> set[Path]:
    """Return the flight files in memory before the test, of which some may be of an ended process with a reused pid."""
    return set(find_flights(default_folder()))


def test_rows_on_disk_are_stored_after_a_reboot(script: Script, earlier: set[Path], tmp_path: Path) -> None:  # noqa: F811
    """Memory is empty then: values that had left it, with their names, and a copied file become a run."""
    process = script(KILLED)
    finish(process, -signal.SIGKILL)
    runs_dir = tmp_path / "traceml_runs"
    (in_memory,) = set(find_flights(default_folder(), pid=process.pid)) - earlier
    (claim,) = find_flights(runs_dir / FALLBACK_FOLDER)
    in_memory.unlink()
    rewrite_boot(claim)

    (run_dir,) = finish_flights(runs_dir).runs

    stored = Stored(run_dir)
    values = stored.values("loss")
    assert values == [float(i) for i in range(len(values))]
    assert len(values) > 40_000  # the rest was in memory
    assert stored.values("late") == [1.0]
    (artifact,) = stored.of("artifact")
    assert (run_dir / artifact["path"]).read_bytes() == b"weights" * 1000
    assert list((runs_dir / FALLBACK_FOLDER).iterdir()) == []
    assert finish_flights(runs_dir).runs == []


def test_dates_of_a_rank_that_never_connected_are_right(
    script: Script,  # noqa: F811
    earlier: set[Path],
    tmp_path: Path,
) -> None:
    """Its rows have stamps of a clock, perhaps of another boot, whose relation to the date the file tells."""
    process = script(KILLED)
    finish(process, -signal.SIGKILL)
    (in_memory,) = set(find_flights(default_folder(), pid=process.pid)) - earlier
    in_memory.unlink()

    (run_dir,) = finish_flights(tmp_path / "traceml_runs").runs

    (stream,) = Stored(run_dir).streams
    now_ns = RunClocks([stream]).from_monotonic(stream.id, monotonic_ns())
    assert abs(now_ns - time.time_ns()) < 60e9


def test_a_run_that_is_found_later_took_as_long_as_its_process(script: Script, tmp_path: Path) -> None:  # noqa: F811
    """Neither its start nor its end is the moment at which its rows are stored, perhaps days later."""
    before_s = time.time()
    finish(script(KILLED_EARLY), -signal.SIGKILL)
    after_s = time.time()

    (run_dir,) = finish_flights(tmp_path / "traceml_runs").runs

    with StoreReader(run_dir / STORE_NAME) as reader:
        run = reader.meta()["run"]
    assert before_s - TICK_S <= run["started"] <= run["ended"] <= after_s


def test_a_killed_rank_is_told_with_the_line_that_was_seen_last(script: Script, tmp_path: Path) -> None:  # noqa: F811
    """Its flight file has the line of its last sample."""
    process = script(KILLED_IN_A_LINE)
    finish(process, -signal.SIGKILL)

    (run_dir,) = finish_flights(tmp_path / "traceml_runs").runs

    # A machine that stood still has stopped it, which is another finding.
    (ended,) = (each for each in build_report(run_dir).findings if each.kind is Kind.RANK_LOST)
    assert "last seen at" in ended.summary
    assert "load" in ended.summary
    assert ended.evidence["function"] == "load"


def test_the_rank_that_started_an_aggregator_is_killed_before_it_connects(
    script: Script,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The aggregator looks for its rows while it waits for it, stores them, and ends."""
    serving = Serving(tmp_path / "traceml_runs", tmp_path / "serve.log", "--exit-when-idle")
    try:
        finish(script(KILLED_EARLY), -signal.SIGKILL)

        assert serving.process.wait(240) == 0
        (run_dir,) = runs_in(serving.folder)
        assert Stored(run_dir).values("loss") == [0.5]
    finally:
        serving.stop()
        serving.sock.close()


def test_each_life_of_a_process_that_calls_exec_has_its_own_file(
    script: Script,  # noqa: F811
    earlier: set[Path],
    tmp_path: Path,
) -> None:
    """Pid and start time stay the same; every file is in memory, and nothing is said about space."""
    process = script(LIVES, 1)
    _, errors = process.communicate(timeout=240)

    assert process.returncode == -signal.SIGKILL
    assert len(set(find_flights(default_folder(), pid=process.pid)) - earlier) == 3
    assert "flight file" not in errors
    finish_flights(tmp_path / "traceml_runs")
    lives = sorted(value for run_dir in runs_in(tmp_path / "traceml_runs") for value in Stored(run_dir).values("life"))
    assert lives == [1.0, 2.0, 3.0]
    assert set(find_flights(default_folder(), pid=process.pid)) <= earlier


@pytest.mark.needs("root")
def test_what_another_user_planted_in_a_shared_folder_is_left_alone(tmp_path: Path) -> None:
    """A pipe, a flight file that names the victim's folders, and its journals: nothing is read, run or removed."""
    runs_dir, precious = tmp_path / "shared", tmp_path / "precious.files"
    precious.mkdir(mode=0o700)
    (precious / "thesis").write_text("text")
    planted = runs_dir / FALLBACK_FOLDER
    facts = {"journal": [str(tmp_path / "precious")], "runs_dir": str(runs_dir), "job": "j", "recorder": "r"}
    flight = FlightFile.create(planted, facts)
    flight.log("logged").append({"kind": "text"})
    flight.close(unlink=False)
    os.mkfifo(planted / "77-77-0.flight")
    for path in (planted, *planted.iterdir()):
        os.chown(path, 12345, -1)

    assert finish_flights(runs_dir).runs == []

    assert (precious / "thesis").read_text() == "text"
    assert len(list(planted.iterdir())) == 2
    assert runs_in(runs_dir) == []


@pytest.mark.parametrize("run_dir", ["..", "a/../..", "x y"])
def test_a_run_folder_outside_of_the_runs_folder_is_not_believed(tmp_path: Path, run_dir: str) -> None:
    """The name of a run's folder is a plain name: an unpacked archive cannot make us write elsewhere."""
    folder = tmp_path / "runs" / FALLBACK_FOLDER
    flight = FlightFile.create(folder, {"run_dir": str(tmp_path / "runs") + "/" + run_dir, "job": "j"})
    flight.log("logged").append({"kind": "text"})
    flight.close(unlink=False)

    assert dead_flights("j", tmp_path / "runs") == []
    assert finish_flights(tmp_path / "runs").runs == []
    assert flight.path is not None
    assert flight.path.exists()


def test_a_rank_whose_run_id_can_be_no_folder_gets_a_run(tmp_path: Path) -> None:
    """An aggregator refused it. What it left must not end every later aggregator of the folder."""
    facts = {"run_id": "..", "job": "..", "name": "train", "runs_dir": str(tmp_path)}
    flight = FlightFile.create(tmp_path / FALLBACK_FOLDER, facts)
    flight.log("logged").append({"kind": "text", "name": "note", "text": "hello"})
    flight.close(unlink=False)

    (run_dir,) = finish_flights(tmp_path).runs

    assert "-train-" in run_dir.name
    assert [row["text"] for row in Stored(run_dir).of("text")] == ["hello"]


def test_a_lost_run_gets_what_other_hosts_have_sent(tmp_path: Path) -> None:
    """An agent sent the flight file of a rank that died; then the aggregator was lost before it ended the run."""
    run_dir = tmp_path / "20260101-000000-train-abcd"
    ActiveRun(run_dir, "j", named=False).close()
    flight = FlightFile.create(run_dir / COPIES_FOLDER, {"run_id": run_dir.name, "job": "j", "name": "train"})
    flight.log("logged").append({"kind": "text", "name": "note", "text": "hello"})
    flight.close(unlink=False)

    assert finish_run(run_dir)

    assert [row["text"] for row in Stored(run_dir).of("text")] == ["hello"]
    assert find_flights(run_dir / COPIES_FOLDER) == []


@pytest.mark.parametrize("is_own", [True, False])
def test_only_files_of_the_folder_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_own: bool
) -> None:
    """The memory of a host has flight files of every folder, and of every version of traceml on it."""
    memory, runs_dir = tmp_path / "memory", tmp_path / "runs"
    memory.mkdir(mode=0o700)
    monkeypatch.setattr("traceml.aggregator.recovery.default_folder", lambda: memory)
    facts = {"run_dir": str((runs_dir if is_own else tmp_path / "others") / "20260101-a"), "job": "j"}
    flight = FlightFile.create(memory, facts)
    flight.close(unlink=False)
    assert flight.path is not None
    data = flight.path.read_bytes()
    assert b"total_ns" in data
    flight.path.write_bytes(data.replace(b"total_ns", b"total_xx"))  # a column of another version

    assert dead_flights("j", runs_dir) == []
    assert ("columns that this version" in caplog.text) == is_own


def test_of_other_jobs_the_header_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's memory keeps the files of all jobs, and each run that ends looks for its own."""
    read: list[Path] = []
    monkeypatch.setattr(
        recovery, "read_flight", lambda path, runs_dir: read.append(path) or read_flight(path, runs_dir)
    )
    memory, folder = tmp_path / "memory", tmp_path / "runs" / FALLBACK_FOLDER
    memory.mkdir(mode=0o700)
    monkeypatch.setattr(recovery, "default_folder", lambda: memory)  # the host's has what other tests have left
    for job in ("other", "j"):
        FlightFile.create(folder, {"job": job}).close(unlink=False)

    (found,) = dead_flights("j", tmp_path / "runs")

    assert found.job == "j"
    assert read == [found.path]


def test_of_other_folders_the_header_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's memory keeps the files of all folders, and each aggregator that starts looks for those of its own."""
    read: list[Path] = []
    monkeypatch.setattr(
        recovery, "read_flight", lambda path, runs_dir: read.append(path) or read_flight(path, runs_dir)
    )
    memory, runs_dir = tmp_path / "memory", tmp_path / "runs"
    memory.mkdir(mode=0o700)
    monkeypatch.setattr(recovery, "default_folder", lambda: memory)
    for facts in (
        {"runs_dir": str(tmp_path / "others")},
        {"runs_dir": str(tmp_path / "others"), "run_dir": str(runs_dir / "20260101-a")},
        {"runs_dir": str(runs_dir), "run_dir": str(tmp_path / "others" / "20260101-b")},
        {"runs_dir": str(runs_dir)},
    ):
        FlightFile.create(memory, facts | {"job": "j"}).close(unlink=False)

    found = dead_flights(None, runs_dir)

    assert sorted(read) == sorted(flight.path for flight in found)
    assert [flight.folder for flight in found] == [runs_dir, runs_dir]


def rewrite_boot(path: Path) -> None:
    """Make a file look as if an earlier boot of this machine had written it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().encode()
    data = path.read_bytes()
    assert data.count(boot) == 1
    path.write_bytes(data.replace(boot, b"0" * len(boot)))
    then_s = boot_time_s() - 60
    with path.open("r+b") as file:
        file.seek(24)
        file.write((1).to_bytes(8, "little") + int(then_s * 1e9).to_bytes(8, "little"))
        file.seek(128 + 21 * 8)
        file.write((2).to_bytes(8, "little"))

    os.utime(path, (then_s, then_s))
