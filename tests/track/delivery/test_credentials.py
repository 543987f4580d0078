"""Each delivery process sees its own keys, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from traceml.errors import PluginError
from traceml.settings import Config
from traceml.track.backends.jsonl import JsonlBackend
from traceml.track.delivery.credentials import environment_for, key_variables, read_key_file
from traceml.track.plugins import plugin_registry
from traceml.track.plugins.plugin_metadata import PluginMetadata, PluginType
from traceml.track.rank.announcement import announcement

ENVIRON = {
    "PATH": "/bin", "PWD": "/tmp", "HOME": "/home/x", "WANDB_API_KEY": "w", "WANDB_MODE": "offline",
    "MLFLOW_TRACKING_TOKEN": "m", "MLFLOW_TRACKING_URI": "http://h",
    "AWS_SECRET_ACCESS_KEY": "a", "CLEARML_API_SECRET_KEY": "c", "GITHUB_TOKEN": "g",
    "TRACEML_TOKEN": "t", "MY_TRACKER_KEY": "y", "DB_PASSWORD": "p",
}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "own"),
    [
        ("wandb", {"WANDB_API_KEY", "WANDB_MODE"}),
        ("mlflow", {"MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY"}),
        ("clearml", {"CLEARML_API_SECRET_KEY"}),
        ("jsonl", set()),
    ],
)
def test_a_process_sees_its_own_variables(backend: str, own: set[str]) -> None:
    seen = set(environment_for(backend, {}, ENVIRON))

    assert seen == {"PATH", "HOME", "PWD", *own}


def test_what_looks_like_a_secret_is_kept_back_whatever_its_name() -> None:
    """An address with a password in it; but a proxy's, without which nothing would be reached, passes."""
    environ = {**ENVIRON, "DATABASE": "postgres://u:pass" + "w0rd@h/d", "https_proxy": "http://u:pass" + "w0rd@h:1"}

    assert set(environment_for("jsonl", {}, environ)) == {"PATH", "HOME", "PWD", "https_proxy"}


def test_a_backend_of_somebody_else_gets_what_bears_its_name_or_is_named() -> None:
    environ = {**ENVIRON, "MY_TRACKER_API_KEY": "k", "OTHER_API_KEY": "o"}

    assert "MY_TRACKER_API_KEY" in environment_for("my-tracker", {}, environ)
    assert "OTHER_API_KEY" not in environment_for("my-tracker", {}, environ)
    assert "OTHER_API_KEY" in environment_for("my_pkg:Backend", {"env": ["OTHER_*"]}, environ)


def test_the_variables_that_hold_keys_are_named_and_nothing_of_them() -> None:
    assert key_variables("wandb", {}, ENVIRON) == ["WANDB_API_KEY"]
    assert key_variables("mlflow", {}, ENVIRON) == ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"]


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_file_holds_a_key_or_variables(tmp_path: Path) -> None:
    path = write(tmp_path / "key", "abc123==\n")
    assert read_key_file("wandb", path) == {"WANDB_API_KEY": "abc123=="}

    write(path, "# mine\nexport CLEARML_API_ACCESS_KEY=a\nCLEARML_API_SECRET_KEY='b'\n")
    assert read_key_file("clearml", path) == {"CLEARML_API_ACCESS_KEY": "a", "CLEARML_API_SECRET_KEY": "b"}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "key", "hush-hush", mode)

    with pytest.raises(PluginError, match="chmod 600") as refused:
        read_key_file("wandb", path)

    assert "hush" not in str(refused.value)


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"none.*No such file"):
        read_key_file("wandb", tmp_path / "none")


class Declared(JsonlBackend):
    """A backend of a third party that declares its variables."""

    metadata = PluginMetadata(
        name="declared", version="1", key_variable="THIRD_TOKEN", environment=("THIRD_*",), address_option="path"
    )


def test_a_third_partys_backend_declares_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach its own delivery alone, also where the aggregator only knows what the rank has announced."""
    environ = {**ENVIRON, "THIRD_TOKEN": "t", "THIRD_ZONE": "z"}
    monkeypatch.setitem(plugin_registry._registered, PluginType.BACKEND, {})
    plugin_registry.register(Declared)
    announced = announcement(Config(), ["declared"], {})["options"]["declared"]

    assert set(environment_for("declared", {}, environ)) == {"PATH", "HOME", "PWD", "THIRD_TOKEN", "THIRD_ZONE"}
    assert not {"THIRD_TOKEN", "THIRD_ZONE"} & set(environment_for("wandb", {}, environ))
    assert read_key_file("declared", write(tmp_path / "key", "s3cret")) == {"THIRD_TOKEN": "s3cret"}
    monkeypatch.setitem(plugin_registry._registered, PluginType.BACKEND, {})
    assert {"THIRD_TOKEN", "THIRD_ZONE"} <= set(environment_for("declared", announced, environ))
