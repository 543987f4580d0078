"""What a script does after its loop is not part of the last step."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.instrument.conftest import Traced
from traceml.database.schema import Phase
from traceml.instrument.values.last_step import usual_end

MIN_TAIL_S = 0.3


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    time.sleep(0.01)


def without_loader(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(10):
        step(model, optimizer, torch.ones(2, 4))


def left_early(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for index, (x,) in enumerate(DataLoader(TensorDataset(torch.ones(60, 4)), batch_size=2)):
        step(model, optimizer, x)
        if index == 9:
            break


@pytest.mark.parametrize("train", [without_loader, left_early])
def test_code_after_the_loop_is_no_part_of_it(traced: Traced, train) -> None:
    """The last step has as much code outside the phases as the others."""
    model = torch.nn.Linear(4, 1)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    longest_ns = max(row["other_ns"] for row in traced.steps())  # on a busy machine a pause in a step is long, too
    time.sleep(max(MIN_TAIL_S, 3e-9 * longest_ns))
    rows = traced.finish()

    assert len(rows) == 10
    assert rows[-1]["total_ns"] >= 10_000_000
    assert rows[-1]["other_ns"] <= longest_ns
    assert rows[-1]["t_end_ns"] - rows[-1]["total_ns"] >= rows[-2]["t_end_ns"] - 1_000


def test_a_long_step_like_those_before_is_whole(traced: Traced) -> None:
    """Code that runs in each step stays in the last one."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        step(model, optimizer, torch.ones(2, 4))
        time.sleep(0.1)

    rows = traced.finish()

    assert all(row["other_ns"] >= 100_000_000 for row in rows)


@pytest.mark.parametrize(("usual_s", "waits_s", "is_cut"), [(0.02, 0.5, True), (0.4, 0.04, False)])
def test_a_barrier_after_the_loop_is_no_part_of_it(
    traced: Traced, usual_s: float, waits_s: float, is_cut: bool
) -> None:
    """Rank 0 evaluates, say, and the others wait in a barrier: in no step did they wait as long.

    Some tenths of a second and a bit are not far longer than those, also where a busy machine adds a pause.
    """
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        step(model, optimizer, torch.ones(2, 4))
        wait(traced, usual_s)

    usual_ns = max(row["comm_ns"] for row in traced.steps())  # on a busy machine
    wait(traced, max(waits_s, 10e-9 * usual_ns) if is_cut else waits_s)
    rows = traced.finish()

    longest_ns = max(row["comm_ns"] for row in rows[:-1])
    if is_cut:
        assert rows[-1]["comm_ns"] <= longest_ns
    else:
        assert rows[-1]["comm_ns"] >= (usual_s + waits_s) * 1e9
    assert rows[-1]["total_ns"] >= rows[-1]["comm_ns"] + 10_000_000
    assert rows[-1]["t_end_ns"] - rows[-1]["total_ns"] >= rows[-2]["t_end_ns"] - 1_000


@pytest.mark.parametrize("saves_before", [False, True])
def test_the_first_save_after_the_loop_is_no_part_of_it(traced: Traced, saves_before: bool) -> None:
    """A training that saved in its steps may save in the last one, too."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(5):
        step(model, optimizer, torch.ones(2, 4))
        if saves_before and number == 1:
            wait(traced, 0.02, Phase.CHECKPOINT)

    wait(traced, 0.05, Phase.CHECKPOINT)
    last = traced.finish()[-1]

    assert last["checkpoint_ns"] >= 50_000_000 if saves_before else last["checkpoint_ns"] == 0
    assert last["total_ns"] >= last["checkpoint_ns"] + last["other_ns"]
    assert last["other_ns"] >= 10_000_000


def wait(traced: Traced, seconds: float, phase: Phase = Phase.COMM) -> None:
    """Wait in a collective, or in another phase."""
    began = traced.instrumentation.clock.enter(int(phase))
    time.sleep(seconds)
    assert began is not None
    traced.instrumentation.clock.leave(int(phase), began)


def test_without_earlier_steps_nothing_is_cut_off(traced: Traced) -> None:
    """Nothing tells what is usual."""
    assert usual_end(traced.flight.ring("steps"), 1000, 900, 100) == 1000
