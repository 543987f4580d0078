"""Rows of checkpoints: file, bytes and the user's line."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import distributed

from traceml.database.flight.flight import FlightFile
from traceml.database.schema import PAUSES, Pause
from traceml.instrument import install
from traceml.recorder.pauses import pause_recorder
from traceml.recorder.pauses.pause_recorder import PauseRecorder, size_of
from traceml.recorder.user_code import UserCode


@pytest.fixture
def flight(tmp_path):
    found = FlightFile.create(tmp_path, {"rank": 0})
    yield found
    found.close(unlink=True)


def saved_rows(flight: FlightFile) -> list[dict[str, int]]:
    ring = flight.ring("pauses")
    rows = [PAUSES.struct.unpack_from(ring.buffer, ring.offset + at * PAUSES.row_bytes) for at in range(ring.appended)]
    named = [dict(zip(PAUSES.names, row, strict=True)) for row in rows]
    return [row for row in named if row["cause"] == Pause.SAVE]


def test_a_save_is_a_row_with_file_size_and_line(flight, tmp_path, monkeypatch):
    """torch.save to a path, and to an open file."""
    monkeypatch.setattr(pause_recorder, "LONG_NS", 0)
    hooks = install(flight)
    recorder = PauseRecorder(flight, lambda: False, UserCode().contains, hooks.saves)
    first, second = tmp_path / "model.pt", tmp_path / "open.pt"
    try:
        torch.save(torch.zeros(1000), first)
        with second.open("wb") as file:
            torch.save(torch.zeros(10), file)
    finally:
        recorder(last=True)
        hooks.uninstall()

    one, other = saved_rows(flight)
    assert (one["size_bytes"], other["size_bytes"]) == (first.stat().st_size, second.stat().st_size)
    assert one["text_id"] not in (-1, other["text_id"])
    assert one["line_id"] not in (-1, other["line_id"])
    assert one["ns"] > 0


def test_the_size_is_that_at_the_end_of_the_save(flight, tmp_path, monkeypatch):
    """Scripts rename a file once it is written, or write the next one to the same path."""
    monkeypatch.setattr(pause_recorder, "LONG_NS", 0)
    hooks = install(flight)
    recorder = PauseRecorder(flight, lambda: False, UserCode().contains, hooks.saves)
    path, renamed = tmp_path / "last.pt", tmp_path / "best.pt"
    try:
        torch.save(torch.zeros(1000), path)
        size = path.stat().st_size
        path.rename(renamed)
        torch.save(torch.zeros(1000), path)
        path.write_bytes(b"")
    finally:
        recorder(last=True)
        hooks.uninstall()

    assert [row["size_bytes"] for row in saved_rows(flight)] == [size, size]


@pytest.mark.parametrize(("name", "is_known"), [("save", True), ("async_save", False)])
def test_a_distributed_checkpoint_counts_each_file_once(flight, tmp_path, monkeypatch, name, is_known):
    """Its files are in its folder, and both are seen; a thread that still writes has no size yet."""
    monkeypatch.setattr(pause_recorder, "LONG_NS", 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    hooks = install(flight)
    recorder = PauseRecorder(flight, lambda: False, UserCode().contains, hooks.saves)
    checkpoint = importlib.import_module("torch.distributed.checkpoint")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        saved = getattr(checkpoint, name)({"a": torch.zeros(5000), "step": 3}, checkpoint_id=tmp_path / "checkpoint")
        if not is_known:
            saved.result()
    finally:
        distributed.destroy_process_group()
        recorder(last=True)
        hooks.uninstall()

    (row,) = saved_rows(flight)
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir())
    assert row["size_bytes"] == (written if is_known else -1)
    assert row["detail"] == (not is_known)


def test_sizes_of_files_and_folders(tmp_path):
    """A folder counts the files in it, those that were saved one by one too; what is gone is not known."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "b").write_bytes(bytes(20))
    targets = [str(tmp_path / "a"), str(folder / "b"), f"{folder}/"]

    assert size_of(targets, [10, 20, None]) == 30
    assert size_of(targets, [10, -1, None]) == -1
    assert size_of([str(tmp_path / "gone")], [None]) == -1
    assert size_of([], []) == -1
