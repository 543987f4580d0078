"""Lightning's real Trainer with the one added line, by both import names."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.integrations.conftest import Job

LOSS_S, SAVE_S = 0.005, 0.2


def test_trainings_of_one_process(job: Job) -> None:
    """Nothing is computed otherwise, steps and metrics are the trainer's own, and nothing is left behind."""
    ended = job("lightning_job.py", "alone", "lightning.pytorch")
    said, runs = ended.said, ended.runs

    assert said["plain"]
    assert said["accumulating"]
    assert said["manual"]
    assert said["left"] == []
    assert said["error"] == "the user's own"
    assert said["running after validate"] is False

    plain, accumulating, manual, failed, *_again, by_logger, uncaptured, _first, resumed = runs
    assert [len(run.steps()) for run in runs] == [22, 6, 22, 5, 22, 11, 22, 22, 22, 11]
    assert [run.state for run in runs] == ["finished"] * 3 + ["failed"] + ["finished"] * 6
    assert resumed.steps()["step"].tolist() == list(range(22, 33))
    assert accumulating.steps()["micro_batches"].tolist() == [4, 4, 3] * 2
    for run in (plain, accumulating, manual):
        steps = run.steps()
        for phase in ("input_wait", "forward", "backward", "optimizer"):
            assert (steps[f"{phase}_ns"] > 0).all(), phase

        assert run.table("evals")["batches"].sum() == 2 + 2 * 3
        assert (steps["checkpoint_ns"] > 0).sum() == 2

    assert "ValueError" in str(failed.report["ranks"][0]["exit"])
    # A logger alone traces the same, and its values come once, with the capture and without.
    assert said["checkpoint"] == "traceml"
    assert (by_logger.steps()["forward_ns"] > 0).all()
    assert ended.metrics(by_logger) == ended.metrics(uncaptured)
    assert [(name, step) for name, step, _ in ended.metrics(by_logger)] == [
        (name, step) for name, step, _ in ended.metrics(plain)
    ]
    metrics = [(name, step) for name, step, _ in ended.metrics(plain)]
    assert len(metrics) == len(set(metrics))
    assert [step for name, step in metrics if name == "loss"] == [3, 7, 11, 15, 19]
    assert [step for name, step in metrics if name == "val"] == [10, 21]


def test_a_verdict_is_shown(job: Job) -> None:
    """One line is enough to be told that training waits for its data, also under the other name."""
    ended = job("lightning_job.py", "waiting", "pytorch_lightning")

    assert "INPUT_BOUND" in {each.kind for each in ended.run.findings}  # after CPU_CONTENTION on a busy machine
    assert ended.run.verdict.kind.value in ended.stderr
    assert (ended.run.steps()["forward_ns"] > 0).all()
    # It is the callback of the package that was imported; of both, once both are, and so are its copies and subclasses.
    assert ended.said == {"bases": ["traceml", "pytorch_lightning"], "both": [True] * 4, "key": "TraceMLCallback"}


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_resumed_training_without_a_callback(job: Job, package: str) -> None:
    """A script that traces itself has Lightning's own step numbers, and `training_step` is the forward.

    Fabric writes a checkpoint after `torch.save`, which makes it in memory.
    """
    ended = job("lightning_job.py", "by_init", package)

    resumed, saved = ended.runs
    steps = resumed.steps()
    assert ended.said == {"steps": 33}
    assert steps["step"].tolist() == list(range(22, 33))
    assert (steps["forward_ns"] >= LOSS_S * 1e9).all()
    assert (saved.steps()["checkpoint_ns"] >= SAVE_S * 1e9).tolist() == [False, False, True, False]  # without a loader


def test_ranks_that_lightning_starts(job: Job) -> None:
    """Its launcher runs the script again: both processes are one run with one verdict."""
    ended = job("lightning_job.py", "ranks", "lightning.pytorch")

    steps = ended.run.steps()
    assert ended.said == {"rank": 0, "steps": 22}
    assert Counter(steps["rank"].tolist()) == {0: 22, 1: 22}
    assert (steps["forward_ns"] > 0).all()
    assert (steps["backward_own_ns"] > 0).any()
    assert ended.stderr.count("─ traceml ─") == 1
