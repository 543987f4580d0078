"""Folder of the checkpoints that a traced script really saves."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from tests.instrument.conftest import Traced
from traceml.instrument.checkpoints.save_log import SaveFolder


def test_torch_save_tells_its_folder(traced: Traced, tmp_path: Path) -> None:
    """By a path or an open file; a buffer in memory has none."""
    torch.save({}, io.BytesIO())
    without = traced.instrumentation.save_folder.path
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "last.pt").open("wb") as file:
        torch.save({}, file)

    torch.save({}, f=tmp_path / "out" / "best.pt")

    assert without is None
    assert [row["folder"] for row in traced.info if row["kind"] == "saves"] == [str(tmp_path / "out")]


def test_a_distributed_checkpoint_is_a_folder_itself(traced: Traced, tmp_path: Path) -> None:
    """The folder is the one that has it."""
    from torch.distributed import checkpoint  # imports sympy: not in each worker that collects this file

    checkpoint.save({"weight": torch.zeros(2)}, checkpoint_id=tmp_path / "step-1", no_dist=True)

    assert traced.instrumentation.save_folder.path == str(tmp_path)


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["/data/run/checkpoint-1/model.pt", "/data/run/checkpoint-2/model.pt"], "/data/run"),
        (["/data/run/a.pt", "/scratch/b.pt"], "/scratch"),  # nothing in common
        (["/data/run/a.pt", "s3://bucket/a.pt"], "/data/run"),
        ([3, None], None),
    ],
)
def test_a_folder_for_each_checkpoint_is_in_one_folder(paths, folder) -> None:
    """That one is named."""
    told: list[str] = []
    saves = SaveFolder(told.append)
    for path in paths:
        saves.record(path)

    assert saves.path == folder
    assert told[-1:] == ([folder] if folder else [])
