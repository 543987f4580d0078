"""Work beside the steps is planned by their length."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from traceml.database.flight.flight import FlightFile
from traceml.instrument.maintenance.overhead import HookOverhead
from traceml.instrument.values import step_pace
from traceml.instrument.values.losses import CudaLosses, LossReader

_US = 1000


@pytest.mark.parametrize(
    ("step_us", "measured"),
    [
        (80, [1, 65, 129, 193]),
        (500, [1, 65, 129, 193, 449]),
        (1000, [1, 65, 129, 193, 257, 321, 385, 449, 513, 577]),
    ],
)
def test_short_steps_are_looked_after_less_often(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, step_us: int, measured: list[int]
) -> None:
    """By a clock on which each 64 steps take as long as given; the first 256 steps are all alike."""
    readings = count(10**12, 64 * step_us * _US)
    monkeypatch.setattr(step_pace, "monotonic_ns", lambda: next(readings))
    rows: list[int] = []
    monkeypatch.setattr(HookOverhead, "measure", lambda *_, **__: rows.append(traced.instrumentation.clock.rows))
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(600):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    assert rows == measured


@pytest.mark.parametrize(("step_us", "mask"), [(80, 63), (250, 63), (251, 15), (1000, 15), (1001, 0), (10**6, 0)])
def test_short_steps_are_read_less_often(tmp_path: Path, step_us: int, mask: int) -> None:
    """The loss is read in steps whose number has none of the mask's bits: 62 times a second or more."""
    flight = FlightFile.create(tmp_path, {})
    clock = SimpleNamespace(loss_mask=-1)
    reader = LossReader(clock, flight.ring("losses"), CudaLosses())  # type: ignore[arg-type]
    assert clock.loss_mask == 0

    reader.plan(step_us * _US)

    flight.close(unlink=True)
    assert clock.loss_mask == mask
