"""Losses that are not finite, without any logging."""

from __future__ import annotations

from collections.abc import Sequence

from traceml.diagnosis.facts.loss_history import LossHistory
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import capitalized, count_text, percent_text, ranks_text

__all__ = ["loss_not_finite"]

MIN_STEPS = 3
"""A loss that is not finite in fewer steps than this may be one that GradScaler skips."""


def loss_not_finite(losses: LossHistory, latest: Sequence[int]) -> list[Finding]:
    """Return the finding about a loss that is no longer finite.

    Args:
        losses: the losses.
        latest: last step of each rank, -1 before the first.
    """
    found = losses.first()
    steps = max(latest, default=-1) + 1
    if found is None or steps - found[0] < MIN_STEPS:
        return []

    since, ranks, word, last_finite = found
    wasted = steps - since
    share = wasted / max(steps, 1)
    return [
        Finding(
            kind=Kind.NUMERIC,
            severity=Kind.NUMERIC.severity_for(share),
            ranks=ranks,
            phase="backward",
            summary=(
                f"{capitalized(ranks_text(ranks))} had a loss of {word} in step {count_text(since)}, and it has not "
                f"been finite since: {count_text(wasted)} of {count_text(steps)} steps ({percent_text(share)}) trained "
                "nothing useful."
            ),
            next=(
                f"Go back to a checkpoint from before step {count_text(since)}. Look at the batch of that step, lower "
                "the learning rate or clip gradients; torch.autograd.set_detect_anomaly(True) names the operation."
            ),
            evidence={
                "since_step": since,
                "wasted_steps": wasted,
                "steps": steps,
                "loss": word,
                "last_finite_loss": last_finite,
            },
            cost_share=share,
        )
    ]
