"""`traceml stacks` on real jobs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.aggregator.conftest import serving  # noqa: F401 - a fixture
from tests.aggregator.silent_ranks.test_silent_ranks import Script, script  # noqa: F401 - a fixture
from tests.cli.test_top import running_run
from tests.eventually import eventually
from tests.forked import client as forked
from traceml import cli
from traceml.aggregator.silent_ranks.stacks_reply import stacks_reply
from traceml.aggregator.streams.stream import Incarnation, RankStream
from traceml.cli.jobs import running_job
from traceml.clock import boot_id
from traceml.database.store.store import StoreWriter
from traceml.inspection.kernel_state import process_info
from traceml.run_folder import STORE_NAME
from traceml.transport import auth

pytestmark = pytest.mark.process


def _stacks(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")}
    command = [sys.executable, "-m", "traceml", "stacks", "--runs-dir", str(folder), *words]
    return forked.run(command, imports="aggregator", capture_output=True, text=True, env=environ, timeout=240)


def _ranks(folder: Path) -> list[dict[str, Any]]:
    told = _stacks(folder, "--json")
    assert told.returncode == 0, told.stderr
    found: list[dict[str, Any]] = json.loads(told.stdout)["ranks"]
    return found


def test_a_job_of_traceml_run_is_shown(tmp_path: Path) -> None:
    """Nothing special is needed at its start; it goes on afterwards."""
    code = "import sys\ndef wait():\n    sys.stdin.readline()\nprint('ready', flush=True)\nwait()\n"
    (tmp_path / "train.py").write_text(code)
    command = [sys.executable, "-m", "traceml", "run", "--runs-dir", "runs", "train.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with forked.Popen(command, imports="aggregator", forks=True, cwd=tmp_path, text=True, **pipes) as job:
        assert job.stdout is not None
        eventually(lambda: "ready" in job.stdout.readline(), "the script")  # type: ignore[union-attr]

        def stacks() -> subprocess.CompletedProcess[str] | None:
            """The answer of a rank that is connected, and on a busy machine has a core."""
            told = _stacks(tmp_path / "runs")
            return told if told.returncode == 0 and "wait" in told.stdout else None

        told = eventually(stacks, "the rank")

        lines = told.stdout.splitlines()
        assert lines[0].startswith("rank 0 (")
        assert ": start-up" in lines[0]
        assert "  > train.py:3 wait" in lines
        assert lines.index("  > train.py:3 wait") < lines.index("  > train.py:5")
        assert job.poll() is None
        job.communicate("\n", timeout=240)

    assert job.returncode == 0


def test_a_rank_that_holds_the_gil_is_shown(script: Any) -> None:  # noqa: F811
    """The answer comes from outside, with the line that called the C function."""
    rank: Script = script(
        """
        import ctypes, traceml
        traceml.init()

        def hold():
            print("ready", flush=True)
            ctypes.PyDLL(None).sleep(600)

        hold()
        """
    )

    told: dict[str, Any] = {}

    def is_answered() -> bool:
        told.update(_ranks(rank.serving.folder)[0])
        return bool(told["answered"] == "signal")

    # On a busy machine the rank's thread wakes too seldom to show that it asks for the GIL in vain.
    eventually(is_answered, "it to be asked by a signal")
    assert told["process_state"] == "S"
    assert (told["user_line"]["function"], told["user_line"]["line"]) == ("hold", 7)
    eventually(lambda: "holds the GIL in C code, waiting" in _stacks(rank.serving.folder).stdout)


def test_a_stopped_rank_is_shown(script: Any) -> None:  # noqa: F811
    """Nobody waits for it longer than for others."""
    rank: Script = script(
        """
        import time, traceml
        traceml.init()
        print("ready", flush=True)
        time.sleep(600)
        """
    )
    eventually(lambda: [run["connected"] for run in rank.serving.ask("status")["runs"]] == [1], "the rank to connect")
    rank.process.send_signal(signal.SIGSTOP)
    eventually(lambda: process_info(rank.process.pid).state == "T", "the rank to stop")

    assert "stopped by a signal" in _stacks(rank.serving.folder).stdout


def test_a_run_that_is_over_has_no_stacks(script: Any) -> None:  # noqa: F811
    """The error names its report."""
    rank: Script = script("import traceml\ntraceml.init()\nprint('ready', flush=True)\n")
    rank.process.wait(240)
    eventually(lambda: rank.serving.state() != "running", "the end of the run")
    told = _stacks(rank.serving.folder, rank.serving.run_dirs[0].name)

    assert told.returncode == 3
    assert "has ended" in told.stderr
    assert "traceml report" in told.stderr


def test_no_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a job nor a run of that name."""
    assert cli.main(["stacks", "--runs-dir", str(tmp_path)]) == 3
    assert "no job is running in" in capsys.readouterr().err
    assert cli.main(["stacks", "--runs-dir", str(tmp_path), "nothing"]) == 3
    assert "no run 'nothing'" in capsys.readouterr().err


def test_an_aggregator_that_cannot_be_asked_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On another host, and one that has published no address."""
    folder = running_run(tmp_path / "going-on")

    assert cli.main(["stacks", "--runs-dir", str(tmp_path), "going-on"]) == 3
    assert f"(pid {os.getpid()}) no longer runs" in capsys.readouterr().err

    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("aggregator", {"host": f"not-{socket.gethostname()}", "boot_id": boot_id(), "pid": 1})
        writer.commit()

    assert cli.main(["stacks", "--runs-dir", str(tmp_path), "going-on"]) == 3
    assert "run `traceml stacks` there" in capsys.readouterr().err


def test_a_stopped_aggregator_is_told_from_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would not help: it has the run open."""
    monkeypatch.setattr(running_job, "_CONNECT_S", 0.3)
    running_run(tmp_path / "going-on")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = auth.publish("127.0.0.1", silent.getsockname()[1], "secret")
        try:
            assert cli.main(["stacks", "--runs-dir", str(tmp_path), "going-on"]) == 3
        finally:
            path.unlink()

    told = capsys.readouterr().err
    assert f"(pid {os.getpid()}) did not answer within 0.3 s: it was stopped" in told
    assert "traceml report going-on" in told


def test_equal_stacks_of_many_ranks_travel_once() -> None:
    """Each rank has the number of its stack; a rank without an answer on another host is named."""
    frames = [{"file": "a.py", "line": 3, "function": "f"}]
    streams = [RankStream(n, n, 0, Incarnation("far", "boot", n, 0, ""), flight="") for n in range(1000)]
    answers = {n: {"result": {"rank": n, "frames": frames if n else []}} for n in range(999)}
    reply = stacks_reply(streams, answers, {})

    assert reply["stacks"] == [[], frames]
    assert [row["stack"] for row in reply["ranks"]] == [0] + [1] * 998
    assert reply["missing"] == [{"rank": 999, "host": "far", "pid": 999, "why": "it did not answer"}]


def test_ranks_that_never_connected_are_missing() -> None:
    """The one that all others wait for may be among them."""
    streams = [RankStream(0, 0, 0, Incarnation("here", "boot", 1, 0, ""), flight="")]
    reply = stacks_reply(streams, {0: {"result": {"rank": 0, "frames": []}}}, {}, {2: None, 1: None})

    assert [(each["rank"], each["why"]) for each in reply["missing"]] == [
        (1, "it has not connected"),
        (2, "it has not connected"),
    ]
