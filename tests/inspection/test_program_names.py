"""Names of programs by their command lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from traceml.inspection.program_names import program_name, python_program


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/usr/bin/python3.12 /home/me/train.py --lr 0.1", "python train.py"),
        ("python -u -X dev train.py", "python train.py"),
        ("python -m torch.distributed.run train.py", "python -m torch.distributed.run"),
        ("python /venv/lib/traceml/session/entry.py train.py --lr 1", "python train.py"),
        ("python -um pip list", "python -m pip"),
        ("python", "python"),
        ("python -c import", "python -c"),
        ("pt_main_thread train.py", "python train.py"),
        ("ray::Trainer.train", "worker"),
    ],
)
def test_the_script_or_module_is_reported(command: str, name: str) -> None:
    """Without the folder, options and arguments; a process that has renamed itself keeps its name."""
    assert python_program(command.split(), "worker") == name


def test_code_on_the_command_line_is_not_reported() -> None:
    """It may hold anything; a helper of multiprocessing is named as such."""
    spawned = "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5, pipe_handle=7)"

    assert python_program(["python", "-c", "login(token='s3cret')"]) == "python -c"
    assert python_program(["python", "-c", spawned, "--multiprocessing-fork"]) == "python (multiprocessing)"


def test_secrets_in_a_name_are_masked() -> None:
    """A script may be named by a token."""
    token = "hf_" + "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3z"

    assert token not in python_program(["python", f"/tmp/{token}.py"])


@pytest.mark.process
def test_a_running_script_has_its_name(tmp_path: Path) -> None:
    """As the kernel tells it; a process that has ended has none."""
    script = tmp_path / "takes_cores.py"
    script.write_text("print('ready', flush=True)\ninput()\n")
    command = [sys.executable, str(script), "--api-key", "s3cret"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert program_name(process.pid) == "python takes_cores.py"
        process.communicate("\n")

    assert program_name(process.pid) == ""


def test_other_programs_keep_their_names(tmp_path: Path) -> None:
    """Only Python's name says nothing."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "comm").write_text("ffmpeg\n")

    assert program_name(7, tmp_path) == "ffmpeg"
