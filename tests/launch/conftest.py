"""Real hosts and a real Slurm, set up once for all tests that launch, and a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .hosts import Hosts, Slurm


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """node0, where scripts launch from (`hosts.launcher`), and node1 and node2, reached by ssh (`hosts.ssh_config`)."""
    with Hosts(tmp_path_factory.mktemp("hosts"), 2) as running:
        yield running


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    """A Slurm whose controller is node0 and whose nodes are node1 and node2."""
    with Slurm(hosts) as running:
        yield running


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe: the ends to read from and to write to."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)
