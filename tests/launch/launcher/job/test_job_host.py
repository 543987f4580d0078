"""A host of a job: how many workers it gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from traceml.launch.launcher.hosts.hosts import HostSpec
from traceml.launch.launcher.job.job_host import JobHost
from traceml.launch.shared.launch_messages import Prepared


@pytest.mark.parametrize(
    ("workers", "gpus", "cpu_workers", "size"),
    [(None, 2, None, 2), (3, 2, None, 3), (None, 0, 4, 4), (None, 0, None, 16)],
    ids=["gpus", "as asked", "as requested from Slurm", "cores"],
)
def test_the_workers_of_a_host_without_a_number_follow_the_gpus_that_they_see(
    workers: int | None, gpus: int, cpu_workers: int | None, size: int
) -> None:
    """Those of the agent may be others: it may have started with other variables."""
    agent: Any = SimpleNamespace(hello=SimpleNamespace(cores=16))
    host = JobHost(HostSpec("node1", "local", workers, cpu_workers), "node1", lambda: agent, agent)
    host.prepared = Prepared(job="j", gpus=gpus)

    assert host.size == size
