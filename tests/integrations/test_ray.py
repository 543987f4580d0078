"""Ray Train's real workers, which Ray starts in folders and threads of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.forked.commands import Commands
from tests.integrations.conftest import Ended, jobs_in

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """All trainings, on one Ray, whose workers are forked: to start them takes more CPU time than a training."""
    folder = tmp_path_factory.mktemp("ray")
    with closing(Commands(folder / "bin", new_session=True)) as commands, jobs_in(folder, timeout_s=300) as job:
        # Its watcher of nodes that are taken away is one more process that imports for seconds, for each training.
        quick = {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
        yield job("ray_job.py", str(commands.folder / "python"), RAY_TRAIN_V2_ENABLED="1", **quick)


def test_workers_are_the_ranks_of_one_run(ended: Ended) -> None:
    """Both workers are in one run in the driver's folder, by the host's aggregator as by one started for hosts.

    What they report is captured once.
    """
    assert ended.said["errors"][0] == ""
    assert len(ended.runs) == 4
    for run in ended.runs[:2]:
        steps = run.steps()
        assert Counter(steps["rank"].tolist()) == {0: 24, 1: 24}
        assert (steps["forward_ns"] > 0).all()
        assert (steps["optimizer_ns"] > 0).all()
        assert run.state == "finished"
        assert run.report["run"]["world_size"] == 2
        assert run.id.split("-", 2)[2].startswith("ray_job")
        reported = [(name, value) for name, _, value in ended.metrics(run)]
        expected = [each for epoch in range(3) for each in (("epoch", float(epoch)), ("nested/half", epoch / 2))]
        assert sorted(reported) == sorted(expected * 2)  # of both ranks, and nothing after the trainings

    assert (ended.folder / "traceml_runs").is_dir()


def test_a_failed_training_keeps_all_rows_and_shows_the_verdict(ended: Ended) -> None:
    """Ray kills the other ranks and their children: their rows, the report and the driver's verdict remain."""
    assert all(ended.said["errors"][1:])
    for run, failing in zip(ended.runs[2:], (1, 0), strict=True):
        steps = Counter(run.steps()["rank"].tolist())
        assert steps[failing] == 51
        assert steps[1 - failing] in (50, 51)
        assert run.state == "failed"
        assert run.report["verdict"]["kind"] == "RANK_LOST"
        assert ended.stderr.count(f"RuntimeError: rank {failing} is bad") == 1
        assert ended.stderr.count(f"traceml report {run.id}") == 1
