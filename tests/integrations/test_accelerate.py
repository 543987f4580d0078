"""Accelerate needs no adapter: `traceml.init` finds what its wrapped loaders, models and optimizers do."""

from __future__ import annotations

from collections import Counter

from tests.integrations.conftest import Job


def test_a_prepared_loop(job: Job) -> None:
    """A step is one of the real optimizer, evaluation is none, and nothing is computed otherwise."""
    ended = job("accelerate_job.py", ranks=2)
    (first, named) = ended.runs
    steps = first.steps()

    assert ended.said == {"same": True, "left": []}
    assert Counter(steps["rank"].tolist()) == {0: 12, 1: 12}
    assert steps["micro_batches"].tolist() == [4, 4, 4, 4, 4, 2] * 4
    for phase in ("input_wait", "forward", "backward", "optimizer"):
        assert (steps[f"{phase}_ns"] > 0).all(), phase

    evals = first.table("evals")
    assert Counter(evals["rank"].tolist()) == {0: 2, 1: 2}
    assert evals["batches"].tolist() == [3] * 4
    assert (steps["checkpoint_ns"] > 0).any()

    # By `log_with="traceml"`: all ranks, and what the loop logs on the first.
    assert named.path.name.split("-", 2)[2].startswith("by-name-")
    assert Counter(named.steps()["rank"].tolist()) == {0: 12, 1: 12}
    assert [(name, step) for name, step, _ in ended.metrics(named)] == [("last loss", 25), ("last loss", 50)]
    assert [(row["rank"], row["params"]) for row in named.log("logged") if row["kind"] == "params"] == [
        (0, {"lr": 0.01})
    ]
    assert named.report["run"]["project"] == "a-project"
