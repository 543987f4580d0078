"""Ends of streams by the reports of launchers, and the checkpoints with which attempts go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from traceml.aggregator.streams.stream import Incarnation, RankStream, StreamState
from traceml.aggregator.streams.stream_ends import note_exit, note_flight, note_oom, resumed_at, state_of_dead
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_header import FlightState
from traceml.database.flight.postmortem import FlightSnapshot
from traceml.database.schema import Phase, Slot
from traceml.inspection.cgroups import OomPlace
from traceml.transport.exit_report import ExitReport


def stream(rank: int = 0, attempt: int = 0, **ended: Any) -> RankStream:
    """A stream of another host."""
    found = RankStream(rank, rank, attempt, Incarnation("elsewhere", "boot", 7, 1, ""), flight="")
    found.exit = ended
    return found


@pytest.mark.parametrize("told", ["group", "host", None])
def test_an_agent_tells_of_kills_for_lack_of_memory(told: OomPlace | None) -> None:
    """The host of the rank counts them."""
    lost = stream()

    note_exit(lost, ExitReport(exitcode=-9, pid=7, oom=told))
    note_oom(lost)

    assert lost.exit.get("oom") == told


def test_the_printed_stacks_of_a_crash_tell_its_line() -> None:
    """faulthandler of a launched worker writes to its output. What the rank itself has told stays."""
    text = 'Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:\n  File "/a/train.py", line 12 in step\n'
    crashed, raised = stream(), stream(file="/a/other.py", line=3)

    for each in (crashed, raised):
        note_exit(each, ExitReport(exitcode=-11, pid=7, crash=text))

    assert (crashed.exit["file"], crashed.exit["line"], crashed.exit["function"]) == ("/a/train.py", 12, "step")
    assert (raised.exit["file"], raised.exit["line"]) == ("/a/other.py", 3)


@pytest.mark.parametrize("told", ["", None])
def test_no_printed_stacks_tell_no_line(told: str | None) -> None:
    """A rank that was killed from outside, or whose agent reports none."""
    lost = stream()

    note_exit(lost, ExitReport(exitcode=-9, pid=7, crash=told))

    assert lost.exit == {"signal": 9}


def test_the_time_of_the_flight_file_is_kept_beside_the_reported_one() -> None:
    """A launcher sees an end later than the rank's last sign of life."""
    lost = stream(at_s=10.0)

    note_exit(lost, ExitReport(exitcode=-9, pid=7, time=12.0))

    assert (lost.exit["at_s"], lost.exit["reported_s"]) == (10.0, 12.0)


def test_an_attempt_goes_on_from_the_newest_checkpoint_of_the_folder() -> None:
    """Counted from the beginning of the job, as each attempt counts its own steps from 0."""
    first = stream(attempt=0, saved_in=5, saved_steps=20)
    second = stream(attempt=1, saved_in=5, saved_steps=30)
    second.resumes_at = 20
    killed = stream(attempt=2)

    assert resumed_at(stream(attempt=3), 5, [first, second, killed]) == 50
    assert resumed_at(stream(attempt=1), 5, [first, second, killed]) == 20
    assert resumed_at(stream(attempt=3), 6, [first, second, killed]) == 0


def test_a_rank_goes_on_from_its_own_file_where_each_has_one() -> None:
    """Ranks are ended at different steps; where one saves for all, its checkpoint counts."""
    saved = [stream(rank, 0, saved_in=5, saved_steps=20 + 10 * rank) for rank in range(2)]

    assert [resumed_at(stream(rank, 1), 5, saved) for rank in range(3)] == [20, 30, 30]


IN_LOOP = {Slot.STEP: 7, Slot.ITERATING: 1}


@pytest.mark.parametrize(
    ("words", "world_size", "code", "state"),
    [
        (IN_LOOP, 1, 0, StreamState.LOST),
        ({Slot.STEP: 7, Phase.BACKWARD: 900}, 1, 0, StreamState.LOST),
        ({Slot.STEP: 7}, 1, 0, StreamState.FINISHED),  # its loop may have ended
        ({Slot.ITERATING: 1}, 1, 0, StreamState.FINISHED),  # it has not trained
        (IN_LOOP | {Slot.EXIT_START: 900}, 1, 0, StreamState.FINISHED),
        (IN_LOOP | {Slot.STATE: FlightState.FINISHED}, 1, 0, StreamState.FINISHED),
        (IN_LOOP, 2, 0, StreamState.FINISHED),
        (IN_LOOP, 1, None, StreamState.LOST),
        (IN_LOOP, 1, 3, StreamState.FAILED),
    ],
)
def test_exit_code_0_in_the_middle_of_a_loop_is_no_end(
    tmp_path: Path, words: dict[int, int], world_size: int, code: int | None, state: StreamState
) -> None:
    """Of a single process: nobody else misses it. One whose exit handlers ran has come to its end."""
    flight = FlightFile.create(tmp_path, {})
    assert flight.path is not None
    for slot, value in words.items():
        flight.open_slots[slot] = value

    image = FlightSnapshot(flight.path, flight.path.read_bytes())
    ended = stream() if code is None else stream(code=code)

    note_flight(ended, image)

    assert state_of_dead(ended, world_size) is state
    assert state_of_dead(stream(code=0), world_size) is StreamState.FINISHED
