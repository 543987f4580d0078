"""The supervisor with aggregators that hang, die, or cannot be started again: the job must not notice."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.eventually import eventually
from tests.forked import client as forked
from tests.processes import command_of
from tests.recorder.conftest import ENTRY
from traceml.database.snapshots.rank_snapshot import SNAPSHOT, RankSnapshot
from traceml.database.store.reader import StoreReader
from traceml.supervise import aggregator_client, aggregator_process
from traceml.supervise.supervisor import JobOutcome, LocalJob, Supervisor

# What the scripts below begin with: they do to the aggregator what an accident would.
_FIND = """
import os, psutil, shutil, signal, sys, time
def aggregator():
    while True:
        for child in psutil.Process(os.getppid()).children():
            try:
                if {"serve", "a-run"} <= set(child.cmdline()):
                    return child
            except psutil.Error:
                pass  # a zombie of another test
        time.sleep(0.02)
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.02)
"""


def supervise(folder: Path, script: str) -> tuple[JobOutcome, Path]:
    job = LocalJob(
        [sys.executable, "-c", _FIND + script], uses_torchrun=False, run_id="a-run", runs_dir=folder / "runs"
    )
    with Supervisor(job) as supervisor:
        return supervisor.run(), job.run_dir


def report_of(run_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return report


@pytest.mark.parametrize("number", ["SIGSTOP", "SIGKILL"])
def test_an_aggregator_that_does_not_answer_at_the_end_is_replaced(tmp_path: Path, number: str) -> None:
    """Hanging or just killed, it costs the run neither its end nor its report."""
    store = tmp_path / "runs" / "a-run" / "store.db"
    outcome, run_dir = supervise(
        tmp_path, f"wait_for({str(store)!r}); aggregator().send_signal(signal.{number}); sys.exit(3)"
    )

    assert outcome == JobOutcome(status=3, finished=True)
    assert report_of(run_dir)["run"]["state"] == "failed"
    assert report_of(run_dir)["ranks"][0]["exit"]["code"] == 3
    assert not list((tmp_path / "runs" / ".open").iterdir())


def test_the_end_is_prepared_when_the_ranks_have_said_bye(tmp_path: Path) -> None:
    """Their processes take a moment to end: here this one waits for the preparation."""
    told = tmp_path / "told"
    ends = "traceml.init(connect_timeout=240).stop(timeout_s=240)"  # a bye is said within seconds, or not at all
    script = f"import traceml; {ends}; wait_for({str(told)!r}); sys.exit(5)"
    job = LocalJob(
        [sys.executable, "-c", _FIND + script], uses_torchrun=False, run_id="a-run", runs_dir=tmp_path / "runs"
    )
    with Supervisor(job, on_completing=told.touch) as supervisor:
        assert supervisor.run() == JobOutcome(status=5, finished=True)


def test_an_aggregator_that_dies_again_and_again_is_started_again(tmp_path: Path) -> None:
    """However often it was killed, the next one is there at the end, and the job has not been touched."""
    outcome, run_dir = supervise(
        tmp_path, "for _ in range(3):\n    victim = aggregator(); victim.kill(); victim.wait(240)\nsys.exit(0)"
    )

    assert outcome == JobOutcome(status=0, finished=True)
    assert report_of(run_dir)["run"]["state"] == "finished"


def test_modules_of_the_user_in_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the aggregator nor by the process that writes the report: both read the store by sqlite3."""
    (tmp_path / "sqlite3.py").write_text("raise RuntimeError('a module of the user')\n")
    monkeypatch.chdir(tmp_path)
    outcome, run_dir = supervise(tmp_path, "sys.exit(0)")

    assert outcome == JobOutcome(status=0, finished=True)
    assert report_of(run_dir)["run"]["state"] == "finished"


def test_a_runs_folder_that_becomes_a_file_costs_the_run_but_not_the_job(tmp_path: Path) -> None:
    """If no aggregator can be started any longer, the job still runs to its own end."""
    runs = str(tmp_path / "runs")
    outcome, _ = supervise(
        tmp_path,
        f"wait_for({runs + '/a-run/store.db'!r}); victim = aggregator(); victim.suspend()\n"
        "while victim.status() != psutil.STATUS_STOPPED: time.sleep(0.02)\n"  # it may be making a file
        f"shutil.rmtree({runs!r}); open({runs!r}, 'w').close()\n"
        "victim.kill(); victim.wait(240); time.sleep(0.3); sys.exit(4)",
    )

    assert outcome == JobOutcome(status=4, finished=False)


