"""A training ends only the recorder that it started; disabled and wrong settings are handled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import traceml
from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually
from traceml.errors import SettingsError
from traceml.integrations.training_session import TrainingSession
from traceml.recorder.current_recorder import state
from traceml.runs.run import Run


@pytest.fixture
def address(serving: Any, tmp_path: Path) -> dict[str, Any]:
    server: Serving = serving()
    return {"port": server.port, "token": TOKEN, "runs_dir": server.folder}


def test_a_recorder_that_runs_is_left_alone(address: dict[str, Any]) -> None:
    """It goes on after the training, and nothing is shown."""
    recorder = traceml.init(**address)
    session = TrainingSession({})
    try:
        assert session.begin() is recorder.instrumentation
        session.end()
        assert recorder.enabled
    finally:
        traceml.shutdown()


def test_one_that_runs_is_stopped_where_the_process_ends(address: dict[str, Any], capsys: Any) -> None:
    """Ray ends its workers at once: under `traceml run` the last step and the exception are stored before."""
    recorder = traceml.init(**address)
    session = TrainingSession({}, ends_process=True)
    try:
        session.begin()
        session.end(ValueError("rank 1 is bad"))
        assert not traceml.is_enabled()
    finally:
        traceml.shutdown()

    eventually(lambda: Run(recorder.run_dir).state == "failed")
    assert "rank 1 is bad" in str(Run(recorder.run_dir).report["ranks"][0]["exit"])
    assert "RANK_LOST" not in capsys.readouterr().err


def test_its_own_is_ended_once(address: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Also where another session is inside it, and where its begin is called again after a training that broke."""
    outer, inner = TrainingSession(address), TrainingSession(address)
    try:
        assert outer.begin() is not None
        assert inner.begin() is outer.begin()
        inner.end()
        assert traceml.is_enabled()
        outer.end()
        assert not traceml.is_enabled()
        outer.end()
    finally:
        traceml.shutdown()

    shown = capsys.readouterr().err
    assert shown.count("INSUFFICIENT_DATA") == 1
    assert str(address["runs_dir"]) in shown


def test_what_is_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the script, an argument, or the environment."""
    monkeypatch.setattr(state, "recorder", None)
    traceml.init(enabled=False)
    assert TrainingSession({}).begin() is None
    monkeypatch.setattr(state, "recorder", None)
    assert TrainingSession({"enabled": False}).begin() is None
    monkeypatch.setattr(state, "recorder", None)
    monkeypatch.setenv("TRACEML_ENABLED", "0")
    assert TrainingSession({}).begin() is None
    assert not traceml.is_enabled()


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on with a warning; a mistake is told where the callback is made."""
    monkeypatch.setattr(state, "recorder", None)  # whatever a test before this one has turned off
    session = TrainingSession({"local": False, "port": 1, "connect_timeout": 0.1})
    assert session.begin() is not None
    session.end()
    assert "Training continues" in caplog.text
    with pytest.raises(SettingsError, match="prot"):
        TrainingSession({"prot": 1})
