"""Trainings in processes that a script starts by `multiprocessing`."""

from __future__ import annotations

import pytest

from tests.aggregator.conftest import Serving
from tests.recorder.conftest import Run

SPAWNS = """
import sys, traceml
import torch.multiprocessing as mp

def work():
    import torch
    optimizer = torch.optim.SGD([parameter := torch.nn.Parameter(torch.ones(8))], lr=0.01)
    for _ in range(3):
        parameter.sum().backward()
        optimizer.step()
    print(traceml.init().config.mask)

if __name__ == "__main__":
    traceml.init(run_name="mine", project="own", mask=["password", "re:a{1,2}"])
    child = mp.get_context(sys.argv[1]).Process(target=work)
    child.start()
    child.join()
"""


@pytest.mark.process
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_that_trains_has_the_settings_of_init(serving: Serving, run_script: Run, method: str) -> None:
    """Also those that must not be in the environment, which other programs see."""
    done = run_script(SPAWNS, method)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "('password', 're:a{1,2}')\n"
    assert [run_dir.name[16:20] for run_dir in serving.run_dirs] == ["mine", "mine"]


FORKS = """
import os, sys, torch, traceml
traceml.init()
if os.fork() == 0:
    if "init" in sys.argv:
        traceml.init()
    for _ in range(2):
        torch.optim.SGD([torch.nn.Parameter(torch.ones(8))], lr=0.01)
    os._exit(0)
os.wait()
if "both" in sys.argv:
    torch.optim.SGD([torch.nn.Parameter(torch.ones(8))], lr=0.01)
"""


@pytest.mark.process
@pytest.mark.parametrize(("how", "warnings"), [("", 1), ("both", 1), ("init", 0)])
def test_a_forked_child_that_trains_says_that_it_is_not_traced(
    serving: Serving, run_script: Run, how: str, warnings: int
) -> None:
    """Once, and only there: its parent is traced, and a child that calls `init` is, too."""
    done = run_script(FORKS, how)

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trains without tracing") == warnings


@pytest.mark.process
def test_a_child_of_multiprocessing_is_not_called_untraced(serving: Serving, run_script: Run) -> None:
    """It is a rank."""
    assert "without tracing" not in run_script(SPAWNS, "fork").stderr
