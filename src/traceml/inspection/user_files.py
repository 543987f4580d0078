"""Files of the user's code, not of the standard library, an installed package, torch or traceml.

In a rank, frames are asked for through `recorder.user_code`.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "PACKAGE_FOLDERS",
    "display_path",
    "is_debugger",
    "is_import_machinery",
    "is_instrumentation",
    "is_package_file",
    "is_standard_library",
    "is_starter",
    "is_user_file",
    "working_folder",
]

_CELLS = ("<ipython-input-", "<command-", "<cell")  # of IPython, of Databricks, of those that number their own
_DEBUGGER_FOLDERS = ("/debugpy/", "/pydevd", "/_pydevd")
# Of any Python's standard library: a process that this one looks at may run another.
_PDB = re.compile(r"/python3[.\w]*/[bp]db\.py$")
_STANDARD = f"{Path(os.__file__).parent}/"
_FOLDERS = {str(Path(each).parent.parent) for each in (__file__, (lambda: None).__code__.co_filename)}
PACKAGE_FOLDERS = tuple(f"{folder}{ending}/" for folder in _FOLDERS for ending in ("", "_torch"))
"""Names of the folders of `traceml` and `traceml_torch` in tracebacks.

On another host of a launch the code comes from a zip file, and is named as where it was compiled.
"""
_INSTRUMENTATION = tuple(f"{folder}instrument/" for folder in PACKAGE_FOLDERS)
_SESSION = tuple(f"{folder}session/" for folder in PACKAGE_FOLDERS)


def is_package_file(path: str) -> bool:
    """Return whether a file belongs to traceml."""
    return path.startswith(PACKAGE_FOLDERS)


def is_instrumentation(path: str) -> bool:
    """Return whether a file belongs to what traceml does inside a training step, unasked."""
    return path.startswith(_INSTRUMENTATION)


def is_starter(path: str) -> bool:
    """Return whether a file belongs to what starts a script for `traceml run`."""
    return path.startswith(_SESSION)


def is_import_machinery(path: str) -> bool:
    """Return whether a file is Python's own of an import, which has four or five frames and is in no traceback."""
    return path.startswith("<frozen importlib.")


def is_standard_library(path: str) -> bool:
    """Return whether a file belongs to Python's standard library."""
    return path.startswith(("<frozen ", _STANDARD)) and not _is_installed(path)


def _is_installed(path: str) -> bool:
    return "/site-packages/" in path or "/dist-packages/" in path


def is_debugger(path: str) -> bool:
    """Return whether a file belongs to a debugger: pdb, debugpy, pydevd."""
    return _PDB.search(path) is not None or any(folder in path for folder in _DEBUGGER_FOLDERS)


def display_path(path: str) -> str:
    """Return the path under which a file of code is shown.

    A cell of a notebook is `In[3]` instead of its temporary file. A script that was started as `python ../train.py` has
    no `..` in its path.
    """
    if "/../" in path:
        return os.path.realpath(path)

    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return path

    try:
        cell = shell.compile.format_code_name(path)  # as in IPython's own tracebacks
    except Exception:  # noqa: BLE001 - another shell of the same name
        return path

    return path if cell is None else str(cell[1])


def working_folder() -> str:
    """Return the working directory; empty where it was removed, which a running program does not notice."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def is_user_file(path: str, modules: Any = None) -> bool:
    """Return whether a file of code is the user's; cells of a notebook are.

    Args:
        modules: the loaded modules; None: `sys.modules`.
    """
    if path.startswith("<"):
        return path.startswith(_CELLS)

    if _is_installed(path) or path.startswith((_STANDARD, *PACKAGE_FOLDERS)):
        return False

    torch = getattr((sys.modules if modules is None else modules).get("torch"), "__file__", None)
    return not (torch and path.startswith(f"{Path(torch).parent}/"))