# An aggregator that waits longer than the fifth of a second in which a rank answers that has a core.
PATIENT = """
import sys
from traceml.aggregator import commands
from traceml.cli import main
commands._LAST_SNAPSHOT_S = 60.0
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_that_ends_a_standing_job_is_preceded_by_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has to know how the ranks stood when they were ended; the job gets the signal all the same."""
    script, store = tmp_path / "train.py", tmp_path / "runs" / "a-run" / "store.db"
    script.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(aggregator_client, "_LAST_SNAPSHOTS_S", 60.0)
    monkeypatch.setattr(
        aggregator_process, "helper_program", lambda _, *words: [sys.executable, "-P", "-c", PATIENT, *words]
    )

    def snapshots() -> list[RankSnapshot]:
        with StoreReader(store) as reader:
            return [RankSnapshot.from_row(row) for _, row in reader.log_rows("info") if row["kind"] == SNAPSHOT]

    def end(supervising: int) -> None:
        eventually(lambda: store.exists() and snapshots(), "the first snapshot, after 5 s")
        signal.pthread_kill(supervising, signal.SIGTERM)

    job = LocalJob([sys.executable, ENTRY, str(script)], False, run_id="a-run", runs_dir=tmp_path / "runs")
    with Supervisor(job) as supervisor:
        ending = threading.Thread(target=end, args=(threading.get_ident(),))
        ending.start()
        assert supervisor.run() == JobOutcome(status=128 + signal.SIGTERM, finished=True)
        ending.join()

    last = snapshots()[-1]
    assert (last.is_last, last.ended, last.answered) == (True, False, "recorder")
    assert last.quiet_s >= 5
    assert last.user_line is not None
    assert last.user_line.line == 2


def test_a_signal_that_the_command_ignores_ends_nothing(tmp_path: Path) -> None:
    """Under `nohup` a closed terminal is no end, and not told as one."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        store = tmp_path / "runs" / "a-run" / "store.db"
        outcome, run_dir = supervise(tmp_path, f"wait_for({str(store)!r}); os.kill(os.getppid(), signal.SIGHUP)")
    finally:
        signal.signal(signal.SIGHUP, before)

    assert outcome == JobOutcome(status=0, finished=True)
    assert report_of(run_dir)["verdict"]["kind"] == "INSUFFICIENT_DATA"


@pytest.mark.parametrize("busy_s", [0.0, 4.0])
def test_a_rank_that_leaves_by_os_exit_while_others_run_is_not_lost(tmp_path: Path, busy_s: float) -> None:
    """It says no bye; its launcher knows that its exit code was 0, and tells it until the aggregator has time."""
    (tmp_path / "train.py").write_text(
        "import os, time, traceml\n"
        "traceml.init()\n"
        "with traceml.trace_step():\n"
        "    while not os.path.exists('connected'):\n"
        "        time.sleep(0.05)\n"
        "os.environ['RANK'] == '0' and os._exit(0)\n"
        "while not os.path.exists('over'):\n"
        "    time.sleep(0.05)\n"
    )
    store = tmp_path / "runs" / "latest" / "store.db"
    command = [sys.executable, "-m", "traceml", "run", "--runs-dir", "runs", "--nproc-per-node", "2", "train.py"]

    def states() -> dict[int, str]:
        with StoreReader(store) as reader:
            return {stream.rank: str(stream.state) for stream in reader.streams()}

    environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # torchrun is forked, too
    with forked.Popen(command, forks=True, cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL) as job:
        try:
            eventually(lambda: store.exists() and states() == {0: "running", 1: "running"}, "both ranks")
            (aggregator,) = (each for each in psutil.Process(job.pid).children() if "serve" in command_of(each))
            if busy_s:
                aggregator.suspend()

            (tmp_path / "connected").touch()
            time.sleep(busy_s)
            aggregator.resume()
            eventually(lambda: states()[0] == "finished", "rank 0 to be known as finished")
            assert states()[1] == "running"
            (tmp_path / "over").touch()
            assert job.wait(240) == 0
        finally:
            job.kill()


def test_slurm_is_asked_why_it_ends_the_job(tmp_path: Path) -> None:
    """Its answer is the verdict, with the time limit; such an answer of a real one takes a minute."""
    shown = "JobState=RUNNING StartTime=2020-01-01T00:00:00 EndTime=2020-01-01T00:30:00 TimeLimit=00:30:00"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{shown}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "train.py").write_text("import time\nopen('trains', 'w').close()\ntime.sleep(600)\n")
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = [sys.executable, "-m", "traceml", "run", "--runs-dir", "runs", "train.py"]
    with forked.Popen(
        command, imports="aggregator", forks=True, cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL
    ) as job:
        try:
            eventually((tmp_path / "trains").exists, "the script")
            job.send_signal(signal.SIGTERM)
            assert job.wait(240) == 128 + signal.SIGTERM
        finally:
            job.kill()

    (found,) = (each for each in report_of(tmp_path / "runs" / "latest")["findings"] if each["kind"] == "RANK_LOST")
    assert found["summary"].startswith("The scheduler ended the job at its time limit of 30 min (SIGTERM)")


_COUNTS = """
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: print(end="x", file=got, flush=True))
got = open("got", "w")
while os.path.getsize("got") < 3:
    time.sleep(0.01)
