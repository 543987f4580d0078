"""Optimizers that are none of torch's are found by what they hold, and timed by their method `step`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net
from traceml.database.schema import StepFlag

X = torch.randn(2, 4)
N = 20


class Descent:
    """Gradient descent as tutorials write it, in two milliseconds."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.parameters = list(parameters)

    @torch.no_grad()
    def step(self) -> None:
        time.sleep(0.002)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class Listed:
    """A container as fastai's `L`."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class ByCallbacks(Descent):
    """As fastai's: lists of lists, and a `step` of a base class that calls functions."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.param_lists = Listed([Listed(list(parameters))])

    @property
    def parameters(self) -> list[torch.Tensor]:  # type: ignore[override]
        return self.param_lists.items[0].items  # type: ignore[no-any-return]


class Slotted:
    """No `__dict__`, no weak references."""

    __slots__ = ("inner",)

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.inner = tuple(parameters)

    def step(self) -> None:
        Descent(self.inner).step()

    def zero_grad(self) -> None:
        for parameter in self.inner:
            parameter.grad = None


class Warmup:
    """A schedule, which holds the optimizer and steps too."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1


def on_batches(make: Callable[[Iterable[torch.Tensor]], Any]) -> None:
    model = net()
    optimizer = make(model.parameters())
    schedule = Warmup(optimizer)
    for (x,) in data(N):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()


def without_loader(make: Callable[[Iterable[torch.Tensor]], Any]) -> None:
    model = net()
    optimizer = make(model.parameters())
    for _ in range(N):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [Descent, ByCallbacks, Slotted])
@pytest.mark.parametrize("loop", [on_batches, without_loader])
def test_an_optimizer_of_ones_own(traced: Traced, loop: Callable[[Any], None], make: Any) -> None:
    """Its steps are counted as such, and are no `other` time."""
    loop(make)

    rows = traced.finish()
    assert len(rows) == N
    assert all(row["optimizer_ns"] >= 2_000_000 and not row["flags"] & StepFlag.INFERRED for row in rows)
    assert {info["optimizer"] for info in traced.info if info["kind"] == "optimizer"} == {make.__name__}


def test_its_class_is_restored(traced: Traced) -> None:
    """Uninstalling leaves the user's class as it was."""
    before = vars(Descent)["step"]
    on_batches(Descent)
    assert vars(Descent)["step"] is not before

    traced.instrumentation.uninstall()
    assert vars(Descent)["step"] is before


class Trainer:
    """Has a `step` that does all, and the parameters."""

    def __init__(self) -> None:
        self.model = net()
        self.parameters = list(self.model.parameters())

    def step(self, x: torch.Tensor) -> None:
        self.model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in self.parameters:
                parameter -= 0.01 * parameter.grad  # type: ignore[operator]
                parameter.grad = None


def test_a_trainer_is_no_optimizer(traced: Traced) -> None:
    """Its steps are its batches, and its time is that of forward and backward."""
    trainer = Trainer()
    for (x,) in data(N):
        trainer.step(x)

    rows = traced.finish()
    assert len(rows) == N
    assert all(row["optimizer_ns"] == 0 and row["flags"] & StepFlag.INFERRED for row in rows)


class Hidden:
    """An optimizer whose parameters are not reached: a closure has them."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        own = list(parameters)
        self.update = lambda: Descent(own).step()

    def step(self) -> None:
        self.update()


def test_an_optimizer_that_is_declared(traced: Traced) -> None:
    """`trace_step(optimizer=...)` tells what the search cannot find."""
    model = net()
    optimizer = Hidden(model.parameters())
    for _ in range(N):
        with traced.instrumentation.trace_step(optimizer=optimizer):
            model(X).square().mean().backward()
            optimizer.step()

    rows = traced.finish()
    assert len(rows) == N
    assert all(row["optimizer_ns"] >= 2_000_000 for row in rows)
