"""Ray Train's real workers, which Ray starts in folders and threads of their own."""

from __future__ import annotations

from collections import Counter

from tests.integrations.conftest import Job


def test_workers_are_the_ranks_of_one_run(job: Job) -> None:
    """Both workers are in one run in the driver's folder, by the host's aggregator as by one started for hosts."""
    ended = job("ray_job.py", RAY_AUTH_MODE="disabled", RAY_TRAIN_V2_ENABLED="1")

    assert ended.said == {"error": "None"}
    assert len(ended.runs) == 2
    for run in ended.runs:
        steps = run.steps()
        assert Counter(steps["rank"].tolist()) == {0: 24, 1: 24}
        assert (steps["forward_ns"] > 0).all()
        assert (steps["optimizer_ns"] > 0).all()
        assert run.state == "finished"
        assert run.report["run"]["world_size"] == 2
        assert run.id.split("-", 2)[2].startswith("ray_job")

    assert (ended.folder / "traceml_runs").is_dir()
