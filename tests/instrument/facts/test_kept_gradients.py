"""Gradients that are never cleared: a training without `zero_grad()` is told, and no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import WIDTH, data, net, sgd


def told(traced: Traced) -> list[str]:
    return [row["optimizer"] for row in traced.info if row["kind"] == "kept_gradients"]


def keep(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clear nothing."""


def clip(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.parametrize("between", [keep, clip])
def test_gradients_that_are_never_cleared_are_told_once(traced: Traced, between: Callable[..., None]) -> None:
    model = net()
    optimizer = sgd(model)
    for (x,) in data(200):
        model(x).square().mean().backward()
        between(model, optimizer)
        optimizer.step()

    traced.finish()
    assert told(traced) == ["SGD"]


def zero_grad(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()


def to_zero(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


def of_the_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.zero_grad()


def without_autograd(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for each in model.parameters():
        each.grad.data.zero_()  # type: ignore[union-attr]


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for each in model.parameters():
        each.grad = None


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("clear", [zero_grad, to_zero, of_the_model, without_autograd, by_hand])
def test_gradients_that_are_cleared_are_not_told(
    traced: Traced, clear: Callable[[nn.Module, torch.optim.Optimizer], None], accumulated: int
) -> None:
    """In whatever way, also after the gradients of several batches are added."""
    model = net()
    optimizer = sgd(model)
    for number, (x,) in enumerate(data(200)):
        model(x).square().mean().backward()
        if number % accumulated == 0:
            optimizer.step()
            clear(model, optimizer)

    traced.finish()
    assert not told(traced)


def test_a_second_model_has_gradients_of_the_first_ones_loss(traced: Traced) -> None:
    """In an adversarial training the generator's backward leaves gradients in the critic, until that clears them."""
    maker, critic = nn.Linear(WIDTH, WIDTH), net()
    of_maker, of_critic = sgd(maker), sgd(critic)
    for (x,) in data(200):
        of_critic.zero_grad()
        critic(maker(x).detach()).mean().backward()
        of_critic.step()
        of_maker.zero_grad()
        critic(maker(x)).mean().backward()
        of_maker.step()

    traced.finish()
    assert not told(traced)


def test_shards_and_sparse_gradients_are_not_read(traced: Traced) -> None:
    """A shard is read by all ranks together, which would wait for each other."""
    model = nn.Embedding(8, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    for _ in range(40):
        model(torch.tensor([1])).sum().backward()
        optimizer.step()

    traced.finish()
    assert not told(traced)
