"""Significance of a difference in step time: a permutation test on blocks of steps.

Step times are not independent: slow steps follow slow steps. Each run is therefore divided into blocks that are long
compared with its autocorrelation. The statistic is computed for each block, and the blocks are permuted between the
two runs a few thousand times, which gives the distribution of differences by chance. Differences are those of
logarithms: a time has no negative values, and neither bound of the interval claims one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALPHA", "Difference", "autocorrelation_time", "block_steps", "difference"]

Floats = NDArray[Any]

ALPHA = 0.01
"""A difference is significant, `real` in the JSON, if its p-value is below this."""
# Blocks of four times the autocorrelation time are nearly independent; more than 64 of them add nothing.
_TIMES = 4
_MAX_BLOCKS = 64
_MIN_BLOCKS = 8
_LONGEST_SHARE, _MAX_TIME_SHARE = 0.05, 0.5  # longest steps; the time that they may take together
# With fewer independent steps than this, the autocorrelation cannot be estimated.
_INDEPENDENT = 16
_PERMUTATIONS = 1999
_WINDOW = 5.0
_MAX_GAP = 20.0  # of logarithms: half a billion times as long


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of a statistic of step times from run A to run B.

    Attributes:
        p: probability of a difference this large by chance; None with too few independent steps.
        low, high: confidence interval (99 %) of B / A - 1, both above -1; None if `p` is.
    """

    p: float | None
    low: float | None
    high: float | None

    @property
    def real(self) -> bool | None:
        """Whether the difference is significant; None if that is unknown."""
        return None if self.p is None else self.p < ALPHA


def autocorrelation_time(values: Floats) -> float:
    """Return the number of steps over which values depend on each other; 1 where they do not.

    It is the sum of the autocorrelation up to five times itself (Sokal's window).
    """
    n, centered = len(values), values - values.mean()
    spectrum = np.fft.rfft(centered, 1 << (2 * n - 1).bit_length())
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: max(n // 2, 1)]
    if correlation[0] <= 0:
        return 1.0

    times = 2 * np.cumsum(correlation / correlation[0]) - 1
    wide_enough = np.flatnonzero(np.arange(len(times)) >= _WINDOW * times)
    return max(1.0, float(times[wide_enough[0] if len(wide_enough) else -1]))


def block_steps(a: Floats, b: Floats) -> int | None:
    """Return the number of steps per block, None if a run has too few independent ones."""
    shorter = min(len(a), len(b))
    if shorter < _MIN_BLOCKS * 2:
        return None

    time = max(autocorrelation_time(a), autocorrelation_time(b))
    if shorter < _INDEPENDENT * time:
        return None

    wanted = max(int(np.ceil(_TIMES * time)), -(-shorter // _MAX_BLOCKS))
    most = shorter // _MIN_BLOCKS
    # Long steps at a distance, as of epochs, are in all blocks or in none of a run only if the blocks are long, too.
    return most if _is_of_few(a) or _is_of_few(b) else min(wanted, most)


def _is_of_few(values: Floats) -> bool:
    """Return whether a few long steps have most of the time."""
    few = np.sort(values)[-max(int(_LONGEST_SHARE * len(values)), 1) :]
    return bool(few.sum() >= _MAX_TIME_SHARE * values.sum())


def difference(a: Floats, b: Floats, statistic: Callable[[Floats], Floats]) -> Difference:
    """Return the difference of a statistic from A to B, with its significance.

    Args:
        a: values in order, of run A.
        statistic: takes blocks, one per row, and returns one number per block.
    """
    steps = block_steps(a, b)
    if steps is None:
        return Difference(None, None, None)

    of_a, of_b = (statistic(_blocks(values, steps)) for values in (a, b))
    if min(of_a.min(), of_b.min()) <= 0:
        return Difference(None, None, None)  # no time was measured

    permuted = _permuted_differences(np.concatenate([of_a, of_b]), len(of_a))
    gap, error = float(_gap(of_a, of_b)), float(_error(of_a, of_b))
    if error == 0:
        return Difference(1.0 if gap == 0 else 0.0, _share(gap), _share(gap))

    p = (np.count_nonzero(permuted >= abs(gap) / error) + 1) / (len(permuted) + 1)
    reach = float(np.quantile(permuted, 1 - ALPHA)) * error
    return Difference(float(p), _share(gap - reach), _share(gap + reach))


def _share(gap: float) -> float:
    """Return a difference of logarithms as a share of A."""
    return float(np.expm1(min(gap, _MAX_GAP)))


def _blocks(values: Floats, steps: int) -> Floats:
    # The first steps are left out, as a run is not stable there.
    whole = len(values) // steps * steps
    return values[len(values) - whole :].reshape(-1, steps)


def _permuted_differences(pool: Floats, first: int) -> Floats:
    """Return the absolute studentized difference of many permutations of the pool, the same ones each time."""
    shuffled = pool[_permutations(len(pool))]
    a, b = shuffled[:, :first], shuffled[:, first:]
    error = _error(a, b)
    gap = np.abs(_gap(a, b))
    return np.asarray(np.divide(gap, error, out=np.zeros_like(gap), where=error > 0))


@lru_cache(4)  # of a comparison, the statistics have the same number of blocks
def _permutations(count: int) -> NDArray[np.intp]:
    return np.random.default_rng(0).random((_PERMUTATIONS, count)).argsort(axis=1)


def _gap(a: Floats, b: Floats) -> Floats:
    """Return the difference of the logarithms of two means."""
    return np.asarray(np.log(b.mean(axis=-1)) - np.log(a.mean(axis=-1)))


def _error(a: Floats, b: Floats) -> Floats:
    """Return the standard error of that difference, by the delta method."""
    parts = (each.var(axis=-1, ddof=1) / each.shape[-1] / each.mean(axis=-1) ** 2 for each in (a, b))
    return np.asarray(np.sqrt(sum(parts)))
