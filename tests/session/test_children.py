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
