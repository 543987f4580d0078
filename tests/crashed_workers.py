"""How a worker of pytest-xdist that crashed has ended: by which signal, and where its threads were.

pytest-xdist says only that it crashed; what faulthandler writes to its standard error is far above, among the dots.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TextIO

import pytest
from xdist.workermanage import WorkerController

from traceml.process_ends import end_of_status

_STACKS = pytest.StashKey[TextIO]()
_END_S = 60.0  # its pipe is closed just before its end


@pytest.hookimpl(trylast=True)  # after pytest's own, which writes to standard error
def pytest_configure(config: pytest.Config) -> None:
    """Let faulthandler write into a file, from which the controller reads."""
    if isinstance(values := getattr(config, "workerinput", None), dict):
        config.stash[_STACKS] = _stacks_file(values["testrunuid"], values["workerid"]).open("w")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Turn faulthandler on again: the test before may have turned it off."""
    if (file := item.config.stash.get(_STACKS, None)) is not None:
        faulthandler.enable(file)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the file of a worker that ends."""
    if (file := config.stash.get(_STACKS, None)) is not None:
        faulthandler.disable()
        file.close()
        Path(file.name).unlink()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: pytest.TestReport) -> None:
    """Add to the failure how the worker has ended."""
    worker: WorkerController = report.node  # type: ignore[attr-defined]
    text = f"{report.longrepr}\nits process {_end_of(worker)}"
    file = _stacks_file(worker.workerinput["testrunuid"], worker.gateway.id)
    if file.exists():
        text += f"\n{file.read_text(errors='replace')}"
        file.unlink()

    report.longrepr = text.rstrip()


def _end_of(worker: WorkerController) -> str:
    try:
        return end_of_status(worker.gateway._io.popen.wait(_END_S))
    except TimeoutExpired:
        return "has closed its pipe, and runs"


def _stacks_file(run: str, worker: str) -> Path:
    return Path(tempfile.gettempdir(), f"traceml-tests-{os.getuid()}-{run}-{worker}.stacks")
