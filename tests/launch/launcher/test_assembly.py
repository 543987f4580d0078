"""Agents of all hosts, started at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from traceml.errors import AgentFailedError
from traceml.launch.launcher.assembly import _connect
from traceml.launch.launcher.hosts.hosts import HostSpec
from traceml.launch.launcher.launch_options import LaunchOptions
from traceml.launch.shared.descriptor_limit import soft_limit


@pytest.mark.process
def test_hosts_beyond_the_limit_of_open_files_are_an_error_that_names_it() -> None:
    """It was the system's words alone, with the advice for a missing ssh."""
    limit = max(int(file.name) for file in Path("/proc/self/fd").iterdir()) + 12
    specs = [HostSpec(f"host{number}", "local") for number in range(200)]
    with soft_limit(limit), pytest.raises(AgentFailedError) as refused:
        _connect(LaunchOptions(), specs)

    assert refused.value.reason == f"the limit of {limit:,} open files is reached: 200 hosts need some three each"
    assert refused.value.advice == "Start the job after `ulimit -n 65536`."
