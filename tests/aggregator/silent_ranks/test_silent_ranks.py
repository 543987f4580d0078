"""Ranks whose recorder does not run: the aggregator of their host takes snapshots of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import traceml
from tests.aggregator.conftest import TOKEN, Serving
from tests.aggregator.test_registry import hello, registry  # noqa: F401
from tests.eventually import eventually
from traceml.aggregator.registry import Registry
from traceml.aggregator.silent_ranks.silent_ranks import SilentRanks, UnconnectedRanks
from traceml.clock import boot_id, process_start_ticks
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import default_folder, find_flights
from traceml.database.flight.postmortem import flight_identity
from traceml.database.snapshots.external_snapshots import ExternalSnapshots
from traceml.database.snapshots.rank_snapshot import SNAPSHOT, RankSnapshot
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.inspection.kernel_state import process_info
from traceml.runs.run import Run

pytestmark = pytest.mark.process


class Script:
    """A traced script in a process of its own."""

    def __init__(
        self, serving: Serving, folder: Path, code: str, stderr: int | None = None, inside: tuple[str, ...] = ()
    ) -> None:
        self.serving = serving
        script = folder / "script.py"
        script.write_text(textwrap.dedent(code))
        environ = {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")}
        environ |= {"TRACEML_PORT": str(serving.port), "TRACEML_TOKEN": TOKEN, "TRACEML_RUNS_DIR": str(serving.folder)}
        self.process = subprocess.Popen(
            [*inside, sys.executable, str(script)], env=environ, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def snapshots(self) -> list[RankSnapshot]:
        with self.serving.store() as store:
            return [RankSnapshot.from_row(event.data) for event in store.events() if event.kind == SNAPSHOT]

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def script(serving: Callable[..., Serving], tmp_path: Path):
    """Start a script; whatever happens it does not outlive the test."""
    started: list[Script] = []

    def start(code: str, stderr: int | None = None, inside: tuple[str, ...] = ()) -> Script:
        started.append(Script(serving(), tmp_path, code, stderr, inside))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.mark.parametrize(
    ("call", "state"), [("ctypes.PyDLL(None).sleep(600)", "S"), ("re.match('(a*)*b', 'a' * 40)", "R")]
)
def test_a_rank_that_holds_the_gil_in_c_is_reported_with_its_line(
    script: Callable[[str], Script], call: str, state: str
) -> None:
    """Its own thread cannot answer, so faulthandler does; whether it computes or waits, the kernel knows."""
    rank = script(
        f"""
        import ctypes, re, traceml
        traceml.init()

        def hold():
            print("ready", flush=True)
            {call}

        hold()
        """
    )

    snapshot = eventually(lambda: next((snapshot for snapshot in rank.snapshots() if snapshot.frames), None))

    assert (snapshot.answered, snapshot.process_state, snapshot.phase, snapshot.step) == (
        "signal",
        state,
        "startup",
        -1,
    )
    assert snapshot.user_line is not None
    assert (snapshot.user_line.function, snapshot.user_line.line) == ("hold", 7)
    assert snapshot.quiet_s >= 3
    assert rank.process.poll() is None


@pytest.mark.parametrize("call", ["ctypes.PyDLL(None).sleep(600)", "re.match('(a*)*b', 'a' * 40)"])
def test_a_rank_whose_thread_holds_the_gil_in_c_is_reported_with_that_thread(
    script: Callable[[str], Script], call: str
) -> None:
    """The main thread wakes now and then, and asks for the GIL. The other one leaves it a core on a busy machine."""
    rank = script(
        f"""
        import ctypes, os, re, threading, traceml
        traceml.init()

        def hold():
            os.nice(19); {call}

        other = threading.Thread(target=threading.Event().wait, daemon=True)
        other.start()
        print("ready", flush=True)
        threading.Thread(target=hold, daemon=True).start()
        while True:
            other.join(0.01)
        """
    )

    seen = eventually(lambda: next((each for each in rank.snapshots() if each.is_waiting_for_gil), None))

    assert (seen.answered, seen.process_state) == ("signal", "S")
    assert [thread.line and (thread.line.function, thread.line.line) for thread in seen.threads] == [("hold", 6)]


# The recorder's thread asks for the GIL, and gets no further than that until the gate is set.
_LATE_RECORDER = """\
from traceml.recorder.recorder_thread import RecorderThread
run, gate = RecorderThread._run, threading.Event()

