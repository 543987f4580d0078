"""Saved checkpoints are marked with their number of steps, and files that are read before the first step are told."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from traceml.database.flight.flight import FlightFile
from traceml.database.schema import Slot
from traceml.instrument import install
from traceml.instrument.checkpoints.checkpoint_marks import folder_number


def test_a_place_is_the_folder(tmp_path: Path) -> None:
    """Files of one folder have one place, however they are named; memory has none."""
    (tmp_path / "link").symlink_to(tmp_path)
    file = tmp_path / "a.pt"
    with file.open("wb") as opened:
        places = [folder_number(each) for each in (file, str(tmp_path / "b.pt"), tmp_path / "link" / "c.pt", opened)]

    assert len(set(places)) == 1
    assert places[0] != folder_number(tmp_path / "other" / "a.pt")
    assert folder_number(io.BytesIO()) is None


@pytest.fixture
def traced(tmp_path: Path) -> Any:
    """A flight file, the rows of `info`, and a traced model."""
    flight = FlightFile.create(tmp_path, {})
    rows: list[dict[str, Any]] = []
    running = install(flight, on_info=rows.append)
    yield flight, rows
    running.uninstall()
    flight.close(unlink=True)


def train(steps: int, size: int = 1) -> None:
    model = torch.nn.Linear(4, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.randn(steps, 4))
    for x in loader:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()


def test_a_save_after_five_steps_holds_five(tmp_path: Path, traced: Any) -> None:
    """Saved after the loop: the last update is in it. A failed save and one into memory are no checkpoint."""
    flight, _ = traced
    train(5)
    torch.save({}, io.BytesIO())
    with pytest.raises(RuntimeError):
        torch.save({}, tmp_path / "missing" / "a.pt")
    before = flight.open_slots[Slot.SAVED_IN]

    torch.save({}, tmp_path / "a.pt")

    assert before == 0
    assert flight.open_slots[Slot.SAVED] == 5
    assert flight.open_slots[Slot.SAVED_IN] == folder_number(tmp_path / "a.pt")


def test_a_file_that_is_too_small_for_the_model_is_no_checkpoint(tmp_path: Path, traced: Any) -> None:
    """Metrics that are saved more often than the model: of the steps since then all are lost."""
    flight, _ = traced
    train(5, size=4000)
    torch.save({"model": torch.zeros(20_000, dtype=torch.uint8)}, tmp_path / "model.pt")
    train(3, size=4000)
    torch.save({"losses": [0.5] * 8}, tmp_path / "losses.pt")
    assert flight.open_slots[Slot.SAVED] == 5

    with (tmp_path / "open.pt").open("wb") as opened:  # its end is not written yet: its size is not known
        torch.save({"losses": [0.5] * 8}, opened)

    assert flight.open_slots[Slot.SAVED] == 8


def test_a_checkpoint_that_another_thread_saves_counts(tmp_path: Path, traced: Any) -> None:
    """It has the updates of its begin; one that ends after a newer one does not replace that."""
    flight, _ = traced
    train(5)
    began, may_end = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self) -> Any:
            began.set()
            assert may_end.wait(60)
            return int, ()

    def save(value: Any) -> threading.Thread:
        thread = threading.Thread(target=torch.save, args=(value, tmp_path / f"{id(value)}.pt"))
        thread.start()
        return thread

    slow = save(Slow())
    assert began.wait(60)
    train(3)
    save({}).join()
    assert flight.open_slots[Slot.SAVED] == 8

    may_end.set()
    slow.join()
    assert flight.open_slots[Slot.SAVED] == 8


def test_only_files_read_before_training_are_reported(tmp_path: Path, traced: Any) -> None:
    """Later ones are no start."""
    _, rows = traced
    torch.save({"x": 1}, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt")
    train(3)
    (tmp_path / "other").mkdir()
    torch.save({}, tmp_path / "other" / "b.pt")
    torch.load(tmp_path / "other" / "b.pt")

    assert loaded == {"x": 1}
    assert [row["place"] for row in rows if row["kind"] == "loaded"] == [folder_number(tmp_path / "a.pt")]
