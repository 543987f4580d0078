"""Steps in which ranks wait for those with more batches, at the end of `with Join(...)`: these show no usual step."""

from __future__ import annotations

import numpy as np

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.steps.aligned_steps import AlignedSteps

__all__ = ["without_joined_steps"]


def without_joined_steps(window: AlignedSteps, facts: JobFacts) -> AlignedSteps:
    """Return the window without the steps at which a rank has left `with Join(...)`.

    The wait is in the step that was open, or in the next one where the script begins that with its next batch.
    """
    left = [step + after for steps in facts.joined.values() for step in steps for after in (0, 1)]
    kept = ~np.isin(window.steps, left)
    return window if kept.all() else window.select(kept)
