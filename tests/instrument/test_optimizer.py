"""Steps that GradScaler skips, by itself or by the kernel of a fused optimizer."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from traceml.database.schema import StepFlag

BAD = (3, 4, 8)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_without_finite_gradients_are_skipped(traced: Traced, fused: bool, unscales: bool) -> None:
    """A fused optimizer is called for them, too, and leaves the parameters as they are."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(12):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        loss = model(torch.randn(2, 4)).square().mean()
        scaler.scale(loss * math.nan if step in BAD else loss).backward()
        if unscales:
            scaler.unscale_(optimizer)

        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.weight) is (step in BAD)

    skipped = [row["step"] for row in traced.finish() if row["flags"] & StepFlag.SKIPPED]
    assert skipped == list(BAD)
    assert not [row for row in traced.info if row["kind"] == "unread_skips"]


class OnDevice(torch.optim.SGD):
    """An optimizer whose scaler has found on a device whether gradients are finite."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> None:
        state = SCALER._per_optimizer_states[id(self)]
        state["found_inf_per_device"] = {"cuda:0": SimpleNamespace(is_cpu=False)}


SCALER = torch.amp.GradScaler("cpu")


def test_a_device_is_not_read_to_know_of_a_skipped_step(traced: Traced) -> None:
    """That would wait for it: only that such steps may be skipped is reported."""
    model = nn.Linear(4, 1)
    optimizer = OnDevice(model.parameters(), lr=0.1)
    SCALER.scale(model(torch.randn(2, 4)).sum()).backward()

    SCALER.step(optimizer)

    assert not any(row["flags"] & StepFlag.SKIPPED for row in traced.finish())
    assert len([row for row in traced.info if row["kind"] == "unread_skips"]) == 1


def test_a_scaler_that_is_off_skips_nothing(traced: Traced) -> None:
    """It steps the optimizer whatever the gradients are."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(4):
        scaler.scale(model(torch.randn(2, 4)).sum() * math.nan).backward()
        scaler.step(optimizer)
        scaler.update()

    assert not any(row["flags"] & StepFlag.SKIPPED for row in traced.finish())
