"""Data that ended on some ranks while others go on with more batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from traceml.database.snapshots import RankSnapshot
from traceml.formatting import count_text

__all__ = ["UnevenData", "uneven_data"]


@dataclass(frozen=True, slots=True)
class UnevenData:
    """Ranks whose data has ended, and the batches of all.

    Attributes:
        batches: least and most batches of these ranks.
        others: least and most batches of the others; they may get more.
    """

    ranks: tuple[int, ...]
    batches: tuple[int, int]
    others: tuple[int, int]

    @property
    def text(self) -> str:
        """`51 batches, the others 52`."""
        unit = "batch" if self.batches[1] == 1 else "batches"
        return f"{_range(self.batches)} {unit}, the others {_range(self.others)}"


def uneven_data(snapshots: Mapping[int, RankSnapshot]) -> UnevenData | None:
    """Return the ranks whose data has ended, if each of the others has had more batches, and is in no later epoch.

    One that is in the next epoch has come past the end of its own data. Ranks without a data loader, as in a pipeline,
    do not count.
    """
    known = {rank: each for rank, each in snapshots.items() if each.batches >= 0}
    over = {rank: each for rank, each in known.items() if each.data_ended}
    others = [each for each in known.values() if not each.data_ended]
    if not over or not others or max(each.epoch for each in others) > min(each.epoch for each in over.values()):
        return None

    batches, more = [sorted(each.batches for each in some) for some in (over.values(), others)]
    if batches[-1] >= more[0]:
        return None

    return UnevenData(tuple(sorted(over)), (batches[0], batches[-1]), (more[0], more[-1]))


def _range(counts: tuple[int, int]) -> str:
    """Return `51`, or `51 to 53`."""
    least, most = counts
    return count_text(least) + (f" to {count_text(most)}" if least < most else "")
