"""The debug log of a launch: what was sent and received, the state of each host, and its path in the error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import traceml
from tests.launch import jobs
from traceml.launch.launcher.hosts.agent_pool import AGENT_POOL
from traceml.launch.launcher.logs.debug_log import debug_log


@pytest.fixture
def log_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of log files of launches at level debug."""
    monkeypatch.setenv("TRACEML_LOG_DIR", str(tmp_path))
    monkeypatch.setenv("TRACEML_LOG_LEVEL", "debug")
    AGENT_POOL.close()  # an agent that an earlier test has kept starts no more
    return tmp_path


def test_messages_and_states_are_logged(log_dir: Path) -> None:
    """Each message of a host appears by its name, and each state of the host once it changes."""
    traceml.launch(jobs.nothing, hostnames=["localhost"], workers_per_host=1, backend=None, keep_agents=False)

    (file,) = log_dir.glob("*/launch-debug.log")
    log = file.read_text()
    steps = ("agent started", "received hello", "sent prepare", "received prepared", "sent start", "received done")
    positions = [log.index(f"localhost: {step}") for step in steps]
    assert positions == sorted(positions)
    assert "localhost: starting the agent, was connecting" in log
    assert "localhost: idle, was 1 of 1 workers ended" in log


def test_warnings_are_shown_as_without_it(
    log_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the log and, where nobody has configured logging, on standard error."""
    log = logging.getLogger("traceml.launch")
    monkeypatch.setattr(log, "propagate", False)  # pytest's handlers are above it
    with debug_log(lambda: log_dir):
        log.warning("the launch has waited")

    assert capsys.readouterr().err.splitlines()[1:] == ["the launch has waited"]
    assert "WARNING the launch has waited" in (log_dir / "launch-debug.log").read_text()
    assert log.handlers == []


def test_a_failure_names_the_log(log_dir: Path) -> None:
    """The error of a launch that takes too long names the file, which shows what was waited for."""
    with pytest.raises(traceml.LaunchTimeoutError) as caught:
        traceml.launch(jobs.nothing, hostnames=["localhost"], workers_per_host=1, keep_agents=False, timeout=0.01)

    (file,) = log_dir.glob("*/launch-debug.log")
    assert f"Log of the launch protocol: {file}" in caught.value.__notes__
    assert "localhost: agent started by local" in file.read_text()
