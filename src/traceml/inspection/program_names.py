"""Names of programs: a process's own name, and for Python the script or module that it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from traceml.privacy import secrets_only

__all__ = ["program_name", "python_module", "python_program"]

_MAX_CHARS = 60
_THREAD_NAMES = ("python", "pt_main_thread", "pypy")  # what a Python process is called; torch renames its own
_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")
_FLAGS = re.compile("-[a-zA-VY-Z]*[cm]")  # -c, -m, -um
_ENTRY = "/traceml/session/entry.py"  # runs a script
_HELPERS = {
    "from multiprocessing.spawn": "multiprocessing",
    "from multiprocessing.forkserver": "multiprocessing",
    "from multiprocessing.resource_tracker": "multiprocessing",
}


def program_name(pid: int, proc: Path = Path("/proc")) -> str:
    """Return the name of a process as `top` shows it; that of Python with its script or module: `python train.py`.

    Arguments of the script are left out, and secrets are masked. Empty if the process has ended.
    """
    try:
        name = (proc / str(pid) / "comm").read_text("utf-8", "replace").strip()
        if not name.startswith(_THREAD_NAMES):
            return name

        command = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""

    return python_program(os.fsdecode(command).split("\0"), name)


def python_program(command: Sequence[str], name: str = "python") -> str:
    """Return `python train.py` or `python -m package` for the command line of a Python process.

    Args:
        name: what is returned if they do not show it.
    """
    if not Path(command[0]).name.startswith(_THREAD_NAMES):
        return name  # it has given itself another command line

    runs = _runs(iter(command[1:]))
    return f"python {secrets_only().mask_text(runs)[:_MAX_CHARS]}" if runs else "python"


def python_module(command: Sequence[str]) -> str:
    """Return the module that the command line of a Python process runs by `-m`; empty for any other."""
    runs = _runs(iter(command[1:]))
    return runs.removeprefix("-m ") if runs.startswith("-m ") else ""


def _runs(arguments: Iterable[str]) -> str:
    rest = iter(arguments)
    for argument in rest:
        if argument in _WITH_VALUE:
            next(rest, None)
        elif not argument.startswith("-"):
            return _runs(rest) if argument.endswith(_ENTRY) else Path(argument).name
        elif _FLAGS.fullmatch(argument):
            value = next(rest, "")
            return f"-m {value}" if argument.endswith("m") else _code_text(value)

    return ""


def _code_text(code: str) -> str:
    return next((f"({name})" for start, name in _HELPERS.items() if code.startswith(start)), "-c")
