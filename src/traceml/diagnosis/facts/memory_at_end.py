"""The last minute of a rank's resident memory: how much it used at its end, and how fast that grew."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["EndMemory", "MemoryTail"]

_TAIL_NS = 60 * 10**9
_MAX_ROWS = 256  # a sample is taken twice a second at most
_MIN_ROWS, _MIN_NS = 3, 10**9
# Of the growth, the first half of the time has this share; else it was a jump, for which a rate means nothing.
_STEADY = (0.25, 0.75)


class EndMemory(msgspec.Struct, frozen=True):
    """Resident memory of a rank, or private memory of its loader's workers, in the last sample."""

    used_bytes: int
    peak_bytes: int  # of all samples
    # its growth until then, of the last minute at most; None if it did not grow, or by a jump
    per_minute_bytes: int | None


class MemoryTail:
    """Samples of the last minute of one rank's memory."""

    def __init__(self) -> None:
        self._times: NDArray[np.int64] = np.empty(0, np.int64)
        self._sizes: NDArray[np.int64] = np.empty(0, np.int64)
        self._peak = 0
        self._training = False

    def add(self, times_ns: NDArray[np.int64], sizes: NDArray[np.int64], training: NDArray[np.bool_]) -> None:
        """Take samples in order: monotonic nanoseconds, bytes, and whether the first step had begun."""
        if not len(times_ns):
            return

        if not self._training and training.any():  # imports and data that are loaded are no growth of the training
            self._times, self._sizes, self._training = self._times[:0], self._sizes[:0], True

        if self._training:
            times_ns, sizes = times_ns[training], sizes[training]
            if not len(times_ns):
                return

        times, sizes = np.concatenate([self._times, times_ns]), np.concatenate([self._sizes, sizes])
        recent = times >= times[-1] - _TAIL_NS
        self._times, self._sizes = times[recent][-_MAX_ROWS:], sizes[recent][-_MAX_ROWS:]
        self._peak = max(self._peak, int(sizes.max()))

    def at_end(self, *, trained: bool = False) -> EndMemory | None:
        """Return the memory in the last sample; None without any.

        Args:
            trained: whether the rank has trained, maybe too short for a sample: what it loaded before is no growth.
        """
        if not len(self._sizes):
            return None

        rate = None if trained and not self._training else self._per_minute()
        return EndMemory(int(self._sizes[-1]), self._peak, rate)

    def _per_minute(self) -> int | None:
        """Return the growth of the longest part up to the end that is steady: it may have begun late."""
        count = len(self._times)
        while count >= _MIN_ROWS:
            if (rate := _steady_rate(self._times[-count:], self._sizes[-count:])) is not None:
                return rate

            count -= max(count // 4, 1)

        return None


def _steady_rate(times: NDArray[np.int64], sizes: NDArray[np.int64]) -> int | None:
    passed_ns, grown = int(times[-1] - times[0]), int(sizes[-1] - sizes[0])
    if passed_ns < _MIN_NS or grown <= 0:
        return None

    half = float(np.interp(times[0] + passed_ns / 2, times, sizes)) - float(sizes[0])
    return int(grown * 60e9 / passed_ns) if _STEADY[0] * grown <= half <= _STEADY[1] * grown else None
