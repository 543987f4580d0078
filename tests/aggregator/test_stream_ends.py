"""Ends of streams by the reports of launchers, and the checkpoints with which attempts go on."""

from __future__ import annotations

from typing import Any

import pytest

from traceml.aggregator.stream_ends import note_exit, note_oom, resumed_at
from traceml.aggregator.streams import Incarnation, Stream


def stream(rank: int = 0, attempt: int = 0, **ended: Any) -> Stream:
    """A stream of another host."""
    found = Stream(rank, rank, attempt, Incarnation("elsewhere", "boot", 7, 1, ""), flight="")
    found.exit = ended
    return found


@pytest.mark.parametrize(("told", "known"), [("group", "group"), ("host", "host"), (None, None), (True, None)])
def test_an_agent_tells_of_kills_for_lack_of_memory(told: object, known: str | None) -> None:
    """The host of the rank counts them; what is no such word is left out."""
    lost = stream()

    note_exit(lost, {"exitcode": -9, "pid": 7, "oom": told})
    note_oom(lost)

    assert lost.exit.get("oom") == known


def test_the_printed_stacks_of_a_crash_tell_its_line() -> None:
    """faulthandler of a launched worker writes to its output. What the rank itself has told stays."""
    text = 'Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:\n  File "/a/train.py", line 12 in step\n'
    crashed, raised = stream(), stream(file="/a/other.py", line=3)

    for each in (crashed, raised):
        note_exit(each, {"exitcode": -11, "pid": 7, "crash": text})

    assert (crashed.exit["file"], crashed.exit["line"], crashed.exit["function"]) == ("/a/train.py", 12, "step")
    assert (raised.exit["file"], raised.exit["line"]) == ("/a/other.py", 3)


@pytest.mark.parametrize("told", ["", None, 5])
def test_no_printed_stacks_tell_no_line(told: object) -> None:
    """A rank that was killed from outside, or whose agent reports none."""
    lost = stream()

    note_exit(lost, {"exitcode": -9, "pid": 7, "crash": told})

    assert lost.exit == {"signal": 9}


def test_the_time_of_the_flight_file_is_kept_beside_the_reported_one() -> None:
    """A launcher sees an end later than the rank's last sign of life."""
    lost = stream(at_s=10.0)

    note_exit(lost, {"exitcode": -9, "pid": 7, "time": 12.0})

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
