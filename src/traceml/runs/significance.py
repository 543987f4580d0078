"""Whether two runs' step times really differ: a permutation test on blocks of steps.

Step times are no independent draws: a slow step is followed by slow ones. So each run is cut into blocks that are long
against its own autocorrelation, the statistic is taken of each block, and the blocks are dealt anew to the two runs a
few thousand times: that tells how far apart two runs lie that differ by chance alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALPHA", "Difference", "autocorrelation_time", "block_steps", "difference"]

Floats = NDArray[Any]

ALPHA = 0.01
"""A difference is called real when chance alone gives one as large less often than this."""
# Blocks of four times the autocorrelation time are next to independent; more than 64 of them add nothing.
_TIMES = 4
_MOST_BLOCKS = 64
_LEAST_BLOCKS = 8
# With fewer independent steps than this the autocorrelation itself cannot be told.
_INDEPENDENT = 16
_DEALS = 1999
_WINDOW = 5.0


@dataclass(frozen=True, slots=True)
class Difference:
    """How a statistic of step times differs from run A to run B.

    Attributes:
        p: how often chance alone gives a difference as large; None when there are too few independent steps to tell.
        low, high: where B - A lies with 99 % confidence, in the unit of the values; None as `p`.
    """

    p: float | None
    low: float | None
    high: float | None

    @property
    def real(self) -> bool | None:
        """Whether it is more than chance; None when that cannot be told."""
        return None if self.p is None else self.p < ALPHA


def autocorrelation_time(values: Floats) -> float:
    """Return over how many steps values depend on each other; 1 where they do not.

    The sum of the autocorrelation up to five times itself (Sokal's window).
    """
    n, centred = len(values), values - values.mean()
    spectrum = np.fft.rfft(centred, 1 << (2 * n - 1).bit_length())
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: max(n // 2, 1)]
    if correlation[0] <= 0:
        return 1.0

    times = 2 * np.cumsum(correlation / correlation[0]) - 1
    wide_enough = np.flatnonzero(np.arange(len(times)) >= _WINDOW * times)
    return max(1.0, float(times[wide_enough[0] if len(wide_enough) else -1]))


def block_steps(a: Floats, b: Floats) -> int | None:
    """Return how many steps a block needs, None when a run has too few independent ones."""
    shorter = min(len(a), len(b))
    if shorter < _LEAST_BLOCKS * 2:
        return None

    time = max(autocorrelation_time(a), autocorrelation_time(b))
    if shorter < _INDEPENDENT * time:
        return None

    wanted = max(int(np.ceil(_TIMES * time)), -(-shorter // _MOST_BLOCKS))
    return min(wanted, shorter // _LEAST_BLOCKS)


def difference(a: Floats, b: Floats, statistic: Callable[[Floats], Floats], seed: int = 0) -> Difference:
    """Return whether a statistic differs from A to B by more than chance.

    Args:
        a: values in order, of run A.
        b: of run B.
        statistic: takes blocks, one per row, and returns one number per block.
        seed: of the deals, so that the same runs always give the same answer.
    """
    steps = block_steps(a, b)
    if steps is None:
        return Difference(None, None, None)

    of_a, of_b = (statistic(_blocks(values, steps)) for values in (a, b))
    deals = _deals(np.concatenate([of_a, of_b]), len(of_a), seed)
    gap, error = float(of_b.mean() - of_a.mean()), float(_error(of_a, of_b))
    if error == 0:
        return Difference(1.0 if gap == 0 else 0.0, gap, gap)

    p = (np.count_nonzero(deals >= abs(gap) / error) + 1) / (len(deals) + 1)
    reach = float(np.quantile(deals, 1 - ALPHA)) * error
    return Difference(float(p), gap - reach, gap + reach)


def _blocks(values: Floats, steps: int) -> Floats:
    # The first steps are the ones to leave out: a run settles.
    whole = len(values) // steps * steps
    return values[len(values) - whole :].reshape(-1, steps)


def _deals(pool: Floats, first: int, seed: int) -> Floats:
    """Return the studentised difference of each of many random deals of the pool, without its sign."""
    order = np.random.default_rng(seed).random((_DEALS, len(pool))).argsort(axis=1)
    dealt = pool[order]
    a, b = dealt[:, :first], dealt[:, first:]
    error = _error(a, b)
    gap = np.abs(b.mean(axis=1) - a.mean(axis=1))
    apart: Floats = np.divide(gap, error, out=np.zeros_like(gap), where=error > 0)
    return apart


def _error(a: Floats, b: Floats) -> Floats:
    parts = (each.var(axis=-1, ddof=1) / each.shape[-1] for each in (a, b))
    total: Floats = np.sqrt(sum(parts))
    return total
