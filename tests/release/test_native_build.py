"""The native parts are built where they can be; else the package is installed without them."""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

import pytest
from hatch_build import HOT_PATH, SCANNER, BuildError, build

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.process, pytest.mark.needs("compiler")]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with the sources of the native parts."""
    for part in (SCANNER, HOT_PATH):
        shutil.copytree(ROOT / part.folder, tmp_path / part.folder, ignore=shutil.ignore_patterns("*.so"))

    return tmp_path


def test_the_scanner_is_built(tree: Path) -> None:
    """Beside its sources, and nothing is left but the library."""
    library = build(tree, SCANNER)

    assert library == tree / SCANNER.path
    assert ctypes.CDLL(str(library)).traceml_version() > 0
    assert list(library.parent.glob("*.so*")) == [library]


@pytest.mark.parametrize("compiler", ["/nonexistent/cc -m64", "false"])
def test_a_compiler_that_cannot_compile(tree: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    """One that is not there, or fails, is told with its command; nothing is left."""
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(BuildError, match=compiler.split(maxsplit=1)[0]):
        build(tree, SCANNER)

    assert list((tree / SCANNER.folder).glob("*.so*")) == []


def test_free_threaded_python_gets_no_hooks_in_c(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stable ABI does not cover it; the scanner, which does not use Python, is built."""
    monkeypatch.setattr(sys, "abiflags", "t")
    with pytest.raises(BuildError, match="free-threaded Python has no stable ABI"):
        build(tree, HOT_PATH)

    assert build(tree, SCANNER).exists()
