"""Hugging Face's real Trainer with the one added line."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

from tests.integrations.conftest import Job

SAVE_S = 0.03


def test_trainings_of_one_process(job: Job) -> None:
    """Nothing is computed otherwise, steps and metrics are the Trainer's own, and nothing is left behind."""
    ended = job("huggingface_job.py", "alone")
    said, runs = ended.said, ended.runs

    assert said["same 1"]
    assert said["same 4"]
    assert said["same after a resume"]
    assert said["left"] == []
    assert said["train is put back"]
    assert said["running after predict"] is False
    assert said["error"] == "the user's own"

    each, accumulating, failed, *_resumed, waiting = runs
    assert [len(run.steps()) for run in runs] == [22, 6, 5, 10, 20, 80]
    assert [run.state for run in runs] == ["finished", "finished", "failed", *["finished"] * 3]
    assert accumulating.steps()["micro_batches"].tolist() == [4, 4, 3] * 2
    for run in (each, accumulating):
        steps = run.steps()
        for phase in ("input_wait", "forward", "backward", "optimizer"):
            assert (steps[f"{phase}_ns"][1:] > 0).all(), phase

        assert run.table("evals")["batches"].sum() == 2 * 3

    assert (each.steps()["checkpoint_ns"] > 0).nonzero()[0].tolist() == [9, 19, 21]
    assert "ValueError" in str(failed.report["ranks"][0]["exit"])

    expected = [
        (name, int(line["step"]), float(value))
        for line in said["history"]
        for name, value in line.items()
        if name != "step"
    ]
    assert ended.metrics(accumulating) == expected

    # A resumed training counts on.
    first, second = _resumed
    assert first.steps()["step"].tolist() == list(range(10))
    assert second.steps()["step"].tolist() == list(range(10, 30))

    # The last one waits for its data, and says so; its arguments alone ask for us.
    assert waiting.path.name.split("-", 2)[2].startswith("by-name-")
    (found,) = (
        each for each in waiting.findings if each.kind == "INPUT_BOUND"
    )  # after CPU_CONTENTION where it is busy
    assert "set dataloader_num_workers=" in found.next
    assert waiting.verdict.kind.value in ended.stderr
    assert str(waiting.path) in ended.stderr


def test_a_resumed_training_without_a_callback(job: Job) -> None:
    """A script that traces itself has the Trainer's own step numbers, and all of its saving."""
    ended = job("huggingface_job.py", "by_init")

    steps = ended.run.steps()
    assert ended.said == {"steps": 30}
    assert steps["step"].tolist() == list(range(10, 30))
    assert steps["step"][steps["checkpoint_ns"] >= SAVE_S * 1e9].tolist() == [19, 29]


def test_ranks_of_torchrun(job: Job) -> None:
    """Two ranks are one run with one verdict for each training, and train as without us."""
    ended = job("huggingface_job.py", "ranks", ranks=2)

    assert ended.said["same"]
    assert [run.state for run in ended.runs] == ["finished"] * 2
    assert ended.stderr.count("─ traceml ─") == 2
    for run in ended.runs:
        steps = run.steps()
        assert Counter(steps["rank"].tolist()) == {0: 22, 1: 22}
        assert (steps["backward_own_ns"] > 0).any()


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import traceml.integrations.huggingface"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "ImportError: traceml.integrations.huggingface needs transformers, which cannot be imported" in done.stderr
    assert "pip install 'traceml-torch[huggingface]'" in done.stderr
