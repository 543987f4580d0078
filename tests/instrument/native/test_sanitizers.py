"""The hooks in C touch no memory that is not theirs, and do nothing that C leaves undefined."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hatch_build import HOT_PATH, BuildError, build

from tests.aggregator.conftest import ROOT

# Each access of torch to its own memory is watched too: a loaded machine takes a minute.
pytestmark = [pytest.mark.process, pytest.mark.needs("compiler"), pytest.mark.timeout(300)]

_SEEDS = ("1", "2", "3")
_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """The hooks with checks of each access to memory and of each operation."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    try:
        return build(tree, HOT_PATH, _FLAGS)
    except BuildError as error:
        pytest.skip(f"the compiler has no sanitizers, or there are no headers of Python: {error}")


def runtime_of_sanitizers() -> str:
    """Return gcc's library of AddressSanitizer, which must be loaded before all others."""
    compiler = shutil.which("gcc")
    path = "" if compiler is None else subprocess.check_output([compiler, "-print-file-name=libasan.so"], text=True)
    if not Path(path.strip()).is_absolute():
        pytest.skip("gcc's library of AddressSanitizer is not installed")

    return path.strip()


def test_random_loops(library: Path, tmp_path: Path) -> None:
    """Loops with everything that may come in a step, some of it failing, end without an error and with rows."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACEML_")}
    own = {
        "LD_PRELOAD": runtime_of_sanitizers(),
        "PYTHONMALLOC": "malloc",  # each object is a block of its own, whose ends are watched
        # Python frees little at its end; torch's own libraries are not what is tested.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.instrument.native.sanitized_loops", str(library), str(tmp_path), *_SEEDS]

    done = subprocess.run(command, cwd=ROOT, env=kept | own, capture_output=True, text=True, timeout=280, check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    rows = [int(count) for count in done.stdout.split()]
    assert len(rows) == len(_SEEDS)
    assert min(rows) > 0
