"""Choice of the steps of a long run whose rows are read: blocks of consecutive steps, spread over the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from traceml.database.schema import Table
from traceml.database.store.reader import StoreReader
from traceml.database.store.thinning import BLOCK_STEPS, sample_blocks

__all__ = ["spread_ranges", "step_ranges"]

# A part of a block stands for it where few rows of each rank are read: rather more places than longer ones.
_MIN_STEPS = 16
_USUAL_BLOCKS = 32
# Reading a frame takes so long, and each of its rows besides (measured); a report should not take seconds.
_FRAME_S, _ROW_S = 20e-6, 40e-9
_BUDGET_S = 0.5
_MIN_PLACES = 4
# Of the frames of all ranks, which do not begin with the same step, most are cut once by a range of this share.
_SHARE_OF_FRAME = 1 / 4


def step_ranges(
    reader: StoreReader, tables: Sequence[Table], ranks: int, first: int, last: int, rows: int
) -> list[tuple[int, int]]:
    """Return ranges of steps, (first, last), that are spread over a run and read in a second or two.

    Args:
        tables: the tables whose rows of these steps will be read.
        rows: how many step rows to read of all ranks together.
    """
    present = [table.name for table in tables if reader.frame_count(table.name)]
    frames = sum(reader.frame_count(name) for name in present)
    left = sum(reader.stored(name) - reader.thinned(name) for name in present)
    level = reader.thinning_level()
    steps = max(min(rows // ranks, (last - first + 1) >> level), _MIN_STEPS)
    frame_s = _FRAME_S + left / max(frames, 1) * _ROW_S
    if frames * frame_s <= _BUDGET_S:
        return spread_ranges(first, last, steps)

    span = max((last - first + 1) * ranks * len(present) / frames, 1.0)
    place_s = (1 + BLOCK_STEPS / span) * frame_s * ranks * len(present)
    places, reach = max(int(_BUDGET_S / place_s), _MIN_PLACES), int(span * _SHARE_OF_FRAME)
    return spread_ranges(first, last, min(steps, places * max(reach >> level, BLOCK_STEPS)), places, reach)


def spread_ranges(
    first: int, last: int, steps: int, places: int | None = None, reach: int = 0
) -> list[tuple[int, int]]:
    """Return ranges of steps, (first, last), that are spread over a run, in order.

    Args:
        steps: about how many steps the ranges have together.
        places: at most this many places of the run; in each there may be several ranges.
        reach: steps from the begin of a place to its end.
    """
    each = min(max(steps // _USUAL_BLOCKS, _MIN_STEPS), BLOCK_STEPS)
    if places is None or places >= steps // each:
        return list(_cut(sample_blocks(first, last, steps // each * BLOCK_STEPS), each))

    # Frames take the time, not rows.
    each = min(BLOCK_STEPS, max(steps // places, _MIN_STEPS))
    width = max((last - first + 1) // places, 1)
    ranges: list[tuple[int, int]] = []
    for begin in range(first, last + 1, width)[:places]:
        block = max(begin // BLOCK_STEPS * BLOCK_STEPS, ranges[-1][1] + 1 if ranges else first)
        end = min(block + max(min(reach, width), BLOCK_STEPS), last + 1) - 1
        ranges += _cut(sample_blocks(block, end, max(steps // places // each, 1) * BLOCK_STEPS), each)

    return ranges


def _cut(ranges: Sequence[tuple[int, int]], each: int) -> Iterator[tuple[int, int]]:
    """Yield the first steps of each block in ranges of whole blocks."""
    for first, last in ranges:
        if each == BLOCK_STEPS:
            yield first, last
            continue

        begins = [first, *range((first // BLOCK_STEPS + 1) * BLOCK_STEPS, last + 1, BLOCK_STEPS)]
        yield from ((begin, min(begin + each - 1, last)) for begin in begins)
