"""Updates that go on being skipped, because gradients are not finite."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.facts.loss_history import LossHistory
from traceml.diagnosis.facts.skipped_steps import SkippedSteps
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import count_text, percent_text

__all__ = ["steps_skipped"]

LASTING_SHARE = 0.25
"""Share of the last quarter of the steps that is skipped, so that it goes on. A scaler skips a few steps at first."""
MIN_SKIPPED = 5
"""Fewer skipped steps than this are not a finding."""
_DENSE_SHARE = 0.8
_READ_EVERY = 64  # losses of fast steps are read in every 16th or 64th


def steps_skipped(skipped: SkippedSteps | None, losses: LossHistory | None = None) -> list[Finding]:
    """Return the finding about updates that are skipped, and go on being skipped.

    Args:
        losses: losses that were read; where they are not finite either, they are the cause.
    """
    if skipped is None or len(skipped.steps) < MIN_SKIPPED:
        return []

    count, last = len(skipped.steps), skipped.latest + 1
    span = max(last - skipped.first, 1)
    if skipped.share_since(last - max(span // 4, 1)) < LASTING_SHARE:
        return []

    since = _since(skipped.steps, last, skipped.taken_share)
    share = count / max(skipped.rows, count)
    loss = _loss_since(since, losses)
    cause = "their gradients were" if loss is None else f"their loss ({loss}), and so their gradients, were"
    return [
        Finding(
            kind=Kind.STEPS_SKIPPED,
            severity=Kind.STEPS_SKIPPED.severity_for(share),
            phase="optimizer",
            summary=(
                f"The optimizer skipped {count_text(count)} of {count_text(skipped.rows)} steps "
                f"({percent_text(share)}), most of them since step {count_text(since)}, and still does: {cause} "
                "not finite, so these steps trained nothing."
            ),
            next=_FOR_GRADIENTS if loss is None else _FOR_LOSS,
            evidence={
                "skipped": count,
                "steps": skipped.rows,
                "since_step": since,
                **({} if loss is None else {"loss": loss}),
            },
            cost_share=share,
        )
    ]


_FOR_GRADIENTS = (
    "Look at the loss from that step on (torch.autograd.set_detect_anomaly(True) names the operation); a lower "
    "learning rate, gradient clipping, or bfloat16 instead of float16 usually help."
)
_FOR_LOSS = (
    "Look at the batch of that step and at what computes the loss (a logarithm or a division of 0, an overflow); the "
    "model was not changed since. torch.autograd.set_detect_anomaly(True) names the operation."
)


def _loss_since(since: int, losses: LossHistory | None) -> str | None:
    """Return the loss that is no longer finite since about that step, as a word; None where it is finite."""
    found = None if losses is None else losses.first()
    return None if found is None or found[0] > since + _READ_EVERY else found[2]


def _since(steps: NDArray[np.int64], end: int, taken: float) -> int:
    """Return the step from which on nearly all steps were skipped; else the first skipped one."""
    left = np.arange(len(steps), 0, -1)
    dense = left >= _DENSE_SHARE * taken * (end - steps)
    return int(steps[np.argmax(dense)]) if dense.any() else int(steps[0])
