"""Training in `eval()`: models that are updated in it are told, and no others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, sgd, train


def model(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), *(layers or (nn.Dropout(0.5),)), nn.Linear(8, 2))


def train_for(steps: int, net: nn.Module, optimizer: Any) -> None:
    for (x,) in data(steps):
        train(net, optimizer, x)


def evaluate(net: nn.Module, *, forgets: bool = True) -> None:
    net.eval()
    with torch.no_grad():
        for (x,) in data(3):
            net(x)

    if not forgets:
        net.train()


def told(traced: Traced) -> list[tuple[str, list[str], int, int]]:
    return [
        (row["model"], row["layers"], row["step"], row["steps"])
        for row in traced.info
        if row["kind"] == "evaluation_mode"
    ]


def test_a_model_that_stays_in_evaluation_is_told_with_its_first_step(traced: Traced) -> None:
    """From an evaluation without `train()` up to the end of the run, or to the next epoch's `train()`."""
    net = model(nn.Dropout(0.5), nn.BatchNorm1d(8))
    optimizer = sgd(net)
    train_for(30, net, optimizer)
    evaluate(net)
    train_for(40, net, optimizer)
    net.train()
    assert told(traced)[-1] == ("Sequential", ["BatchNorm1d", "Dropout"], 30, 40)

    train_for(30, net, optimizer)
    evaluate(net)
    train_for(130, net, optimizer)
    traced.finish()

    assert told(traced)[-1] == ("Sequential", ["BatchNorm1d", "Dropout"], 30, 40 + 130)
    assert len(told(traced)) < 6


class WithLoss(nn.Module):
    """A wrapper as scripts have it, and as DDP: it has no parameters of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out * 2


@pytest.mark.parametrize("compiles", [False, True])
def test_a_model_inside_a_wrapper_is_told_until_either_is_in_training(traced: Traced, *, compiles: bool) -> None:
    """The wrapper's own mode says nothing: the evaluation was of what is inside.

    In a process that has compiled something, the last step of a loop has no row yet.
    """
    if compiles:
        torch.compile(lambda x: x.sin(), backend="eager")(torch.ones(3))

    net = model()
    whole = WithLoss(net)
    optimizer = sgd(whole)
    train_for(30, whole, optimizer)
    evaluate(net)
    train_for(40, whole, optimizer)
    whole.eval()
    train_for(30, whole, optimizer)
    whole.train()
    train_for(130, whole, optimizer)
    traced.finish()

    assert told(traced)[-1] == ("WithLoss", ["Dropout"], 30, 40 + 30)


def test_steps_of_an_earlier_process_are_not_counted(traced: Traced) -> None:
    """A training that is resumed at step 1000, of a model that was loaded in `eval()`."""
    net = model()
    optimizer = sgd(net)
    train_for(1, net, optimizer)
    net.eval()
    traced.instrumentation.clock.continue_at(1000)
    train_for(130, net, optimizer)
    traced.instrumentation.close_open_step()

    assert told(traced)[-1][3] == 130


@pytest.mark.parametrize(
    "layers", [(nn.ReLU(),), (nn.Dropout(0.0),), (nn.BatchNorm1d(8, track_running_stats=False),)], ids=str
)
def test_layers_that_work_alike_in_both_modes_are_none(traced: Traced, layers: tuple[nn.Module, ...]) -> None:
    """A model without dropout needs no `train()`."""
    net = model(*layers)
    optimizer = sgd(net)
    evaluate(net)
    train_for(130, net, optimizer)

    assert not told(traced)


def kept_frozen(net: nn.Module) -> Callable[[], None]:
    """Return the step of another model, which follows the training of this one."""
    first, other = sgd(net), model()
    train_for(30, net, first)
    net.eval()

    def rest() -> None:
        train_for(130, other, sgd(other))
        assert first.param_groups  # it is kept, as by a script's global name

    return rest


def evaluated_each_epoch(net: nn.Module) -> Callable[[], None]:
    """Return epochs with an evaluation each, that end it by `train()`."""

    def epochs() -> None:
        optimizer = sgd(net)
        for _ in range(3):
            train_for(40, net, optimizer)
            evaluate(net, forgets=False)

    return epochs


def fixed_statistics(net: nn.Module) -> Callable[[], None]:
    """Return epochs that keep one layer in `eval()`, of a model in training."""

    def epochs() -> None:
        optimizer = sgd(net)
        for _ in range(3):
            net.train()
            net[2].eval()  # type: ignore[index]
            train_for(40, net, optimizer)

    return epochs


def part_of_a_larger_model(net: nn.Module) -> Callable[[], None]:
    """Return the training of a model around it, which has layers of its own."""
    whole = nn.Sequential(net, nn.Linear(2, 2))
    train_for(30, whole, sgd(whole))
    net.eval()
    return lambda: train_for(130, whole, sgd(whole))


def averaged(net: nn.Module) -> Callable[[], None]:
    """Return epochs that average the weights in a copy, which is evaluated."""

    def epochs() -> None:
        optimizer, average = sgd(net), copy.deepcopy(net)
        train_for(3, net, optimizer)
        evaluate(average)
        for _ in range(120):
            train_for(1, net, optimizer)
            with torch.no_grad():
                for mean, value in zip(average.parameters(), net.parameters(), strict=True):
                    mean.lerp_(value, 0.1)

    return epochs


def trained_head(net: nn.Module) -> Callable[[], None]:
    """Return a fine-tuning that has the last layer alone in training."""
    net.eval()
    net[-1].train()  # type: ignore[index]
    return lambda: train_for(130, net, sgd(net))


@torch.inference_mode()
def made_for_inference(net: nn.Module) -> Callable[[], None]:
    """Return the training of one model beside another, whose parameters have no versions."""
    made = model()
    made(torch.randn(2, 4))
    made.eval()
    return lambda: train_for(130, net, sgd(net))


@pytest.mark.parametrize(
    "prepare",
    [
        kept_frozen,
        evaluated_each_epoch,
        fixed_statistics,
        part_of_a_larger_model,
        averaged,
        trained_head,
        made_for_inference,
    ],
)
def test_models_that_are_in_evaluation_on_purpose_are_not_told(
    traced: Traced, prepare: Callable[[nn.Module], Callable[[], None]]
) -> None:
    """What is in `eval()` and not updated, or a part of a model in training, is no mistake."""
    prepare(model(nn.Dropout(0.5), nn.BatchNorm1d(8)))()
    traced.finish()

    assert not told(traced)


def test_steps_in_which_several_models_are_in_evaluation_count_once(traced: Traced) -> None:
    """As those of a generator and its discriminator, which are evaluated together."""
    nets = [model(), model(nn.Dropout(0.2))]
    optimizers = [sgd(net) for net in nets]

    def train_both(steps: int) -> None:
        for (x,) in data(steps):
            for net, optimizer in zip(nets, optimizers, strict=True):
                net(x).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

    train_both(30)
    for net in nets:
        evaluate(net)

    train_both(60)
    traced.finish()

    assert [steps for *_, steps in told(traced)][-1] == 60


def test_the_first_step_is_that_after_the_evaluation(traced: Traced) -> None:
    """Without a loader the step before it has no row yet: that begins with the next forward."""
    net = model()
    optimizer = sgd(net)

    def train_on(steps: int) -> None:
        for _ in range(steps):
            train(net, optimizer, torch.randn(4, 4))

    train_on(30)
    net.eval()
    train_on(40)
    traced.finish()

    assert told(traced)[-1][2:] == (30, 40)