def late(self):
    while not gate.wait(0.05):
        pass

    run(self)

RecorderThread._run = late
"""


def test_a_rank_whose_recorder_never_ran_is_told_with_its_line(script: Callable[[str], Script]) -> None:
    """C code takes the GIL before the recorder's thread has come to its first cycle."""
    rank = script(
        f"""
import ctypes, threading, traceml
{_LATE_RECORDER}traceml.init()
print("ready", flush=True)
ctypes.PyDLL(None).sleep(600)
"""
    )

    snapshot = eventually(lambda: next((each for each in rank.snapshots() if each.frames), None))

    assert (snapshot.answered, snapshot.step) == ("signal", -1)
    assert snapshot.user_line is not None
    assert snapshot.user_line.line == 15


JOB = f"never-connected-{os.getpid()}"  # no other test's: its flight file is found by it


_NEVER_CONNECTED = f"""
import ctypes, os, signal, threading
os.environ |= {{environ}}
from traceml.session.startup import start_for_script
{_LATE_RECORDER}signal.signal(signal.SIGUSR1, lambda *_: gate.set())
start_for_script()

def hold():
    print("ready", flush=True)
    ctypes.PyDLL(None).sleep(600)

hold()
while True:
    signal.pause()
"""


def _never_connected(**more: str) -> str:
    return _NEVER_CONNECTED.format(environ={"TRACEML_RUN_ID": JOB, "TRACEML_HANG_TIMEOUT": "5", **more})


def test_a_rank_that_never_connected_hangs_with_its_line(tmp_path: Path, serving: Callable[..., Serving]) -> None:
    """Nobody but its flight file tells that it belongs to the job: live, in the report, and to `traceml stacks`."""
    rank = Script(serving("--run-id", JOB), tmp_path, _never_connected())
    try:

        def hang() -> Finding | None:
            """The verdict. On a busy machine the first snapshots may have no stack."""
            found = (each for each in loaded(rank).findings if each.kind is Kind.HANG)
            return next((each for each in found if "in C code" in each.summary), None)

        verdict = eventually(hang, "the verdict")
        assert verdict.ranks == (0,)
        assert "in start-up, in C code called at script.py:20 hold that holds the GIL" in verdict.summary

        told = rank.serving.ask("stacks", run=JOB)
        assert [(each["rank"], each["pid"]) for each in told["ranks"]] == [(0, rank.process.pid)]
        assert rank.process.poll() is None
    finally:
        rank.end()


def test_a_rank_that_never_connected_is_ended_too(tmp_path: Path, serving: Callable[..., Serving]) -> None:
    """With `on_hang = "abort"`, which only its flight file tells; it cannot end itself."""
    rank = Script(serving("--run-id", JOB), tmp_path, _never_connected(TRACEML_ON_HANG="abort"))
    try:
        assert rank.process.wait(240) == -signal.SIGKILL
    finally:
        rank.end()


def test_a_rank_that_connects_late_was_only_slow(tmp_path: Path, serving: Callable[..., Serving]) -> None:
    """It joins the run in which it was missed, once, and its silence is over."""
    serves = serving()
    first = serves.rank(0, 2, run=JOB, run_id=JOB)
    rank = Script(serves, tmp_path, _never_connected(RANK="1", WORLD_SIZE="2"))
    try:
        eventually(lambda: any(each.frames for each in rank.snapshots()), "a snapshot of rank 1")

        def ended() -> RankSnapshot | None:
            rank.process.send_signal(signal.SIGUSR1)  # again, as another thread than the one in C may get it
            return next((each for each in rank.snapshots() if each.ended), None)

        over = eventually(ended, "its silence to end")
        assert over.rank == 1
        eventually(lambda: serves.ask("status")["runs"][0]["connected"] == 2, "rank 1 to connect")
        assert len(serves.run_dirs) == 1
    finally:
        rank.end()
        first.close("done")


