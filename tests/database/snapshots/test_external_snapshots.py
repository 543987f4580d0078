"""Snapshots of a silent rank, taken from another process: which of them are stored."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from traceml.clock import monotonic_ns
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import Slot
from traceml.database.snapshots import external_snapshots
from traceml.database.snapshots.external_snapshots import ExternalSnapshots
from traceml.database.snapshots.rank_snapshot import RankSnapshot


def stored(quiet: Iterable[float]) -> list[float]:
    """Return the seconds of silence of the snapshots that are stored, of those taken after so many."""
    snapshots = ExternalSnapshots(1, 1, Path("flight"))
    made = (RankSnapshot(at_ns=int((100 + each) * 1e9), rank=1, quiet_s=each) for each in quiet)
    return [each.quiet_s for each in made if snapshots.is_news(each)]


def test_a_silence_is_told_again_soon_while_it_is_short() -> None:
    """The time limit of a hang may be seconds, and nothing else may come from that host."""
    assert stored(3.0 + each for each in range(13)) == [3.0, 4.0, 6.0, 8.0, 11.0, 15.0]


def test_a_long_silence_is_told_every_ten_seconds() -> None:
    """Nothing about it changes."""
    assert stored(60.0 + each for each in range(31)) == [60.0, 70.0, 80.0, 90.0]


def test_a_training_that_goes_on_beside_a_silent_recorder_is_no_silence(tmp_path: Path) -> None:
    """The recorder may be in a call of a stalled file system: then what was stored before is over."""
    flight = FlightFile.create(tmp_path, {}, capacities={"steps": 64})
    try:
        flight.open_slots[Slot.HEARTBEAT] = monotonic_ns() - 10 * 10**9
        snapshots = ExternalSnapshots(1, os.getpid(), flight.path)
        first = snapshots.make()
        assert first is not None
        assert (first.answered, first.is_gil_held) == ("kernel", False)
        assert first.quiet_s >= 10

        flight.open_slots[Slot.STEP] = 7
        assert snapshots.make() is None
        assert snapshots.is_news(first)
        flight.open_slots[Slot.STEP] = 8
        over = snapshots.make()
        assert over is not None
        assert over.ended
        assert over.quiet_s < 10  # since the training was seen to go on, not since the recorder ran
        assert snapshots.is_news(over)
        assert not snapshots.is_news(over)  # the end is told again in a while

        stands = snapshots.make()
        assert stands is not None
        assert stands.quiet_s < 10
    finally:
        flight.close(unlink=True)


class _Refused:
    """A request that was not safe, of a process whose recorder asks for the GIL."""

    was_sent, asks_for_gil = False, True

    def __init__(self, *_: object, **_known: object) -> None: ...

    def wait(self) -> str:
        return ""


@pytest.mark.parametrize("has_file", [True, False])
def test_a_held_gil_is_held_until_the_recorder_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_file: bool
) -> None:
    """Also while it is not safe to ask, and where faulthandler has no file for its stacks."""
    for name, value in (
        ("SignaledStacks", _Refused),
        ("thread_here", lambda *_: 1),
        ("find_stack_file", lambda _: os.open(os.devnull, os.O_RDONLY) if has_file else None),
    ):
        monkeypatch.setattr(external_snapshots, name, value)

    flight = FlightFile.create(tmp_path, {}, capacities={"steps": 64})
    try:
        flight.open_slots[Slot.HEARTBEAT], flight.open_slots[Slot.RECORDER_THREAD] = monotonic_ns() - 10**10, 1
        snapshots = ExternalSnapshots(1, os.getpid(), flight.path)
        looks = [snapshots.make(), snapshots.make(may_ask=False)]
        flight.open_slots[Slot.HEARTBEAT] += 1
        looks.append(snapshots.make(may_ask=False))
        assert [each.is_gil_held for each in looks if each] == [True, True, False]
    finally:
        flight.close(unlink=True)
