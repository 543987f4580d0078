"""Losses are read without logging: their values, their steps, and never by waiting for a device."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.instrument.conftest import Traced
from traceml.database.flight.flight import FlightFile
from traceml.instrument.clock_implementations import new_clock
from traceml.instrument.values.losses import LossReader


def train(steps: int, *, scale: float = 0.0, passes: int = 1, bad: frozenset[int] = frozenset()) -> list[float]:
    """Train; return the loss of each step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 0)
    found = []
    for step, (x,) in enumerate(DataLoader(TensorDataset(torch.randn(2 * steps, 4)), batch_size=2)):
        total = 0.0
        for _ in range(passes):
            loss = model(x).square().mean() * (math.nan if step in bad else 1)
            scaler.scale(loss).backward()
            total += loss.item()

        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(total)

    return found


def read(traced: Traced) -> dict[int, float]:
    traced.instrumentation.close_open_step()
    return {row["step"]: row["loss"] for row in traced.table("losses")}


def test_the_first_losses_all_have_rows(traced: Traced) -> None:
    """The loss of a step is the value on which backward was called."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = train(12)

    assert read(traced) == dict(enumerate(expected))


def test_the_factor_of_grad_scaler_is_left_out(traced: Traced) -> None:
    """The loss is the one before scaling."""
    expected = train(8, scale=1024.0)
    assert read(traced) == dict(enumerate(expected))


def test_the_factor_of_the_scaler_of_fsdp_is_left_out(traced: Traced) -> None:
    """Its `scale` is a method of its own."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model = nn.Linear(4, 1)
    scaler = ShardedGradScaler(device="cpu", init_scale=1024.0)
    loss = model(torch.randn(2, 4)).square().mean()

    scaler.scale(loss).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    assert read(traced) == {0: loss.item()}


def test_losses_of_several_passes_are_added(traced: Traced) -> None:
    """With gradient accumulation the row has the sum."""
    expected = train(6, passes=3)
    assert read(traced) == pytest.approx(dict(enumerate(expected)))


@pytest.mark.parametrize(("passes", "new_loaders"), [(1, True), (2, True), (1, False)])
def test_the_first_loss_of_an_epoch_is_its_own(traced: Traced, passes: int, new_loaders: bool) -> None:
    """It is not added to the last one of the epoch before, whose step is still open then."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = TensorDataset(torch.randn(8 * passes, 4))
    loader = DataLoader(data, batch_size=2)
    expected = []
    for _ in range(3):
        for number, (x,) in enumerate(DataLoader(data, batch_size=2) if new_loaders else loader, 1):
            loss = model(x).square().mean()
            loss.backward()
            expected.append(loss.item())
            if number % passes == 0:
                optimizer.step()

    of_steps = [sum(expected[first : first + passes]) for first in range(0, len(expected), passes)]
    assert read(traced) == pytest.approx(dict(enumerate(of_steps)))


def test_the_step_of_a_change_to_nan_has_a_row(traced: Traced) -> None:
    """A loss that is not finite has a row at its first step, also among steps without rows."""
    train(400, bad=frozenset(range(320, 400)))
    losses = read(traced)
    first = min(step for step, loss in losses.items() if math.isnan(loss))
    assert 320 <= first < 336


def test_the_last_loss_that_is_read_has_a_row(traced: Traced) -> None:
    """Also among steps without rows: a loss that was not finite before it is judged by both."""
    train(400, bad=frozenset(range(320, 400)))
    assert max(read(traced)) >= 400 - 64


def test_other_tensors_are_no_losses(traced: Traced) -> None:
    """A backward pass from a tensor with several numbers has no loss."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for (x,) in DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=2):
        model(x).backward(torch.ones(2, 4))
        optimizer.step()

    assert len(traced.finish()) == 10
    assert traced.table("losses") == []


@dataclass
class Lagging:
    """A device that has copied what was asked before `reached`."""

    reached: int = 0
    asked: int = 0
    values: dict[int, float] = field(default_factory=dict)
    most: int = 0

    def has(self, tensor: Any) -> bool:
        return bool(tensor.device.type == "meta")

    def copy(self, tensor: Any, place: int) -> Any:
        self.asked += 1
        self.values[place] = float(self.asked)
        return Copied(self, self.asked)

    def value(self, place: int) -> float:
        return self.values[place]


@dataclass
class Copied:
    """One copy."""

    device: Lagging
    number: int

    def query(self) -> bool:
        return self.number <= self.device.reached


class Silent:
    """Listener of a clock."""

    def first_backward(self) -> bool:
        return True

    def find_new_models(self) -> None: ...

    def new_optimizer(self, optimizer: object) -> None: ...

    def maintain(self, forward_ns: int, backwards: int) -> None: ...


def test_a_device_is_never_waited_for(tmp_path: Path) -> None:
    """Copies are read once they are complete, with the step in which they began; there are at most 8 of them."""
    flight = FlightFile.create(tmp_path, {})
    clock, device = new_clock(flight, Silent()), Lagging()
    reader = LossReader(clock, flight.ring("losses"), device)
    loss = torch.zeros((), device="meta")
    for step in range(20):
        clock.rows = step
        reader.read(loss)

    assert (device.asked, clock.loss_mask) == (8, 15)

    device.reached = 8
    clock.rows = 32
    reader.read(loss)
    reader.finish()
    table = flight.ring("losses")
    rows = list(iter(memoryview(table.read_from(0, 16).data).cast("B").cast("d").tolist()))
    assert rows[2::3] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    flight.close(unlink=True)