time.sleep(1)
print(os.path.getsize("got"))
"""


@pytest.mark.parametrize("scheduler", [{"SLURM_JOB_ID": "7"}, {}])
def test_a_signal_to_all_processes_reaches_the_script_once(tmp_path: Path, scheduler: dict[str, str]) -> None:
    """Slurm sends it to all processes of a step, and others to the command alone; our own programs ignore a warning."""
    (tmp_path / "train.py").write_text(_COUNTS)
    command = [sys.executable, "-m", "traceml", "run", "--runs-dir", "runs", "train.py"]
    environ = {**os.environ, **scheduler}

    def has_got(count: int) -> bool:
        return (tmp_path / "got").exists() and (tmp_path / "got").stat().st_size == count

    with subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as job:
        try:
            eventually(lambda: has_got(0), "the script")
            eventually(lambda: any((tmp_path / "runs").glob("*/store.db")), "the aggregator")
            helpers = [each for each in psutil.Process(job.pid).children() if "train.py" not in each.cmdline()]
            (aggregator,) = [each for each in helpers if "serve" in each.cmdline()]
            if scheduler:  # others send it to the process group
                aggregator.send_signal(signal.SIGUSR1)

            os.killpg(job.pid, signal.SIGUSR1)
            eventually(lambda: has_got(1), "the signal to all")
            time.sleep(0.5)  # a second one would come now
            assert has_got(1)

            job.send_signal(signal.SIGUSR1)
            eventually(lambda: has_got(2), "a signal to the command")
            assert aggregator.is_running()

            os.killpg(job.pid, signal.SIGUSR1)
            assert job.communicate(timeout=240)[0] == b"3\n"
        finally:
            job.kill()

    assert job.returncode == 0
    assert not any(each.is_running() for each in helpers)


_STEPS = """
import traceml
traceml.init()
for _ in range(30):
    with traceml.trace_step():
        time.sleep(0.001)
"""


@pytest.mark.parametrize(
    ("end", "state", "code"),
    [
        ("os.execvp('sh', ['sh', '-c', 'exit 0'])", "finished", 0),
        ("os.execvp('sh', ['sh', '-c', 'exit 4'])", "failed", 4),
        ("open('empty', 'w'); os.chmod('empty', 0o700); os.execv('empty', ['empty'])", "failed", 1),
    ],
    ids=["ends well", "ends badly", "is none"],
)
def test_a_script_that_becomes_another_program_has_ended_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, state: str, code: int
) -> None:
    """All steps count, the process is not taken for lost, and the status is that of the program."""
    monkeypatch.chdir(tmp_path)
    outcome, run_dir = supervise(tmp_path, _STEPS + end)

    report = report_of(run_dir)
    assert outcome == JobOutcome(status=code, finished=True)
    assert (report["steps"]["count"], report["run"]["attempt"]) == (30, 0)
    assert (report["ranks"][0]["state"], report["ranks"][0]["exit"]["code"]) == (state, code)
    exception = report["ranks"][0]["exit"]["exception"]
    assert (exception or "").startswith("OSError") is (code == 1)


IN_TERMINAL = """
import sys
from traceml.cli import main
sys.exit(main(["run", "--live", "terminal", "--runs-dir", "runs", "script.py"]))
"""


def test_a_closed_terminal_ends_the_job_and_is_told_as_that(tmp_path: Path) -> None:
    """The kernel tells only the session's leader; neither the view nor the card, which nobody reads, fails."""
    (tmp_path / "script.py").write_text(
        "import signal, time\nsignal.alarm(200)\nopen('ready', 'w')\nwhile True: print(time.time())\n"
    )
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` has these tests ignore it
        os.execve(sys.executable, [sys.executable, "-c", IN_TERMINAL], {**os.environ, "TERM": "xterm"})

    while not (tmp_path / "ready").exists():
        os.read(terminal, 65536)

    os.close(terminal)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    report = report_of(tmp_path / "runs" / "latest")
    assert report["verdict"]["summary"].startswith("SIGHUP from the terminal ended the job")
    assert report["ranks"][0]["exit"]["signal"] == signal.SIGHUP


@pytest.mark.parametrize(("live", "stream"), [("auto", "stderr"), ("web", "stdout"), ("web", "stderr")])
def test_output_that_cannot_be_written_ends_no_job(tmp_path: Path, live: str, stream: str) -> None:
    """The disk under a log is full: the job's work and status do not depend on our lines, nor on its own output."""
    (tmp_path / "script.py").write_text("import os, sys\nos.write(1, b'text')\nopen('done', 'w')\nsys.exit(5)\n")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "traceml", "run", "--live", live, "--runs-dir", "runs", "script.py"],
            cwd=tmp_path,
            check=False,
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: full},
        )

    assert (ended.returncode, (tmp_path / "done").exists()) == (5, True)
    assert (tmp_path / "runs" / "latest" / "report.json").exists()
