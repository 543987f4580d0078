"""Identity of a recorder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from traceml import settings
from traceml.ids import RankIdentity
from traceml.recorder.identity import Identity, identify, script_name

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone() -> None:
    """Rank 0 of 1, in a job that no other process shares, with rows of its own at each start."""
    config = settings.load({}, Path("/proc"))
    first, second = identify(config), identify(config)

    assert (first.rank_identity.rank, first.rank_identity.world_size, first.provisional) == (0, 1, False)
    assert first.job != second.job
    assert first.recorder != second.recorder


def test_a_run_id_is_the_job() -> None:
    """The user's run id is the key by which ranks find each other."""
    assert identify(settings.load({}, Path("/proc"), run_id="mine")).job == "mine"


def test_hello_and_flight_file_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The aggregator knows a dead rank's file by the same words."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = settings.load({}, Path("/proc"), run_name="name", project="p")
    identity = identify(config)
    hello, facts = identity.hello(config, Path("/x.flight")), identity.facts(config)

    assert (hello.run, hello.name, hello.project, hello.flight) == (identity.job, "name", "p", "/x.flight")
    assert facts["job"] == hello.run
    for name in ("rank", "world_size", "local_rank", "attempt", "host", "recorder"):
        assert facts[name] == getattr(hello, name)


@pytest.mark.parametrize(
    ("launcher", "job"),
    [
        ({}, "group@first:29500"),
        ({"TORCHELASTIC_RUN_ID": "7"}, "alone"),
        ({"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"}, "alone"),
    ],
)
def test_a_rank_that_sets_the_address_itself_is_of_that_group(
    monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str], job: str
) -> None:
    """Its other ranks, which it has started, have the address from their start on; a launcher's job stays."""
    before = Identity("a", "alone", RankIdentity(), provisional=False)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500", **launcher}.items():
        monkeypatch.setenv(name, value)

    grouped = RankIdentity(0, 2, 0, source="torch.distributed")
    monkeypatch.setattr("traceml.recorder.identity.detect_rank", lambda **_options: grouped)

    assert identify(settings.load({}, Path("/proc")), before).job == job


@pytest.mark.parametrize(
    ("argv0", "name"),
    [
        ("/x/train.py", "train"),
        ("/x/pkg/__main__.py", "pkg"),
        ("pkg.train", "pkg.train"),
        ("-c", "python"),
        ("", "python"),
        ("/usr/lib/ipykernel_launcher.py", "notebook"),
        ("/usr/lib/ray/_private/workers/default_worker.py", "ray"),
        ("default_worker.py", "default_worker"),
    ],
)
def test_a_run_is_called_as_its_script(monkeypatch: pytest.MonkeyPatch, argv0: str, name: str) -> None:
    """Scripts, packages, notebooks and bare interpreters."""
    monkeypatch.setattr(sys, "argv", [argv0])

    assert script_name() == name


@pytest.mark.parametrize(
    ("started", "argv", "command"),
    [
        (["python", "-m", "json.tool", "--help"], ["/lib/json/tool.py", "--help"], "-m json.tool --help"),
        (["python", "/x/traceml/session/entry.py", "-m", "pkg"], ["pkg.py"], "-m pkg"),
        (["python", "-um", "pkg", "a b"], ["/x/pkg/__main__.py", "a b"], "-m pkg 'a b'"),
        (["python", "-m", "agent.worker"], ["train.py", "--lr", "3"], "train.py --lr 3"),
        (["python", "train.py"], ["train.py"], "train.py"),
        (["python", "-m", "json.tool"], [""], "''"),
    ],
)
def test_the_command_of_a_module(
    monkeypatch: pytest.MonkeyPatch, started: list[str], argv: list[str], command: str
) -> None:
    """As it was typed, not the file that Python has found; a process that only forked from a module has its own."""
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("TRACEML_COMMAND", raising=False)

    config = settings.load({}, Path("/proc"))

    assert identify(config).hello(config, None).command == command
