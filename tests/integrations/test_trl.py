"""TRL's real trainers, which are Hugging Face's: the name alone traces them."""

from __future__ import annotations

import pytest

from tests.integrations.conftest import Job


@pytest.mark.frameworks
def test_a_fine_tuning(job: Job) -> None:
    """Nothing is computed otherwise; steps, tokens and metrics are those of the trainer."""
    ended = job("trl_job.py")
    run, history = ended.run, ended.said["history"]
    steps = run.steps()

    assert ended.said["same"]
    assert run.path.name.split("-", 2)[2].startswith("tuned-")
    assert len(steps) == 20
    for phase in ("input_wait", "forward", "backward", "optimizer"):
        assert (steps[f"{phase}_ns"][1:] > 0).all(), phase

    captured = {(name, step): value for name, step, value in ended.metrics(run)}
    expected = {(name, line["step"]): value for line in history for name, value in line.items() if name == "loss"}
    assert len(expected) == 4
    assert {key: captured[key] for key in expected} == expected
