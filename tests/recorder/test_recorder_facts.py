"""Facts that a rank tells about its process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from traceml.recorder.identity import identify
from traceml.recorder.recorder_facts import process_facts
from traceml.settings import Config


def _collect(**settings: Any) -> Any:
    config = Config(**settings)
    return process_facts(identify(config), config).get("collect")


def test_rank_0_leaves_changes_and_packages_to_the_aggregator() -> None:
    """It tells where they are, when they are read, and which patterns are masked."""
    asked = _collect(mask=("customer_*",), track_env=False, collect_after=30.0)

    assert asked["names"] == ["git", "system"]
    assert (asked["mask"], asked["after_s"]) == (["customer_*"], 30.0)
    assert [Path(each) for each in asked["path"]] == [Path(each).absolute() for each in sys.path[:64]]


def test_settings_turn_it_off() -> None:
    assert _collect(track_git=False, track_env=False, track_system=False)["names"] == []


@pytest.mark.parametrize("given", [{"backend": ("jsonl",)}, {"collectors": ("git",)}])
def test_a_rank_that_collects_leaves_nothing(given: dict[str, Any]) -> None:
    assert _collect(**given) is None


def test_other_ranks_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert _collect() is None


def test_a_working_directory_that_was_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The training goes on without one, and so does tracing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    tmp_path.rmdir()
    config = Config()

    assert process_facts(identify(config), config)["folder"] == ""


@pytest.mark.parametrize(
    ("restarts", "is_shared", "told"), [("1", "True", 1), ("0", "True", None), ("1", "False", None), ("", "True", None)]
)
def test_restarts_with_the_store_of_the_agent_are_told(
    monkeypatch: pytest.MonkeyPatch, restarts: str, is_shared: str, told: int | None
) -> None:
    """With TORCH_DISABLE_SHARE_RDZV_TCP_STORE each attempt makes a store."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", is_shared)

    assert process_facts(identify(Config()), Config()).get("store_restarts") == told
