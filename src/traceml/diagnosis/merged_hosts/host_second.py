"""Message of a host about a second: rows of the chosen ranks, and exact sums of all.

Rows are unchanged rows of the table `steps`, so the receiver handles them like rows from a rank. The sums
are those of the store (`database.store.summaries`): any number of them can be joined without loss, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any, Self

import msgpack
import msgspec
import numpy as np

from traceml.database.schema import STEPS
from traceml.database.store.frame_compression import decode, encode
from traceml.database.store.summaries import TableSums
from traceml.diagnosis.steps.representatives import HostChoice, WorkAbove

__all__ = ["HostSecond"]

_BINS = TableSums.empty(STEPS).bins.dtype


class HostSecond(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The message of a host about a second."""

    host: str
    typical: int
    ordinary: tuple[int, ...]
    # rank -> its new rows of `steps`, of the typical rank, of outliers, and of ranks that were asked for
    rows: Mapping[int, bytes]
    begins: tuple[int, ...]  # ranks of `rows` that are sent from now on, with their newest earlier rows
    ended: tuple[int, ...]
    ended_at: tuple[int, ...]  # the last step of each rank in `ended`, -1 without any
    above: WorkAbove  # own work of the longest of the ordinary ranks beyond that of the typical one, in the new steps
    sums: TableSums  # sums of the new rows of all ranks, with the histogram of their step times

    @property
    def choice(self) -> HostChoice:
        """The ranks that are sent, and those that the typical one represents."""
        return HostChoice(
            host=self.host,
            typical=self.typical,
            ordinary=self.ordinary,
            sent=tuple(self.rows),
            ended=self.ended,
            ended_at=self.ended_at,
        )

    def encoded(self) -> bytes:
        """Return the message as bytes."""
        codec, packed = encode(STEPS, b"".join(self.rows.values()))
        bins = [list(each) for each in self.sums.bins.tolist()]  # many are zero, which is one byte
        counts = [len(data) // STEPS.row_bytes for data in self.rows.values()]
        message = [
            self.host, self.typical, self.ordinary, list(self.rows), counts, self.begins, self.ended, self.ended_at,
            self.above.to_row(), self.sums.width,
            bins, self.sums.levels.astype("<u2").tobytes(), int(codec), packed,
        ]  # fmt: skip
        return bytes(msgpack.packb(message))

    @classmethod
    def decoded(cls, data: bytes) -> Self:
        """Reverse `encoded`.

        Raises:
            ValueError: the bytes are damaged, or of another version.
        """
        try:
            return cls._of(msgpack.unpackb(data))
        except (TypeError, ValueError, msgpack.UnpackException) as error:
            raise ValueError(f"the message of a host cannot be read: {error}") from error

    @classmethod
    def _of(cls, message: list[Any]) -> Self:
        host, typical, ordinary, ranks, counts, begins, ended, ended_at, above, width, *sums = message
        bins, levels, codec, packed = sums
        rows = memoryview(decode(codec, packed, STEPS.row_bytes))
        edges = [0, *accumulate(count * STEPS.row_bytes for count in counts)]
        if len(ranks) != len(counts) or edges[-1] != len(rows):
            raise ValueError("its rows are not those of its ranks")

        summed = np.array([tuple(each) for each in bins], _BINS)
        counted = np.frombuffer(levels, "<u2").reshape(-1, 2).astype(np.int64)
        return cls(
            host=str(host),
            typical=int(typical),
            ordinary=tuple(ordinary),
            rows={rank: bytes(rows[a:b]) for rank, (a, b) in zip(ranks, pairwise(edges), strict=True)},
            begins=tuple(begins),
            ended=tuple(ended),
            ended_at=tuple(ended_at),
            above=WorkAbove.from_row(above),
            sums=TableSums(STEPS.name, int(width), summed, counted),
        )
