"""Places that trackers' variables name, as options of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.track.conftest import Script, ended_run, finish
from traceml.settings import Config
from traceml.track.backends.jsonl import JsonlBackend
from traceml.track.plugins import plugin_registry
from traceml.track.plugins.plugin_metadata import PluginMetadata, PluginType, first_set
from traceml.track.rank.announcement import announcement
from traceml.track.rank.tracker_places import moved_options, place_options


class Elsewhere(JsonlBackend):
    """A backend of a third party with two options for its place."""

    metadata = PluginMetadata(
        name="elsewhere", version="1", option_variables={"url": first_set("ELSEWHERE_URL")},
        exclusive_options=("url", "folder"),
    )  # fmt: skip


SPACE = {"TRACKIO_SPACE_ID": "me/space", "TRACKIO_SERVER_URL": "http://t", "TRACKIO_DIR": "/t"}


@pytest.mark.parametrize(
    ("backend", "options", "environ", "found"),
    [
        ("mlflow", {}, {"MLFLOW_TRACKING_URI": "http://m:5000"}, {"tracking_uri": "http://m:5000"}),
        ("mlflow", {"tracking_uri": "local"}, {"MLFLOW_TRACKING_URI": "http://m:5000"}, {}),
        ("mlflow", {}, {"MLFLOW_TRACKING_URI": "https://me:hunter2@m"}, {}),
        ("mlflow", {}, {"WANDB_MODE": "offline"}, {}),
        ("wandb", {}, {"WANDB_MODE": "offline", "WANDB_ENTITY": "team"}, {"mode": "offline", "entity": "team"}),
        ("wandb", {"mode": "online"}, {"WANDB_MODE": "offline"}, {}),
        ("wandb", {}, {"WANDB_MODE": "dryrun"}, {}),
        ("clearml", {}, {"CLEARML_OFFLINE_MODE": "1"}, {"mode": "offline"}),
        ("clearml", {}, {"CLEARML_OFFLINE_MODE": "0", "CLEARML_API_HOST": "http://c"}, {"api_host": "http://c"}),
        ("trackio", {}, SPACE, {"server_url": "me/space"}),
        ("trackio", {}, {"TRACKIO_DIR": "/t"}, {"dir": "/t"}),
        ("trackio", {"dir": "/mine"}, SPACE, {}),
        ("jsonl", {}, SPACE, {}),
    ],
)
def test_places_of_the_environment(backend, options, environ, found):
    """What the options set stays, and no secret becomes an option."""
    assert place_options(backend, options, environ) == found


def test_projects_of_the_environment(monkeypatch):
    """A tracker's own variable names the project where the user names none: it was overruled by our default."""
    for name, value in {"WANDB_PROJECT": "vision", "MLFLOW_EXPERIMENT_NAME": "/Users/me/vision"}.items():
        monkeypatch.setenv(name, value)

    backends, given = ["wandb", "jsonl"], {"wandb": {"fallback": "mlflow"}}
    row = announcement(Config(), backends, given)
    assert (row["project"], row["projects"]) == ("default", {"wandb": "vision", "mlflow": "/Users/me/vision"})
    named = (
        announcement(Config(), backends, given, "mine"),
        announcement(Config().over(project="mine"), backends, given),
    )
    assert [(each["project"], each["projects"]) for each in named] == [("mine", {})] * 2


def test_a_present_place_replaces_that_of_the_run(monkeypatch):
    """As a whole, and only where it is another one; other options stay."""
    for name, value in SPACE.items():
        monkeypatch.delenv(name, raising=False)
        assert value

    announced = {"dir": "/theirs", "sample": 10}
    assert moved_options("trackio", announced, {}) is None
    assert moved_options("trackio", announced, {"dir": "/theirs"}) is None
    assert moved_options("trackio", announced, {"server_url": "http://t"}) == {"server_url": "http://t", "sample": 10}
    monkeypatch.setenv("TRACKIO_DIR", "/mine")
    assert moved_options("trackio", announced, {"timeout_s": 5}) == {"dir": "/mine", "sample": 10, "timeout_s": 5}


def test_a_third_partys_backend_declares_what_sets_its_options(monkeypatch):
    """In its own metadata, as the built-in ones do."""
    monkeypatch.setitem(plugin_registry._registered, PluginType.BACKEND, {})
    plugin_registry.register(Elsewhere)

    assert place_options("elsewhere", {}, {"ELSEWHERE_URL": "http://e"}) == {"url": "http://e"}
    assert place_options("elsewhere", {"folder": "f"}, {"ELSEWHERE_URL": "http://e"}) == {}


@pytest.mark.process
def test_a_run_keeps_the_places_of_its_script(script: Script, tmp_path: Path) -> None:
    """Of the trackers that it uses, and of their fallbacks; experiments of settings too."""
    finish(
        script(
            """
            import traceml
            options = {"mlflow": {"fallback": "wandb", "sample": 2}}
            with traceml.Experiment("named", backend="mlflow", options=options):
                traceml.log_metric("x", 1)
            """,
            MLFLOW_TRACKING_URI="sqlite:///m.db", WANDB_MODE="offline", TRACKIO_DIR="t",
        )
    )  # fmt: skip

    (row,) = ended_run(tmp_path / "traceml_runs").of("experiment")
    assert row["options"] == {
        "mlflow": {"fallback": "wandb", "sample": 2, "tracking_uri": "sqlite:///m.db"}, "wandb": {"mode": "offline"},
    }  # fmt: skip
