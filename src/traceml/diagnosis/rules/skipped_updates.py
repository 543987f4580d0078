"""Updates that go on being skipped, because gradients are not finite."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.facts.skipped_steps import SkippedSteps
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import count_text, percent_text

__all__ = ["steps_skipped"]

LASTING_SHARE = 0.25
"""Share of the last quarter of the steps that is skipped, so that it goes on. A scaler skips a few steps at first."""
MIN_SKIPPED = 5
"""Fewer skipped steps than this are no finding."""
_DENSE_SHARE = 0.8


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
