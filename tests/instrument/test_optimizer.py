"""Optimizers whose step is called in unusual ways, and steps that GradScaler skips."""

from __future__ import annotations

import copy
import gc
import inspect
import math
from functools import partial
from types import MethodType, SimpleNamespace
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
    scaler: torch.amp.GradScaler

    def step(self, closure: Any = None) -> None:
        state = self.scaler._per_optimizer_states[id(self)]
        state["found_inf_per_device"] = {"cuda:0": SimpleNamespace(is_cpu=False)}


def test_a_device_is_not_read_to_know_of_a_skipped_step(traced: Traced) -> None:
    """That would wait for it: only that such steps may be skipped is reported."""
    model = nn.Linear(4, 1)
    optimizer = OnDevice(model.parameters(), lr=0.1)
    scaler = optimizer.scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 4)).sum()).backward()

    scaler.step(optimizer)

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


def test_steps_of_a_method_that_was_taken_before_tracing_are_not_skipped(traced: Traced) -> None:
    """Accelerate takes it in `prepare`. Its optimizers get a function that calls it, at each call of the scaler."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    taken = torch.no_grad()(partial(inspect.unwrap(torch.optim.AdamW.step), optimizer))
    scaler = torch.amp.GradScaler("cpu")
    for step in range(12):
        optimizer.zero_grad()
        loss = model(torch.randn(2, 4)).square().mean()
        scaler.scale(loss * math.nan if step in BAD else loss).backward()
        optimizer.step = lambda: taken()  # type: ignore[method-assign]
        before = optimizer.step
        scaler.step(optimizer)
        assert optimizer.step is before
        scaler.update()

    assert [row["step"] for row in traced.finish() if row["flags"] & StepFlag.SKIPPED] == list(BAD)


class OfModel(torch.optim.SGD):
    """An optimizer whose step takes the model."""

    def step(self, model: nn.Module) -> None:  # type: ignore[override]
        super().step()
        self.seen = sum(1 for _ in model.parameters())


def test_a_module_that_is_given_to_a_step_is_no_closure(traced: Traced) -> None:
    """It is callable, too."""
    model = nn.Linear(4, 1)
    optimizer = OfModel(model.parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()

    optimizer.step(model)

    assert optimizer.seen == 2


def test_a_closure_keeps_its_attributes(traced: Traced) -> None:
    """Optimizers of the zeroth order read the model from it."""
    model = nn.Linear(4, 1)

    class Reads(torch.optim.SGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            closure()
            self.seen = closure.model
            super().step()

    optimizer = Reads(model.parameters(), lr=0.1)
    closure: Any = partial(lambda: model(torch.randn(2, 4)).sum().backward())
    closure.model = model

    optimizer.step(closure)

    assert optimizer.seen is model


def test_a_bound_step_of_the_instance_stays_bound(traced: Traced) -> None:
    """A scheduler that is made later reads its function."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    original = torch.optim.SGD.step
    optimizer.step = MethodType(lambda self: original(self), optimizer)  # type: ignore[method-assign]
    model(torch.randn(2, 4)).sum().backward()  # the first one searches
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        scheduler.step()

    assert len(traced.finish()) == 3


def test_a_new_optimizer_at_the_address_of_the_last_one_is_new(traced: Traced) -> None:
    """Folds of a cross validation free one and make the next."""
    model = nn.Linear(4, 1)

    def fold() -> int:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()

        return id(optimizer)

    folds = [fold() for _ in range(8)]

    assert len(set(folds)) < len(folds)
    assert traced.instrumentation.clock.optimizers_seen == len(folds)


def test_a_further_optimizer_makes_no_search_among_all_objects(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a search takes 100 ms where a script imports transformers, and would be part of the optimizer's step."""
    searches: list[None] = []
    list_objects = gc.get_objects

    def train() -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()

    train()
    monkeypatch.setattr(gc, "get_objects", lambda: searches.append(None) or list_objects())
    train()
    train()

    assert not searches
    steps = traced.finish()
    assert [step["forward_ns"] > 0 for step in steps] == [True] * 9


def test_a_copied_optimizer_is_known(traced: Traced) -> None:
    """No constructor makes the copy: its model is trained from its first step on, and may be evaluated without data."""
    first = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    first(torch.randn(2, 4)).sum().backward()
    optimizer.step()

    model, copied = copy.deepcopy((first, optimizer))
    for _ in range(3):
        model.train()
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
            copied.step()

        model.eval()
        with torch.no_grad():
            model(torch.randn(2, 4))

    traced.finish()
    assert len(traced.table("evals")) == 3
