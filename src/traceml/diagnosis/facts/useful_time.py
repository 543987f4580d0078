"""Productive and repeated steps of a job over its attempts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["UsefulTime", "useful_time"]


@dataclass(frozen=True, slots=True)
class UsefulTime:
    """Steps of a rank, each counted once; those that a later attempt makes again are repeated.

    Attributes:
        productive_s: time in steps that were made for the first time, without waiting for data, saving, and the step
            in which an attempt failed.
        repeated_s: time in steps that an earlier attempt had made already, with waiting and saving.
    """

    productive_s: float = 0.0
    productive_steps: int = 0
    repeated_s: float = 0.0
    repeated_steps: int = 0

    @classmethod
    def mean(cls, ranks: Iterable[UsefulTime]) -> UsefulTime:
        """Return the mean over ranks; of steps, that of the rank with the most."""
        found = list(ranks)
        if not found:
            return cls()

        return cls(
            float(np.mean([each.productive_s for each in found])),
            max(each.productive_steps for each in found),
            float(np.mean([each.repeated_s for each in found])),
            max(each.repeated_steps for each in found),
        )


def useful_time(attempts: Iterable[tuple[NDArray[np.void], int, int]]) -> UsefulTime:
    """Return the useful time of a rank.

    Args:
        attempts: in order, the bins of its steps (`StepSums.steps.bins`), the steps in the checkpoint with which it
            began, where its own steps count from 0, and the time of the step in which it failed, if that is in the
            bins, nanoseconds; else 0.
    """
    seen, productive_ns, repeated_ns, productive, repeated = -1, 0.0, 0.0, 0, 0.0
    for bins, resumes_at, failed_ns in attempts:
        counts_on = len(bins) > 0 and bins["first_step"].min() > 0
        before = 0 if counts_on else resumes_at
        first, last = bins["first_step"] + before, bins["last_step"] + before
        new = np.clip((last - np.maximum(first - 1, seen)) / (last - first + 1), 0, 1)
        own_ns = bins["total_ns"] - bins["input_wait_ns"] - bins["checkpoint_ns"]
        productive_ns += max(float((new * own_ns).sum()) - failed_ns, 0.0)
        repeated_ns += float(((1 - new) * bins["total_ns"]).sum())
        repeated += float(((1 - new) * bins["rows"]).sum())
        productive += int(bins["rows"].sum()) - bool(failed_ns)
        seen = max(seen, int(last.max(initial=-1)) - bool(failed_ns))

    again = round(repeated)
    return UsefulTime(productive_ns / 1e9, productive - again, repeated_ns / 1e9, again)
