"""Workers of pytest-xdist, forked from one process that has imported the tests: that takes most of their start."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from execnet import gateway_io

from tests.forked.client import ForkServer, Popen

__all__ = ["fork_workers"]

_FEWEST = 3  # fewer import the tests at the same time as it would


def fork_workers(config: pytest.Config, count: int) -> None:
    """Let the workers of a run be forked, if there are enough of them."""
    if count < _FEWEST:
        return

    server = ForkServer("tests", ["-m", config.option.markexpr, *config.args])

    class Worker(Popen):
        def _server(self) -> ForkServer:
            return server

    class WorkerIO(gateway_io.Popen2IOMaster):  # type: ignore[misc]
        def __init__(self, args: list[str], execmodel: Any) -> None:
            self.popen = Worker(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            gateway_io.Popen2IO.__init__(self, self.popen.stdin, self.popen.stdout, execmodel=execmodel)

    gateway_io.Popen2IOMaster = WorkerIO
