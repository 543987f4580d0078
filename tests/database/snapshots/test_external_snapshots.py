"""Snapshots of a silent rank, taken from another process: which of them are stored."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
