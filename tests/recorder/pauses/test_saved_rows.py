"""Rows of checkpoints: file, bytes and the user's line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


def test_sizes_of_files_and_folders(tmp_path):
    """A folder counts the files in it; what is gone is not known."""
    (tmp_path / "a").write_bytes(bytes(10))
    folder = Path(tmp_path / "checkpoint")
    folder.mkdir()
    (folder / "b").write_bytes(bytes(20))

    assert size_of([str(tmp_path / "a"), str(folder)]) == 30
    assert size_of([str(tmp_path / "gone")]) == -1
    assert size_of(["\0"]) == -1
    assert size_of([]) == -1