def loaded(script: Script) -> Run:
    return traceml.load_run(script.serving.run_dirs[0])


def test_a_silent_rank_has_a_snapshot_from_before_its_job_is_ended(script: Callable[[str], Script]) -> None:
    """What is said afterwards is not as old as the snapshot before."""
    rank = script(
        """
        import ctypes, signal, traceml
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        traceml.init(on_hang="abort", hang_timeout=5)
        print("ready", flush=True)
        signal.sigwait({signal.SIGUSR1})
        ctypes.PyDLL(None).sleep(600)
        """
    )

    def knows_settings() -> bool:
        with rank.serving.store() as store:
            return any(row["kind"] == "process" for _, row in store.log_rows("info"))

    eventually(knows_settings)
    rank.process.send_signal(signal.SIGUSR1)
    last = eventually(lambda: next((snapshot for snapshot in rank.snapshots() if snapshot.is_last), None))

    assert last.answered in ("signal", "kernel")  # without a core its thread does not show that it waits for the GIL
    assert last.quiet_s >= 5
    assert rank.process.wait(240) != 0


def test_a_stopped_rank_is_reported_and_when_it_goes_on(script: Callable[[str], Script]) -> None:
    """A stopped process has no stack to tell, but the line that was sampled last; after SIGCONT it is unharmed."""
    rank = script(
        """
        import time, traceml
        traceml.init()
        print("ready", flush=True)
        with traceml.trace_step():
            while True:
                time.sleep(0.01)
        """
    )

    def sampled() -> dict[int, str]:
        with rank.serving.store() as store:
            names = {row["id"]: row["name"] for _, row in store.log_rows("names")}
            return {number: name for number, name in names.items() if "script.py:7 " in name}

    lines = eventually(sampled, "a sample of its line")
    rank.process.send_signal(signal.SIGSTOP)

    # An earlier one may be of a rank that had no core for seconds.
    snapshot = eventually(lambda: next((each for each in rank.snapshots() if each.process_state == "T"), None))
    assert (snapshot.answered, snapshot.frames) == ("kernel", ())
    assert snapshot.line_id in lines
    assert not snapshot.is_suspended

    rank.process.send_signal(signal.SIGCONT)
    over = eventually(lambda: next((each for each in rank.snapshots() if _ends(each, snapshot)), None))
    assert over.quiet_s >= 3
    assert rank.process.poll() is None


def _ends(snapshot: RankSnapshot, before: RankSnapshot) -> bool:
    return snapshot.ended and snapshot.at_ns > before.at_ns


def test_a_dead_rank_has_no_snapshot(script: Callable[[str], Script]) -> None:
    """Its parent has not collected it yet: it neither waits nor holds the GIL."""
    rank = script(
        """
        import time, traceml
        traceml.init()
        print("ready", flush=True)
        time.sleep(600)
        """
    )
    pid = rank.process.pid
    (flight,) = (path for path in find_flights(default_folder()) if flight_identity(path).get("pid") == pid)
    snapshots = ExternalSnapshots(0, pid, flight)
    assert snapshots.make() is not None

    rank.process.kill()
    eventually(lambda: process_info(pid).state == "Z", "the end of the rank")

    assert snapshots.make() is None


HOLDS = """
    import ctypes, traceml
    traceml.init()

    def hold():
        print("ready", flush=True)
        ctypes.PyDLL(None).sleep(600)

    hold()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes pid namespaces everywhere")
def test_a_rank_in_a_container_is_reported_with_its_line(script: Callable[..., Script]) -> None:
    """It has another number here, as have its threads: the lock of its flight file tells which."""
    rank = script(HOLDS, inside=("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"))

    snapshot = eventually(lambda: next((snapshot for snapshot in rank.snapshots() if snapshot.frames), None))

    assert (snapshot.answered, snapshot.process_state) == ("signal", "S")
    assert snapshot.user_line is not None
    assert snapshot.user_line.function == "hold"


def test_a_stack_stands_until_the_recorder_runs(
    script: Callable[[str], Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy host, or while its process dies, it may not be possible to ask again."""
    rank = script(HOLDS)
    pid = rank.process.pid
    (flight,) = (path for path in find_flights(default_folder()) if flight_identity(path).get("pid") == pid)
    snapshots = ExternalSnapshots(0, pid, flight)
    told = eventually(lambda: next((each for each in [snapshots.make()] if each and each.frames), None))
    monkeypatch.setattr("traceml.database.snapshots.external_snapshots.find_stack_file", lambda _pid: None)
    monkeypatch.setattr("traceml.database.snapshots.external_snapshots._AGAIN_S", 0.001)

    assert snapshots.make().frames == told.frames


