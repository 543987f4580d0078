"""Scripts in processes of their own, and a real aggregator for them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import traceml
from tests.aggregator.conftest import TOKEN, Serving
from tests.database.info_rows import undeclared
from tests.eventually import eventually
from tests.forked import client as forked
from traceml.database.store.reader import StoreReader
from traceml.recorder.lifecycle import shutdown
from traceml.run_folder import STORE_NAME

ENTRY = str(Path(traceml.__file__).parent / "session" / "entry.py")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """A real aggregator."""
    server = Serving(tmp_path / "runs", tmp_path / "aggregator.log")
    yield server
    shutdown()  # while the aggregator can take the last rows
    server.close()


@pytest.fixture
def quiet_process() -> Iterator[None]:
    """Leave no recorder behind in this process."""
    yield
    shutdown()


def environ(tmp_path: Path, **values: str) -> dict[str, str]:
    """An environment without settings of the machine or of an outer run."""
    launchers = ("TRACEML", "TORCHELASTIC", "SLURM", "OMPI_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    return kept | {"XDG_CONFIG_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "TRACEML_QUIET": "1"} | values


@pytest.fixture
def run_script(tmp_path: Path, serving: Serving) -> Run:
    """Run code as a script that finds the aggregator through its environment."""

    def run(code: str, *arguments: str, entry: bool = False, **values: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(code))
        by = [ENTRY] if entry else []
        aggregator = {
            "TRACEML_PORT": str(serving.port), "TRACEML_TOKEN": TOKEN, "TRACEML_RUNS_DIR": str(serving.folder),
        }  # fmt: skip
        if serving.process.poll() is None:  # a busy one may take longer than a user waits
            aggregator["TRACEML_CONNECT_TIMEOUT"] = "120"

        start = partial(forked.run, forks=True) if "torch" in code else subprocess.run
        done = start(
            [sys.executable, *by, str(script), *arguments],
            env=environ(tmp_path, **(aggregator | values)),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        # It waits some seconds for its last rows to be stored, and a busy aggregator may need longer.
        eventually(lambda: serving.process.poll() is not None or _know_ends(serving), "the end of its ranks")
        return done

    return run


def _know_ends(serving: Serving) -> bool:
    """Whether each rank has ended. One that came a moment ago may not be in the store yet."""
    for path in (run_dir / STORE_NAME for run_dir in serving.run_dirs):
        with StoreReader(path) as store:
            states = [stream.state for stream in store.streams()]

        if not states or "running" in states:
            return False

    return True


def exit_rows(serving: Serving) -> list[dict[str, Any]]:
    """The newest run's rows on how its ranks ended."""
    with serving.store() as store:
        rows = [row for _, row in store.log_rows("info")]

    assert undeclared(rows) == set()
    return [row for row in rows if row["kind"] == "exit"]


def stored_steps(serving: Serving) -> list[int]:
    """The newest run's steps, in the order of the store."""
    with serving.store() as store:
        return [int(step) for step in store.rows("steps")["step"]]
