"""Rows of compilations have the step in whose time they were: only its own row tells when it began."""

from __future__ import annotations

import pytest
import torch

from traceml.clock import monotonic_ns
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import PAUSES, STEPS, Pause, Slot
from traceml.recorder.pauses.pause_recorder import PauseRecorder
from traceml.recorder.user_code import UserCode


@pytest.fixture
def flight(tmp_path):
    found = FlightFile.create(tmp_path, {"rank": 0})
    yield found
    found.close(unlink=True)
    torch._dynamo.reset()


def compile_one() -> None:
    torch._dynamo.reset()
    torch.compile(lambda x: x.sin(), backend="eager")(torch.ones(3))


def end_step(flight: FlightFile, step: int, since_ns: int) -> int:
    """Append the row of a step; return its end."""
    now = monotonic_ns()
    row = {"step": step, "t_end_ns": now, "total_ns": now - since_ns}
    flight.ring("steps").append(*(row.get(name, 0) for name in STEPS.names))
    return now


def compiled_steps(flight: FlightFile) -> list[int]:
    ring = flight.ring("pauses")
    rows = [PAUSES.struct.unpack_from(ring.buffer, ring.offset + at * PAUSES.row_bytes) for at in range(ring.appended)]
    named = [dict(zip(PAUSES.names, row, strict=True)) for row in rows]
    return [row["step"] for row in named if row["cause"] == Pause.COMPILATION]


@pytest.mark.filterwarnings("ignore")
def test_a_compilation_is_in_the_step_whose_time_it_took(flight: FlightFile) -> None:
    """It waits until that step has ended; one between two steps is in none."""
    recorder = PauseRecorder(flight, lambda: False, UserCode().contains)
    recorder(last=False)  # takes those of other tests
    others = len(compiled_steps(flight))
    flight.open_slots[Slot.STEP] = 11  # which is known to have ended only when the next one has a phase
    ended = end_step(flight, 11, monotonic_ns() - 10**6)
    compile_one()
    recorder(last=False)
    assert compiled_steps(flight)[others:] == []

    end_step(flight, 12, ended)
    compile_one()
    end_step(flight, 13, monotonic_ns())
    recorder(last=True)

    assert compiled_steps(flight)[others:] == [12, -1]


@pytest.mark.filterwarnings("ignore")
def test_rows_of_steps_are_read_only_when_there_are_more(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a long evaluation none comes, and compilations wait for the next one."""
    recorder = PauseRecorder(flight, lambda: False, UserCode().contains)
    flight.open_slots[Slot.STEP] = 11
    steps, reads = flight.ring("steps"), []
    read_from = type(steps).read_from

    def counting(ring: object, *limits: int) -> object:
        reads.append(ring) if ring is steps else None
        return read_from(ring, *limits)

    monkeypatch.setattr(type(steps), "read_from", counting)
    compile_one()
    compile_one()
    for _ in range(3):
        recorder(last=False)

    assert len(reads) == 1
    end_step(flight, 11, 0)
    recorder(last=False)
    assert len(reads) == 2
    assert compiled_steps(flight)[-2:] == [11, 11]
