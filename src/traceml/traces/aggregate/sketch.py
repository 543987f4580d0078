"""Percentiles from counts in buckets: 128 per power of two, so that a value is known to 0.4 %.

The number of a bucket is `octave * CELLS + cell`. Durations below 128 ns have a bucket each; whole microseconds below
128 are exact, because no two of them share a bucket. Above, rounding to whole microseconds doubles the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

__all__ = ["CELLS", "OCTAVES", "RELATIVE_ERROR", "bucket", "middle", "quantile"]

CELLS = 128
OCTAVES = 57
RELATIVE_ERROR = 1 / CELLS


def bucket(value: int) -> int:
    """Return the bucket of a duration in nanoseconds; durations beyond 2^63 are in the last one."""
    if value < CELLS:
        return max(value, 0)

    exponent = min(value.bit_length() - 1, 62)
    return (exponent - 6) * CELLS + ((min(value, 2**63 - 1) >> (exponent - 7)) & (CELLS - 1))


def middle(number: int) -> int:
    """Return the nanoseconds in the middle of a bucket."""
    octave, cell = divmod(number, CELLS)
    if octave == 0:
        return cell

    width = 1 << (octave - 1)
    return (CELLS + cell) * width + width // 2


def quantile(counts: Mapping[int, int], share: Fraction, total: int) -> int:
    """Return the nearest-rank quantile in nanoseconds, within RELATIVE_ERROR of the true one.

    Args:
        counts: number of durations by bucket.
        share: 1/2 for the median.
        total: the sum of all counts, at least 1.
    """
    wanted = max(1, -(-share.numerator * total // share.denominator))
    seen = 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= wanted:
            return middle(number)

    return middle(max(counts))
