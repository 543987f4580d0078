"""Files that a package registry would refuse, or that would not work, are told with the reason."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from release import registry

METADATA = """\
Metadata-Version: 2.4
Name: traceml-torch
Version: 0.1.0
Summary: a summary
License-Expression: Apache-2.0
Requires-Dist: numpy>=1.26
Description-Content-Type: text/markdown

# traceml
"""
PURE, NATIVE = "py3-none-any", "cp311-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64"
LIBRARY = "traceml/instrument/native/_hot_path.abi3.so"
LICENSE = "traceml_torch-0.1.0.dist-info/licenses/LICENSE"


def wheel(folder: Path, tag: str, *names: str, metadata: str = METADATA, without: str = "") -> Path:
    """Write a wheel that has what each must have, and some more files."""
    path = folder / f"traceml_torch-0.1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("traceml_torch-0.1.0.dist-info/METADATA", metadata)
        for name in {*registry._IN_WHEEL, LICENSE, *names} - {without}:
            file.writestr(name, "")

    return path


def sdist(folder: Path, *names: str, without: str = "") -> Path:
    """Write a source distribution that has what each must have, and some more files."""
    path = folder / "traceml_torch-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name in ["PKG-INFO", *sorted({*registry._IN_SDIST, *names} - {without})]:
            text = METADATA.encode() if name == "PKG-INFO" else b""
            member = tarfile.TarInfo(f"traceml_torch-0.1.0/{name}")
            member.size = len(text)
            file.addfile(member, io.BytesIO(text))

    return path


def test_good_files(tmp_path: Path) -> None:
    """A pure wheel, one with a manylinux tag, and a source distribution."""
    assert registry.refusals(wheel(tmp_path, PURE)) == []
    assert registry.refusals(wheel(tmp_path, NATIVE, LIBRARY)) == []
    assert registry.refusals(sdist(tmp_path)) == []


@pytest.mark.parametrize(
    ("tag", "names", "without", "reason"),
    [
        ("cp311-abi3-linux_x86_64", (LIBRARY,), "", "its platform 'linux_x86_64' is of one machine"),
        (PURE, (LIBRARY,), "", f"is for any platform, but contains {LIBRARY}"),
        (NATIVE, (), "", "is for one platform, but contains nothing that was compiled"),
        (PURE, (), "traceml/py.typed", "lacks traceml/py.typed"),
        (PURE, (), LICENSE, "lacks its license"),
        (PURE, ("traceml/__pycache__/a.pyc",), "", "contains traceml/__pycache__/a.pyc"),
    ],
)
def test_wheels_that_are_refused(tmp_path: Path, tag: str, names: tuple[str, ...], without: str, reason: str) -> None:
    """With one reason each."""
    (found,) = registry.refusals(wheel(tmp_path, tag, *names, without=without))

    assert found.startswith(reason)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Version: 0.1.0", "Version: 0.1.0+here", "its version 0.1.0+here is local"),
        ("Version: 0.1.0", "Version: soon", "'soon' is invalid for 'version'"),
        ("numpy>=1.26", "numpy @ https://example.org/numpy.whl", "a registry refuses direct references"),
        ("Apache-2.0", "Apache, mostly", "'Apache, mostly' is invalid for 'license-expression'"),
        ("# traceml\n", "", "has no description"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, old: str, new: str, reason: str) -> None:
    """Metadata that breaks a rule of its fields."""
    found = registry.refusals(wheel(tmp_path, PURE, metadata=METADATA.replace(old, new)))

    assert [reason in each for each in found] == [True]


def test_source_distributions_that_are_refused(tmp_path: Path) -> None:
    """Without an example, or with a library of this machine."""
    assert registry.refusals(sdist(tmp_path, without="examples/mnist.py")) == ["lacks examples/mnist.py"]
    assert registry.refusals(sdist(tmp_path, f"src/{LIBRARY}")) == [f"contains src/{LIBRARY}, which was compiled here"]


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of the registry, and the size."""
    monkeypatch.setattr(registry, "_MAX_BYTES", 100)
    (found,) = registry.refusals(wheel(tmp_path, PURE))

    assert "a registry takes 100" in found
