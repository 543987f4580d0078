"""The skill for assistants: every command in it works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cli.test_mcp import TRAIN, WAIT, environ
from tests.eventually import eventually
from tests.forked import client as forked
from tests.ports import free_port

SKILL = Path(__file__).parents[3] / "skills" / "traceml" / "SKILL.md"


def _commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", SKILL.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_it_has_a_name_and_a_description() -> None:
    """As assistants expect it: the description says when to use it."""
    head = re.match(r"---\nname: (\S+)\ndescription: (.+)\n---\n", SKILL.read_text())

    assert head is not None
    assert head.group(1) == SKILL.parent.name
    assert len(head.group(2)) <= 1024


def test_every_command_works(tmp_path: Path) -> None:
    """In its order, in one folder; those about a running job while one runs. What is told to be JSON is JSON."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "wait.py").write_text(TRAIN + WAIT)
    commands = _commands()
    assert len(commands) >= 12
    for command in commands:
        assert command.startswith("traceml ")
        if command.split()[1] in ("stacks", "top"):
            _with_a_job(tmp_path, command)
        else:
            _check(tmp_path, command)


def _with_a_job(folder: Path, command: str) -> None:
    words = [sys.executable, "-m", "traceml", "run", "--live", "none", "wait.py"]
    with (
        (folder / "errors.txt").open("w") as errors,
        forked.Popen(
            words,
            forks=True,
            cwd=folder,
            env=environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as job,
    ):
        assert job.stdout is not None
        assert "trained" in job.stdout.readline(), (folder / "errors.txt").read_text()
        asks = [sys.executable, "-m", "traceml", "stacks"]
        options: dict[str, Any] = {"cwd": folder, "env": environ(), "capture_output": True}
        eventually(lambda: not forked.run(asks, forks=True, **options).returncode, "the rank to be connected")
        _check(folder, command)
        job.communicate("\n", timeout=240)


def _check(folder: Path, command: str) -> None:
    words = [sys.executable, "-m", *shlex.split(command)]
    env = environ()
    if "doctor" in words:  # the aggregator of a test beside this one may end at the usual port just then
        env["TRACEML_PORT"] = str(free_port())

    done = forked.run(words, forks=True, cwd=folder, env=env, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    if "--json" in words:
        json.loads(done.stdout)
