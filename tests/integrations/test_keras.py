"""Keras on torch: its optimizers are not torch's, and have no method `step`."""

from __future__ import annotations

from tests.integrations.conftest import Job


def test_fit(job: Job) -> None:
    """Each batch is a step with all phases, validation is none, and nothing is computed otherwise."""
    ended = job("keras_job.py")
    steps = ended.run.steps()

    assert ended.said == {"same": True, "left": []}
    assert len(steps) == 30
    for phase in ("forward", "backward", "optimizer"):
        assert (steps[f"{phase}_ns"] > 0).all(), phase
