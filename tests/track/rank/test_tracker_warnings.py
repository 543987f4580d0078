"""A script hears of trackers that fail."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.track.conftest import Script, Stored, ended_run, runs_in
from traceml.track.rank.capture_lifecycle import warn_of_trackers
from traceml.track.tracker_state import DeliveryPhase, TrackerState, states_of


def test_each_tracker_that_fails_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With what is wrong and what becomes of the rows; those that deliver are not mentioned."""
    for backend, phase, error in (
        ("mlflow", DeliveryPhase.OPEN, "Connection refused"),
        ("wandb", DeliveryPhase.BROKEN, "no such library"),
        ("jsonl", DeliveryPhase.DELIVERING, ""),
        ("aim", DeliveryPhase.WAITING, ""),
    ):
        TrackerState(backend, phase, error=error, target="there").save(tmp_path)

    warned: set[str] = set()
    with caplog.at_level(logging.WARNING, "traceml"):
        for run_dir in (tmp_path, tmp_path, tmp_path / "elsewhere"):
            warn_of_trackers(run_dir, warned)

    mlflow, wandb = (record.getMessage() for record in caplog.records)
    assert mlflow.startswith("mlflow at there does not accept what is logged (Connection refused)")
    assert "is tried again" in mlflow
    assert "no such library" in wandb
    assert "is tried again" not in wandb
    assert "once that is fixed, `traceml sync` delivers them" in wandb


def test_the_end_of_a_script_tells(script: Script) -> None:
    """A server that is not there: the script ends as it would, and says so."""
    process = script(
        """
        import glob, json, sys, time, traceml
        with traceml.Experiment("x", backend="mlflow", options={"mlflow": {"tracking_uri": sys.argv[1]}}) as experiment:
            experiment.log_metric("loss", 1.0)
            while not any(json.load(open(path))["error"] for path in glob.glob("traceml_runs/2*/trackers/*.json")):
                time.sleep(0.05)
        """,
        f"http://127.0.0.1:{free_port()}",
        TRACEML_DELIVERY_NICE="0",
    )
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    assert "mlflow at http://127.0.0.1" in err
    assert "cannot be reached: Connection refused" in err


def test_a_wrong_name_is_told_with_its_source(script: Script) -> None:
    """The training goes on."""
    process = script("import traceml\ntraceml.init(local=True)\ntraceml.log_metric('x', 1)", TRACEML_BACKEND="nope")
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    assert "there is no tracker 'nope' (from TRACEML_BACKEND); nothing is delivered to it. Available: aim, " in err


def test_options_of_no_tracker_are_told(tmp_path: Path, script: Script) -> None:
    """A misspelled table, or key of `options`, is said once each; a tracker that is not used here may have options."""
    (tmp_path / "traceml.toml").write_text('[backends.mlfow]\ntracking_uri = "x"\n[backends.aim]\nrepo = "x"\n')
    process = script(
        """
        import traceml
        for name in "ab":
            with traceml.Experiment(name, backend="jsonl", options={"jsnol": {}, "my_package:Own": {}}) as experiment:
                experiment.log_metric("x", 1)
        """
    )
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    told = [line for line in err.splitlines() if "are not used" in line]
    assert [line.partition(" Available")[0] for line in told] == [
        "the options of 'jsnol' are not used: there is no tracker 'jsnol'. Did you mean 'jsonl'?",
        "the options of 'mlfow' are not used: there is no tracker 'mlfow'. Did you mean 'mlflow'?",
    ]


LOGS_TWICE = """
import traceml
traceml.log_metric("loss", 0.5)
traceml.log_metric("loss", 0.25)
traceml.shutdown()
assert traceml.flush(timeout=60)
"""


def test_a_secret_in_the_settings_costs_its_tracker_alone(tmp_path: Path, script: Script) -> None:
    """It is told, the training goes on, other trackers get the values, and the password is nowhere in the run."""
    secret = '[backends.mlflow]\ntracking_uri = "http://jane:hunter22@tracking"\n'
    (tmp_path / "traceml.toml").write_text(
        f'backend = ["mlflow", "jsonl"]\n{secret}[backends.jsonl]\nfallback = "mlflow"\n'
    )
    process = script(LOGS_TWICE)
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    assert err.count("nothing is delivered to mlflow: option 'tracking_uri' of backend 'mlflow' looks like a") == 1
    (run,) = runs_in(tmp_path / "traceml_runs")
    assert [state.backend for state in states_of(run)] == ["jsonl"]
    assert Stored(run).of("experiment")[0]["options"]["jsonl"] == {}
    assert not [path for path in run.rglob("*") if path.is_file() and b"hunter22" in path.read_bytes()]


def test_a_secret_of_the_only_tracker_leaves_the_store(tmp_path: Path, script: Script) -> None:
    """The values are kept; an address without a password is used as it is."""
    (tmp_path / "traceml.toml").write_text(
        'backend = "mlflow"\n[backends.mlflow]\ntracking_uri = "http://jane:hunter22@tracking"\n'
    )
    process = script(LOGS_TWICE)
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    stored = ended_run(tmp_path / "traceml_runs")
    assert (stored.values("loss"), stored.of("experiment")) == ([0.5, 0.25], [])
    assert "`traceml sync RUN --backend mlflow` delivers it" in err


def test_an_address_without_a_password_is_not_reported(tmp_path: Path, script: Script) -> None:
    """A place on this machine."""
    (tmp_path / "traceml.toml").write_text('backend = "jsonl"\n[backends.jsonl]\npath = "values"\n')
    process = script(LOGS_TWICE)
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    assert "nothing is delivered" not in err
    assert list((tmp_path / "values").glob("*.jsonl"))