def test_a_rank_that_answers_has_no_snapshot(script: Callable[[str], Script]) -> None:
    """A wait in Python lets the recorder run: it tells by itself, and nobody sends a signal."""
    rank = script(
        """
        import time, traceml
        traceml.init()
        print("ready", flush=True)
        time.sleep(600)
        """
    )

    def told_itself() -> bool:
        with rank.serving.store() as store:
            return any(row["kind"] == SNAPSHOT for _, row in store.log_rows("info"))

    eventually(told_itself)
    # One that had no core for seconds has not answered in time, and still got no signal.
    assert [each.answered for each in rank.snapshots() if each.answered != "kernel"] == []


def test_a_rank_before_a_full_pipe_tells_what_it_waits_on(script: Callable[..., Script]) -> None:
    """Nobody reads its standard error: it answers itself, with the line that writes."""
    rank = script(
        """
        import os, traceml
        traceml.init()
        print("ready", flush=True)

        def complain():
            while True:
                os.write(2, bytes(4096))

        complain()
        """,
        stderr=subprocess.PIPE,
    )

    def own_snapshot() -> RankSnapshot | None:
        with rank.serving.store() as store:
            rows = [row for _, row in store.log_rows("info") if row["kind"] == SNAPSHOT]
            return RankSnapshot.from_row(rows[-1]) if rows else None

    snapshot = eventually(own_snapshot)
    assert (snapshot.answered, snapshot.waits_on, snapshot.process_state) == ("recorder", "stderr", "S")
    assert snapshot.user_line is not None
    assert snapshot.user_line.function == "complain"


@pytest.fixture
def flight(memory: Path, monkeypatch: pytest.MonkeyPatch):
    """The flight file of rank 1, which this process plays."""
    monkeypatch.setattr("traceml.aggregator.silent_ranks.silent_ranks.default_folder", lambda: memory)
    pid = os.getpid()
    facts = {"job": "job", "rank": 1, "pid": pid, "start_ticks": process_start_ticks(pid), "boot_id": boot_id()}
    file = FlightFile.create(memory, facts)
    yield file
    file.close(unlink=True)


def test_a_rank_that_joins_a_run_elsewhere_is_not_absent(registry: Registry, flight: FlightFile) -> None:  # noqa: F811
    """A job of the same name has its runs folder; until its rank connects there, nobody can tell them apart."""
    run, _ = registry.assign(hello(0, 2))
    absent = UnconnectedRanks(run)
    assert [process.rank for process in absent.find()] == [1]

    flight.update_identity(run_dir="/others/20260101-a")

    assert absent.find() == []
    assert UnconnectedRanks(run).find() == []


def test_a_rank_that_lost_its_aggregator_is_absent(registry: Registry, flight: FlightFile) -> None:  # noqa: F811
    """The next aggregator of its run knows it by its file only."""
    run, _ = registry.assign(hello(0, 2))

    flight.update_identity(run_dir=str(run.path))

    assert [process.rank for process in UnconnectedRanks(run).find()] == [1]


def test_whether_a_silent_process_has_never_connected_is_known(
    registry: Registry,  # noqa: F811
    flight: FlightFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until it is of another run, or has gone."""
    monkeypatch.setattr("traceml.aggregator.silent_ranks.silent_ranks.silent_s", lambda _: 60.0)
    run, _ = registry.assign(hello(0, 2))
    silent = SilentRanks(run, lambda snapshot: snapshot.close())
    seen = [silent.has_absent]
    silent.check()
    seen.append(silent.has_absent)
    flight.update_identity(run_dir="/others/20260101-a")
    silent.check()

    assert [*seen, silent.has_absent] == [False, True, False]
