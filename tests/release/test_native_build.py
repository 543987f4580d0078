"""The native parts are built where they can be; else the package is installed without them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from hatch_build import HOT_PATH, SCANNER, BuildError, build
from hatchling.build import build_editable

from tests.forked import client as forked

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.process, pytest.mark.needs("compiler")]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree without native parts."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_the_scanner_is_built(tree: Path) -> None:
    """Beside its sources, and nothing is left but the library."""
    library = build(tree, SCANNER)

    assert library == tree / SCANNER.path
    assert ctypes.CDLL(str(library)).traceml_version() > 0
    assert list(library.parent.glob("*.so*")) == [library]


def test_an_editable_package_has_bytecode(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every process compiles all modules again where PYTHONDONTWRITEBYTECODE is set, as in many containers."""
    (tree / "docs").mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "docs/verdicts.md"):
        shutil.copy(ROOT / name, tree / name)

    monkeypatch.chdir(tree)
    monkeypatch.setenv("CC", "false")  # the native parts are not what this is about
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    build_editable(str(tmp_path))

    sources, compiled = ([*(tree / "src").rglob(pattern)] for pattern in ("*.py", "*.pyc"))
    assert len(compiled) == len(sources) > 0


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


TRAIN = """
import torch, traceml
from traceml.instrument.native.extension import extension

traceml.init(local=True, quiet=True)
net = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(20):
    net(torch.ones(3, 2)).mean().backward()
    optimizer.step()

traceml.shutdown()
steps = traceml.load_run().steps()
print(traceml.__file__, extension() is not None, len(steps), steps["warmup_ns"].sum(), (steps["forward_ns"] > 0).all())
"""


def test_a_new_phase_is_one_line_of_the_schema(tree: Path) -> None:
    """The hooks in C are compiled for it, and write its column as one without time."""
    schema = tree / "src" / "traceml" / "database" / "schema.py"
    text = schema.read_text()
    last = re.search(r"    USER = (\d+), .*\n", text)
    assert last is not None
    new = f'    WARMUP = {int(last[1]) + 1}, "heating the device"\n'
    schema.write_text(text[: last.end()] + new + text[last.end() :])
    build(tree, HOT_PATH)

    environ = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN]
    done = forked.run(command, forks=True, cwd=tree, env=environ, capture_output=True, text=True, timeout=240)

    assert done.stderr == ""
    assert done.stdout.split() == [str(tree / "src" / "traceml" / "__init__.py"), "True", "20", "0", "True"]
