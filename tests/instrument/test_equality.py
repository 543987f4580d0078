"""Losses, weights, random numbers and the user's hooks are the same with tracing and without; nothing is left of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.aggregator.conftest import ROOT, TOKEN, Serving
from tests.eventually import eventually
from tests.forked import client as forked
from tests.instrument.equal_trainings import ON_ONE_RANK, ON_TWO_RANKS

SCRIPT = "tests.instrument.equality_ranks"


@pytest.mark.process
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_is_equal_and_nothing_is_left(world_size: int, tmp_path: Path) -> None:
    """Of each training: bit for bit, during tracing and after `shutdown`, and its steps are stored."""
    serving = Serving(tmp_path / "runs", tmp_path / "log")
    own = {"TRACEML_PORT": str(serving.port), "TRACEML_TOKEN": TOKEN, "TRACEML_RUNS_DIR": str(serving.folder)}
    own |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size), "TRACEML_RUN_ID": "equal"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACEML_")}
    try:
        ranks = [
            forked.Popen(
                [sys.executable, "-m", SCRIPT, f"{rank}", f"{world_size}", f"{tmp_path}/store", f"{tmp_path}/{rank}"],
                env=kept | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT,
                stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for rank, process in enumerate(ranks):
            _, stderr = process.communicate(timeout=240)
            assert process.returncode == 0, stderr
            found = json.loads((tmp_path / str(rank)).read_text())
            assert (found["traced"], found["afterwards"], found["left"]) == ([], [], [])

        eventually(lambda: serving.state() == "finished")
        with serving.store() as store:
            steps = Counter(int(stream) for stream in store.rows("steps")["stream"])

        trainings = ON_ONE_RANK if world_size == 1 else ON_TWO_RANKS
        assert all(count >= 5 * len(trainings) for count in steps.values()), steps
        assert len(steps) == world_size
    finally:
        serving.close()
