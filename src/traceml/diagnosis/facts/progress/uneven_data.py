"""Ranks whose data has ended before that of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from traceml.formatting import count_text, ranks_text

__all__ = ["ReadData", "UnevenData", "uneven_data"]


class ReadData(NamedTuple):
    """Progress of a rank through the data that it trains on."""

    batches: int  # in all epochs; -1 without a data loader
    epoch: int
    is_over: bool  # whether it has no batch left in that epoch


class UnevenData(msgspec.Struct, frozen=True):
    """Ranks whose data has ended, and the batches of all."""

    ranks: tuple[int, ...]
    batches: tuple[int, int]  # least and most batches of these ranks
    others: tuple[int, int] | None = None  # least and most batches of the others; they may get more; None if unknown

    @property
    def text(self) -> str:
        """`51 batches, the others 52`."""
        unit = "batch" if self.batches[1] == 1 else "batches"
        others = "" if self.others is None else f", the others {_range(self.others)}"
        return f"{_range(self.batches)} {unit}{others}"

    @property
    def sentence(self) -> str:
        """A sentence: the data of which ranks had ended, after how many batches."""
        return f"The data of {ranks_text(self.ranks)} had ended ({self.text})."

    @property
    def evidence(self) -> dict[str, int]:
        """The batches as a finding has them."""
        others = {} if self.others is None else {"batches_of_others": min(self.others)}
        return {"batches": max(self.batches), **others}


def uneven_data(data: Mapping[int, ReadData]) -> UnevenData | None:
    """Return the ranks whose data has ended, if each of the others has had more batches, and is in no later epoch.

    One that is in the next epoch has come past the end of its own data. Ranks without a data loader, as in a pipeline,
    do not count.
    """
    known = {rank: each for rank, each in data.items() if each.batches >= 0}
    over = {rank: each for rank, each in known.items() if each.is_over}
    others = [each for each in known.values() if not each.is_over]
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
