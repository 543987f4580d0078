"""Files of ours, and of the user's, also where our code was compiled on another host."""

from __future__ import annotations

import pdb
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.compilerop import CachingCompiler

from traceml.inspection import user_files


def test_our_files_are_known_by_both_names() -> None:
    """A launch sends its code, compiled, to hosts that import it from a zip file."""
    source = Path(user_files.__file__).read_text()
    names: dict[str, Any] = {"__file__": "/proc/7/fd/3/traceml/inspection/user_files.py", "__name__": "user_files"}
    exec(compile(source, "/home/me/src/traceml/inspection/user_files.py", "exec"), names)

    for root in ("/proc/7/fd/3", "/home/me/src"):
        assert names["is_package_file"](f"{root}/traceml/instrument/backward.py")
        assert not names["is_user_file"](f"{root}/traceml/instrument/backward.py")
        assert not names["is_user_file"](f"{root}/traceml_torch/__init__.py")

    assert not names["is_package_file"]("/home/me/src/train.py")
    assert names["is_user_file"]("/home/me/src/train.py")


def test_a_cell_is_shown_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in IPython's own tracebacks; other files, and all outside of a shell, are shown as they are."""
    compiler = CachingCompiler()
    cell = compiler.cache("train()", number=3)
    shells = iter([None, *[SimpleNamespace(compile=compiler)] * 2, SimpleNamespace()])
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: next(shells)))

    shown = [user_files.display_path(path) for path in (cell, cell, "/home/me/train.py", cell)]
    assert shown == [cell, "In[3]", "/home/me/train.py", cell]
    monkeypatch.delitem(sys.modules, "IPython")
    assert user_files.display_path(cell) == cell


def test_the_way_to_a_file_is_not_shown(tmp_path: Path) -> None:
    """Python names a script as it was started; `..` after a link leads elsewhere than its text says."""
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")

    assert user_files.display_path(f"{tmp_path}/real/inner/../train.py") == f"{tmp_path}/real/train.py"
    assert user_files.display_path(f"{tmp_path}/link/../train.py") == f"{tmp_path}/real/train.py"
    assert user_files.display_path(f"{tmp_path}/link/train.py") == f"{tmp_path}/link/train.py"


def test_a_module_of_the_user_is_no_debugger() -> None:
    """Protein data are in files called PDB; Python itself may be another one than ours."""
    debuggers = [pdb.__file__, "/opt/conda/lib/python3.13t/bdb.py", "/venv/lib/python3.11/site-packages/debugpy/x.py"]
    others = ["/home/me/data/pdb.py", "/venv/lib/python3.11/site-packages/openfold/data/pdb.py"]

    assert all(map(user_files.is_debugger, debuggers))
    assert not any(map(user_files.is_debugger, others))
