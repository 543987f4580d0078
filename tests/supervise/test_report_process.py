"""The process that writes the reports of an ended run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.diagnosis.fabricated import Job
from tests.eventually import eventually
from tests.processes import command_of
from tests.runs.fabricated_store import store_run
from traceml.errors import TraceMLError
from traceml.run_folder import STORE_NAME
from traceml.supervise.report_process import ReportProcess


def waiting_pids() -> list[int]:
    return [child.pid for child in psutil.Process().children() if "traceml.display.report_main" in command_of(child)]


def waiting_pid() -> int:
    (pid,) = waiting_pids()
    return pid


def ignored_signals(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("SigIgn:")).split()[1], 16)


@pytest.fixture
def run(tmp_path):
    return store_run(tmp_path / "run", Job(steps=60))


@pytest.fixture
def maker():
    maker = ReportProcess()
    yield maker
    maker.close()


@pytest.mark.parametrize("prepare", [ReportProcess.prepare, ReportProcess.fork, None])
def test_both_reports_are_written_by_another_process(run, maker, prepare):
    """Prepared or not, `report.json` and `report.html` are there when the call returns; so for the next run."""
    for _ in range(2):
        if prepare is not None:
            prepare(maker)

        assert maker.write(run) == run / "report.json"
        assert json.loads((run / "report.json").read_text())["verdict"]["kind"] in (run / "report.html").read_text()
        (run / "report.json").unlink()


def test_a_signal_to_all_processes_of_a_job_ends_no_report(run, maker):
    """As a scheduler sends it: the report tells of that end."""
    maker.prepare()
    pid = waiting_pid()
    eventually(lambda: ignored_signals(pid) >> (signal.SIGTERM - 1) & 1)
    os.kill(pid, signal.SIGTERM)

    assert maker.write(run) == run / "report.json"


def test_the_page_alone(run, maker):
    """The page is written where it is wanted, and no report beside it."""
    assert maker.write(run, run / "mine.html") == run / "mine.html"

    assert (run / "mine.html").read_text().startswith("<!doctype html>")
    assert not (run / "report.json").exists()


def is_free(path: Path) -> bool:
    with path.open("w") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True

    return False


def test_a_fork_keeps_no_file_of_its_parent_open(maker, tmp_path):
    """What its parent closes is closed: a socket at which ranks would wait, the lock of a folder."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        maker.fork()

    eventually(lambda: is_free(tmp_path / "lock"))


def test_a_fork_that_fails_is_reported(run, maker, monkeypatch):
    """Its exception never goes on in the parent's code; the parent is told how it ended."""
    monkeypatch.setattr("traceml.display.report_main.work", lambda *_: 1 / 0)
    maker.fork()

    with pytest.raises(TraceMLError, match="its process ended with exit code 1"):
        maker.write(run)


def test_a_killed_process_is_reported_with_what_to_do(run, maker):
    """The error has the signal and the command that makes the report; the next report is made."""
    maker.prepare()
    os.kill(waiting_pid(), signal.SIGKILL)

    with pytest.raises(TraceMLError, match=r"killed by signal 9 \(SIGKILL\).*`traceml report .*run` makes it again"):
        maker.write(run)

    assert maker.write(run).is_file()


def test_a_store_that_cannot_be_read_is_reported_with_its_reason(run, maker):
    """The error of the other process arrives here."""
    (run / STORE_NAME).write_bytes(b"garbage" * 999)

    with pytest.raises(TraceMLError, match=f"{STORE_NAME}.*`traceml report"):
        maker.write(run)


@pytest.mark.parametrize("prepare", [ReportProcess.prepare, ReportProcess.fork])
def test_the_waiting_process_yields_to_others_and_ends_with_its_parent(maker, prepare):
    """It is killed first when memory runs out, has a lower priority, and ends when nobody can ask it any more."""
    prepare(maker)
    pid = eventually(waiting_pids)[0]
    with Path(f"/proc/{pid}/oom_score_adj").open() as score:
        eventually(lambda: (score.seek(0), score.read().strip() == "1000")[1])

    assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
    maker.close()
    assert not Path(f"/proc/{pid}").exists()
