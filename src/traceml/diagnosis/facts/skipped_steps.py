"""Steps whose update was skipped, by GradScaler or a guard, because a gradient was not finite."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import StepFlag, unpack_bits
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import count_text, percent_text

__all__ = ["SkippedSteps", "steps_skipped"]

LASTING_SHARE = 0.25
"""Share of the last quarter of the steps that is skipped, so that it goes on. A scaler skips a few steps at first."""
MIN_SKIPPED = 5
"""Fewer skipped steps than this are no finding."""
_DENSE_SHARE = 0.8
_MAX_KEPT = 65_536


class SkippedSteps:
    """Skipped steps of one rank, as all ranks of a data-parallel job skip alike: the lowest that has sent rows."""

    def __init__(self) -> None:
        self.rank: int | None = None
        """The rank."""
        self.rows = 0
        """Step rows of the rank; of a long run a sample that is spread over it."""
        self.first = 0
        """Its first step that was taken."""
        self.latest = -1
        """Its last step."""
        self.steps: NDArray[np.int64] = np.empty(0, np.int64)
        """The skipped steps, the newest of very many."""

    def add(self, ranks: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        """Take rows of `schema.STEPS`.

        Args:
            ranks: the rank of each row.
            rows: the rows.
        """
        lowest = int(ranks.min())
        if self.rank is None or lowest < self.rank:
            self.rank, self.rows, self.steps = lowest, 0, self.steps[:0]

        mine = rows[ranks == self.rank]
        if not len(mine):
            return

        self.first = int(mine["step"][0]) if self.rows == 0 else self.first
        self.rows += len(mine)
        self.latest = int(mine["step"][-1])
        skipped = mine["step"][unpack_bits(mine["bits"]).flags & StepFlag.SKIPPED > 0]
        if len(skipped):
            self.steps = np.concatenate([self.steps, skipped])[-_MAX_KEPT:]


def steps_skipped(skipped: SkippedSteps | None) -> list[Finding]:
    """Return the finding about updates that are skipped, and go on being skipped."""
    if skipped is None or len(skipped.steps) < MIN_SKIPPED:
        return []

    count, last = len(skipped.steps), skipped.latest + 1
    span = max(last - skipped.first, 1)
    taken = min(skipped.rows / span, 1.0)  # less than 1 where rows are a sample
    late = int((skipped.steps >= last - max(span // 4, 1)).sum())
    if late < LASTING_SHARE * taken * max(span // 4, 1):
        return []

    since = _since(skipped.steps, last, taken)
    share = count / max(skipped.rows, count)
    return [
        Finding(
            kind=Kind.STEPS_SKIPPED,
            severity=Kind.STEPS_SKIPPED.severity_for(share),
            phase="optimizer",
            summary=(
                f"The optimizer skipped {count_text(count)} of {count_text(skipped.rows)} steps "
                f"({percent_text(share)}), most of them since step {count_text(since)}, and goes on: their gradients "
                "were not finite, so these steps trained nothing."
            ),
            next=(
                "Look at the loss from that step on (torch.autograd.set_detect_anomaly(True) names the operation); a "
                "lower learning rate, gradient clipping, or bfloat16 instead of float16 usually help."
            ),
            evidence={"skipped": count, "steps": skipped.rows, "since_step": since},
            cost_share=share,
        )
    ]


def _since(steps: NDArray[np.int64], end: int, taken: float) -> int:
    """Return the step from which on nearly all steps were skipped; else the first skipped one."""
    left = np.arange(len(steps), 0, -1)
    dense = left >= _DENSE_SHARE * taken * (end - steps)
    return int(steps[np.argmax(dense)]) if dense.any() else int(steps[0])
