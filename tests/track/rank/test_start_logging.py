"""`start_logging` and `stop_logging` behave as Tracelet's users know them."""

from __future__ import annotations

from pathlib import Path

import pytest

import traceml
from tests.track.conftest import Script, ended_run, finish
from traceml.errors import SettingsError, UsageError


def test_start_loggings_functions(script: Script, tmp_path: Path) -> None:
    """start_logging and stop_logging; what is not stopped ends with the script."""
    finish(
        script("""
        import traceml
        experiment = traceml.start_logging("old", "q", "jsonl", backend_url="elsewhere")
        traceml.log_metric("x", 1)
        open("file.txt", "w").write("f")
        experiment.log_file_artifact("file.txt", "folder")
        traceml.stop_logging()
        traceml.start_logging("open", backend="jsonl")
        traceml.log_metric("x", 2)
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    old, left_open = stored.of("experiment")
    assert old["options"] == {"jsonl": {"path": "elsewhere"}}
    assert left_open["name"] == "open"
    assert [row["name"] for row in stored.of("artifact")] == ["folder/file.txt"]
    assert [row["experiment"] for row in stored.of("end")] == [old["experiment"]]
    assert stored.values("x") == [1.0, 2.0]


def test_a_second_start_ends_the_first(script: Script, tmp_path: Path) -> None:
    """The second stands beside the first, not below it; an experiment around both stays open."""
    finish(
        script("""
        import traceml
        with traceml.Experiment("around", backend="jsonl") as around:
            first = traceml.start_logging("one", backend="jsonl")
            traceml.Experiment("inside", backend="jsonl").start()
            second = traceml.start_logging("two", backend="jsonl")
            assert traceml.get_active_experiment() is second
            traceml.log_metric("x", 2)
            second.end()
            assert traceml.get_active_experiment() is around
        traceml.start_logging("three", backend="jsonl")
        traceml.stop_logging()
        assert traceml.get_active_experiment() is None
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    rows = {row["name"]: row for row in stored.of("experiment")}
    around = rows["around"]["id"]
    assert {name: row["parent"] for name, row in rows.items()} == {
        "around": None, "one": around, "inside": around, "two": around, "three": None,
    }  # fmt: skip
    names = {row["experiment"]: name for name, row in rows.items()}
    assert [names[row["experiment"]] for row in stored.of("end")] == ["inside", "one", "two", "around", "three"]


def test_config_holds_settings(script: Script, tmp_path: Path) -> None:
    """Ours and Tracelet's names; they are in force for this experiment alone, and arguments win."""
    finish(
        script(
            """
        import traceml
        from tensorboardX import SummaryWriter
        writer = SummaryWriter("events")
        config = {"track_tensorboard": False, "experiment_name": "plain", "project": "p", "backend": ["jsonl"],
                  "exclude": ["secret/*"], "metrics_interval": 5, "backend_url": "elsewhere", "track_git": False}
        traceml.start_logging(config=config)
        writer.add_scalar("hidden", 1.0, 1)
        traceml.start_logging("captured", config={"backends": ["jsonl"], "experiment_name": "other"})
        writer.add_scalar("seen", 2.0, 2)
        writer.close()
        """,
            TRACEML_TRACK_GIT="1",
        )
    )

    stored = ended_run(tmp_path / "traceml_runs")
    plain, captured = stored.of("experiment")
    assert (plain["name"], plain["project"], plain["backends"]) == ("plain", "p", ["jsonl"])
    assert (plain["exclude"], plain["metrics_interval"]) == (["secret/*"], 5.0)
    assert plain["options"] == {"jsonl": {"path": "elsewhere"}}
    assert (captured["name"], captured["exclude"], captured["metrics_interval"]) == ("captured", [], 30.0)
    assert captured["backends"] == ["jsonl"]
    assert [(metric.name, number) for number, metric in stored.metrics] == [("seen", captured["experiment"])]
    assert "git" not in {row["name"] for row in stored.of("collected")}


def test_each_start_reads_the_environment(script: Script, tmp_path: Path) -> None:
    """A variable that is set between two starts counts for the second, also for `backend_url`; arguments win."""
    finish(
        script("""
        import os, traceml
        traceml.start_logging("a", backend="jsonl")
        os.environ |= {"TRACEML_BACKEND": "jsonl", "TRACEML_PROJECT": "later", "TRACEML_METRICS_INTERVAL": "7"}
        traceml.start_logging("b", backend_url="elsewhere")
        traceml.start_logging("c", project="own", config={"metrics_interval": 9})
        """)
    )

    rows = ended_run(tmp_path / "traceml_runs").of("experiment")
    assert [(row["backends"], row["project"], row["metrics_interval"]) for row in rows] == [
        (["jsonl"], "default", 30.0), (["jsonl"], "later", 7.0), (["jsonl"], "own", 9.0),
    ]  # fmt: skip
    assert rows[1]["options"] == {"jsonl": {"path": "elsewhere"}}


def test_settings_of_the_recorder_cannot_change_later(script: Script) -> None:
    """They are taken where nothing is recorded yet; then a different value is an error."""
    out = finish(
        script("""
        import traceml
        traceml.start_logging("a", backend="jsonl", config={"runs_dir": "other", "max_queue_size": 50})
        traceml.start_logging("b", backend="jsonl", config={"runs_dir": "other"})
        try:
            traceml.start_logging("c", backend="jsonl", config={"max_queue_size": 60})
        except traceml.SettingsError as error:
            print(error)
        print(traceml.get_active_experiment().name)
        import pathlib
        traceml.shutdown()
        print(pathlib.Path("other/latest").exists())
        """)
    )
    assert "max_queue_size: 60 comes too late: this process is recorded with 50" in out
    assert out.split()[-2:] == ["b", "True"]


def test_unknown_names_are_reported() -> None:
    """With what is meant, and where parameters belong; nothing is begun."""
    with pytest.raises(SettingsError, match=r"track_tensorbord.*did you mean 'track_tensorboard'.*log_params"):
        traceml.start_logging("e", config={"track_tensorbord": False})
    with pytest.raises(SettingsError, match="'often' is not allowed"):
        traceml.start_logging("e", config={"metrics_interval": "often"})
    with pytest.raises(SettingsError, match="backends: sets the same as 'backend', which is set, too"):
        traceml.start_logging("e", config={"backend": "jsonl", "backends": ["mlflow"]})

    assert traceml.get_active_experiment() is None


def test_a_plugin_error_is_a_value_error_too() -> None:
    """Tracelet raises that for an unknown backend."""
    assert issubclass(traceml.PluginError, ValueError)


def test_keys_are_refused() -> None:
    """Also inside the configuration; the error says where they belong, without repeating them."""
    for given in ({"api_key": "hunter2"}, {"config": {"api_key": "hunter2"}}):
        with pytest.raises(UsageError, match=r"WANDB_API_KEY in the environment.*0600") as caught:
            traceml.start_logging("e", backend="wandb", **given)

        assert "hunter2" not in str(caught.value)


def test_an_address_goes_with_one_tracker() -> None:
    """Otherwise nobody could tell whose it is."""
    with pytest.raises(UsageError, match="one backend of aim, clearml"):
        traceml.start_logging("e", backend="mlflow,aim", backend_url="http://x")
