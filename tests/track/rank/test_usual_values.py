"""Usual values are appended in C: the same rows as in Python, and nothing where Python has to decide."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from traceml.database.flight.flight import FlightFile
from traceml.database.schema import METRICS, Slot
from traceml.instrument.native.extension import extension
from traceml.track.rank.logger import usual_writer

EXPERIMENT = 3


@pytest.fixture
def flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlightFile]:
    """An empty flight file in which no step is open."""
    monkeypatch.setenv("TRACEML_NATIVE", "1")
    if extension() is None:
        pytest.skip("the extension is not built: install the package with a compiler and Python's headers")

    flight = FlightFile.create(tmp_path / "flight", {})
    flight.open_slots[int(Slot.STEP)] = -1
    yield flight

    flight.close(unlink=True)


def rows(flight: FlightFile) -> list[tuple[Any, ...]]:
    ring = flight.metrics
    return list(METRICS.struct.iter_unpack(ring.read_from(0, ring.appended).data))


@pytest.mark.parametrize("value", [0.5, -0.0, 3, -(2**60), math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("step", [0, -1, 7, 2**62])
def test_the_row_is_the_one_of_python(flight: FlightFile, value: float, step: int) -> None:
    """All columns but the time are equal to the bit; the time is between two readings of the clock."""
    writer = usual_writer(flight, {"loss": [5, 0]}, EXPERIMENT)
    assert writer is not None
    before = time.time_ns()
    assert writer("loss", value, step) is True
    flight.metrics.append(time.time_ns(), step, 5, value, 0, EXPERIMENT)

    ours, python = rows(flight)
    assert before <= ours[0] <= python[0]
    assert METRICS.struct.pack(0, *ours[1:]) == METRICS.struct.pack(0, *python[1:])


def test_without_a_step_it_is_the_open_one(flight: FlightFile) -> None:
    """Where no step is open, Python counts."""
    writer = usual_writer(flight, {"loss": [5, 0]}, EXPERIMENT)
    assert writer is not None
    assert writer("loss", 1.0, None) is False
    flight.open_slots[int(Slot.STEP)] = 41
    assert writer("loss", 2.0, None) is True

    assert [row[1] for row in rows(flight)] == [41]


def test_values_of_the_training_thread_are_counted(flight: FlightFile) -> None:
    """And not those of another thread: they are no progress."""
    writer = usual_writer(flight, {"loss": [5, 0]}, EXPERIMENT)
    assert writer is not None
    assert writer("loss", 1.0, 0) is True
    flight.open_slots[int(Slot.TRAINING_THREAD)] = threading.get_ident()
    other = threading.Thread(target=writer, args=("loss", 2.0, 0))
    other.start()
    other.join()
    assert writer("loss", 3.0, 0) is True

    assert len(rows(flight)) == 3
    assert flight.open_slots[int(Slot.LOGGED)] == 1


@pytest.mark.parametrize(
    "given",
    [
        ("new", 1.0, 0), (b"loss", 1.0, 0), ([], 1.0, 0), ("loss", True, 0), ("loss", "1", 0), ("loss", None, 0),
        ("loss", 10**400, 0), ("loss", 1j, 0), ("loss", 1.0, 2**63), ("loss", 1.0, 0.5), ("loss", 1.0, True),
        ("loss", 1.0), (),
    ],
)  # fmt: skip
def test_what_is_not_usual_is_left_to_python(flight: FlightFile, given: tuple[Any, ...]) -> None:
    """It says so, without a row and without an error."""
    writer: Any = usual_writer(flight, {"loss": [5, 0]}, EXPERIMENT)

    assert writer(*given) is False
    assert rows(flight) == []


def test_a_row_of_another_thread_is_not_waited_for(flight: FlightFile) -> None:
    """While another thread appends, the value is left to Python, which waits; a signal handler goes on."""
    writer = usual_writer(flight, {"loss": [5, 0]}, EXPERIMENT)
    assert writer is not None
    taken: list[bool] = []
    with flight.metrics.lock:
        other = threading.Thread(target=lambda: taken.append(writer("loss", 1.0, 0)))
        other.start()
        other.join()
        assert writer("loss", 2.0, 0) is True

    assert taken == [False]
    assert [row[3] for row in rows(flight)] == [2.0]
    assert writer("loss", 3.0, 0) is True


def test_python_makes_room(flight: FlightFile) -> None:
    """A full ring is left to Python; afterwards values go to memory again."""
    writer, ring = usual_writer(flight, {"loss": [5, 0]}, EXPERIMENT), flight.metrics
    assert writer is not None
    full = next(number for number in range(2 * ring.capacity) if not writer("loss", number, 0))
    assert full == ring.appended == ring.limit
    assert ring.append(0, 0, 5, full, 0, EXPERIMENT)
    assert writer("loss", full + 1, 0) is True

    assert [row[3] for row in METRICS.struct.iter_unpack(ring.read_from(full - 2, 4).data)] == [
        full - 2.0, full - 1.0, full, full + 1.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [{"offset": -8}, {"offset": 4}, {"offset": 2**62}, {"mask": -1}, {"mask": 2**60}, {"slot": -1}, {"slot": 2**60}],
    ids=str,
)
def test_memory_that_is_too_small_is_refused(flight: FlightFile, changed: dict[str, int]) -> None:
    """A ring outside its memory is no place to write to."""
    ring = flight.metrics
    given = {"offset": ring.offset, "mask": ring.mask, "slot": ring.slot, **changed}
    memory = ring.buffer, given["offset"], given["mask"], ring.count, given["slot"]
    with pytest.raises(ValueError, match="does not fit"):
        extension().metric_writer({}, ring, ring.lock.acquire, ring.lock.release, flight.open_slots, memory, 0)


def test_without_the_extension_python_takes_all(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRACEML_NATIVE=0 leaves all values to the form in Python."""
    monkeypatch.setenv("TRACEML_NATIVE", "0")

    assert usual_writer(flight, {}, EXPERIMENT) is None
