"""A host uses its own files only where they are the launcher's, and nobody else could have written them."""

from __future__ import annotations

import os
from pathlib import Path

import msgpack
import pytest

from traceml.launch.launcher.hosts.package_check import files_stamp, has_files


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with two modules."""
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(f"value = '{name}'\n")

    return tmp_path


def test_the_same_files_are_used_whenever_they_were_written(package: Path) -> None:
    """Names and contents count: an installation on another day is the same."""
    stamp = files_stamp([str(package)])
    os.utime(package / "one.py", (1, 1))
    (package / "notes.txt").touch()

    assert has_files([str(package)], stamp, {"msgpack": str(msgpack.__file__)})


def test_other_files_are_not_used(package: Path) -> None:
    """One byte, one more module, a missing folder, or a library from elsewhere."""
    stamp = files_stamp([str(package)])
    assert not has_files([str(package)], stamp, {"msgpack": "/elsewhere/msgpack/__init__.py"})
    assert not has_files([str(package)], stamp, {"no_such_module": "/elsewhere.py"})
    assert not has_files([str(package / "missing")], stamp, {})

    (package / "three.py").touch()
    assert not has_files([str(package)], stamp, {})

    (package / "three.py").unlink()
    assert has_files([str(package)], stamp, {})
    (package / "two.py").write_text("value = 'TWO.py'\n")
    assert not has_files([str(package)], stamp, {})


def test_files_that_others_could_have_written_are_not_used(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder belongs to root, to the user or to the owner of the interpreter, and not to everyone."""
    folders, stamp = [str(package)], files_stamp([str(package)])
    package.chmod(0o777)
    assert not has_files(folders, stamp, {})

    package.chmod(0o755)
    assert has_files(folders, stamp, {})
    owners = {str(package): 4242}
    real = os.stat

    def stat(path: str) -> os.stat_result:
        found = list(real(path))
        found[4] = owners.get(path, found[4])
        return os.stat_result(found)

    monkeypatch.setattr(os, "stat", stat)
    assert not has_files(folders, stamp, {})
