"""Choice of the rows that stay of an old part of a run, the same for every rank.

Steps are numbered in blocks of 64. Each block has a fixed position in an even spread over all blocks (multiples of the
golden ratio), and at level `n` those stay whose position is among the first 2**-n: about every 2**n-th block, never in
step with a period of the training, and each level is a part of the one before. Samples are chosen in the same way by
the second in which they were taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import LINES, LOSSES

__all__ = ["BLOCK_STEPS", "LINE_KEYS", "LINE_SUMS", "STATE_KEY", "kept", "sample_blocks", "thinned_rows"]

STATE_KEY = "thinning"
"""Fact of a run that has the level to which its old rows are thinned."""

BLOCK_STEPS = 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio
LINE_KEYS = ("phase", "line_id", "library_id")
LINE_SUMS = ("samples", "watched_ns", "cpu_ns")
"""Columns of sampled lines: rows of equal keys are one row with the sums."""
_SECOND_NS = 1_000_000_000
_MAX_BLOCKS = 1 << 22


def kept(numbers: NDArray[np.int64], level: int) -> NDArray[np.bool_]:
    """Return which blocks or seconds stay at a level; at level 0 all do."""
    chosen: NDArray[np.bool_] = (
        _positions(numbers) < np.uint64(1 << 64 - level) if level else np.ones(len(numbers), bool)
    )
    return chosen


def _kept_rows(rows: NDArray[np.void], level: int) -> NDArray[np.bool_]:
    """Return which rows of a table with steps, or else with times, stay at a level."""
    if "t_ns" in (rows.dtype.names or ()):
        return kept(rows["t_ns"] // _SECOND_NS, level)

    return kept(rows["step"] // BLOCK_STEPS, level)


def thinned_rows(table: str, rows: NDArray[np.void], level: int) -> NDArray[np.void]:
    """Return what stays of a table's consecutive rows at a level.

    Counts of sampled lines are added up by line instead, so that their totals stay exact. The last finite loss and the
    next one always stay: the verdict says since when losses are not finite.
    """
    if table == LOSSES.name:
        return rows[_kept_rows(rows, level) | _last_change(rows["loss"])]

    if table != LINES.name:
        return rows[_kept_rows(rows, level)]

    keys = np.stack([rows[name] for name in LINE_KEYS], axis=1)
    _, last, line = np.unique(keys[::-1], axis=0, return_index=True, return_inverse=True)
    order = np.argsort(-last)  # in the order of the last row of each line
    left = rows[::-1][last[order]].copy()
    for name in LINE_SUMS:
        left[name] = np.bincount(line.ravel()[::-1], rows[name], len(last)).astype(np.int64)[order]

    return left


def _last_change(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows are the last finite loss and the one after it, where there are such."""
    chosen = np.zeros(len(losses), bool)
    finite = np.flatnonzero(np.isfinite(losses))
    last = int(finite[-1]) if len(finite) else -1
    chosen[max(last, 0) : last + 2] = True
    return chosen


def sample_blocks(first: int, last: int, steps: int) -> list[tuple[int, int]]:
    """Return ranges of whole blocks spread over a range of steps, as many as fit into a number of steps.

    The blocks of a smaller sample are among those of a larger one, and stay when old rows are thinned.

    Args:
        steps: how many steps the ranges may have together; at least one block is returned.

    Returns:
        (first, last) of each range, both included, in order; neighboring blocks are one range.
    """
    count = last // BLOCK_STEPS - first // BLOCK_STEPS + 1
    wanted = max(steps // BLOCK_STEPS, 1)
    # A step counter that jumped by billions is sampled more coarsely.
    stride = -(-count // _MAX_BLOCKS)
    numbers = np.arange(0, count, stride, dtype=np.int64) + first // BLOCK_STEPS
    if len(numbers) > wanted:
        nearest = np.argpartition(_positions(numbers), wanted)[:wanted]
        numbers = np.sort(numbers[nearest])

    gaps = np.flatnonzero(np.diff(numbers) > 1)
    begins, ends = np.append(0, gaps + 1), np.append(gaps, len(numbers) - 1)
    return [
        (max(int(begin) * BLOCK_STEPS, first), min((int(end) + 1) * BLOCK_STEPS - 1, last))
        for begin, end in zip(numbers[begins], numbers[ends], strict=True)
    ]


def _positions(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    return numbers.astype(np.uint64) * _GOLDEN
