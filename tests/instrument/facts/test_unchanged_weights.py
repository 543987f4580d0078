"""Weights that a training never changes: those are told, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net, sgd


def told(traced: Traced) -> list[tuple[str, int, int, int]]:
    return [
        (row["optimizer"], row["parameters"], row["trainable"], row["stepped"])
        for row in traced.info
        if row["kind"] == "unchanged_weights"
    ]


def mean_square(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


def cut_off(out: torch.Tensor) -> torch.Tensor:
    return mean_square(out).detach().requires_grad_()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 100,
    *,
    loss_of: Callable[[torch.Tensor], torch.Tensor] = mean_square,
    update: Callable[[], object] | None = None,
) -> None:
    for (x,) in data(steps):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step() if update is None else update()


def test_a_loss_that_is_cut_off_changes_nothing(traced: Traced) -> None:
    model = net()
    train(model, torch.optim.Adam(model.parameters()), loss_of=cut_off)
    traced.finish()

    assert told(traced) == [("Adam", 4, 4, 1)]


def test_the_parameters_of_another_model_are_not_trained(traced: Traced) -> None:
    other = net()
    train(net(), sgd(other))
    traced.finish()

    assert told(traced) == [("SGD", 4, 4, 1)]


def test_frozen_parameters_are_told_as_such(traced: Traced) -> None:
    body = nn.Linear(4, 4).requires_grad_(False)
    train(nn.Sequential(body, net()), sgd(body))
    traced.finish()

    assert told(traced) == [("SGD", 2, 0, 1)]


def test_an_optimizer_that_is_never_stepped_is_told(traced: Traced) -> None:
    model = net()
    train(model, sgd(model), 700, update=lambda: None)
    traced.finish()

    assert told(traced) == [("SGD", 4, 4, 0)]


def test_one_that_is_kept_to_the_end_is_told_then(traced: Traced) -> None:
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, update=lambda: None)
    traced.finish()

    assert told(traced) == [("SGD", 4, 4, 0)]


def by_data(model: nn.Module) -> None:
    """Update weights as before `torch.no_grad`: torch does not count that."""
    for each in model.parameters():
        each.data.sub_(each.grad, alpha=0.1)  # type: ignore[arg-type]


def without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        for each in model.parameters():
            each -= 0.1 * each.grad  # type: ignore[operator]


@pytest.mark.parametrize("update", [by_data, without_gradients])
def test_weights_that_are_changed_by_hand_are_not_told(traced: Traced, update: Callable[[nn.Module], None]) -> None:
    model = net()
    train(model, sgd(model), update=lambda: update(model))
    traced.finish()

    assert not told(traced)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"foreach": True}),
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.SGD, {"lr": 0.0}),
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
    ],
)
def test_a_training_that_changes_a_weight_is_not_told(traced: Traced, cls: Any, options: dict[str, Any]) -> None:
    model = net()
    train(model, cls(model.parameters(), **options))
    traced.finish()

    assert not told(traced)


def test_one_optimizer_that_changes_its_weights_is_enough(traced: Traced) -> None:
    body, head = nn.Linear(4, 4).requires_grad_(False), net()
    of_body, of_head = sgd(body), sgd(head)

    def update() -> None:
        of_body.step()
        of_head.step()

    train(nn.Sequential(body, head), of_head, update=update)
    traced.finish()

    assert not told(traced)


def test_weights_that_are_unfrozen_are_reported_as_changed(traced: Traced) -> None:
    body = nn.Linear(4, 4).requires_grad_(False)
    model, optimizer = nn.Sequential(body, net()), sgd(body)
    train(model, optimizer)
    body.requires_grad_(True)
    train(model, optimizer)
    traced.finish()

    assert told(traced) == [("SGD", 2, 0, 1), ("", 0, 0, 0)]


class Own(torch.optim.Optimizer):
    """An optimizer that may keep the weights elsewhere."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change nothing that can be seen."""


def test_other_optimizers_than_torchs_are_not_told(traced: Traced) -> None:
    model = net()
    train(model, Own(model.parameters()))
    traced.finish()

    assert not told(traced)


def test_trainings_one_after_the_other_are_not_compared(traced: Traced) -> None:
    """The optimizer of a fold is gone, with what it has changed."""
    for _ in range(5):
        model = net()
        train(model, sgd(model), 20)

    model = net()
    train(model, sgd(model), loss_of=cut_off)
    traced.finish()

    assert not told(traced)


@pytest.fixture
def mesh() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("cls", "foreach"), [(torch.optim.SGD, True), (torch.optim.AdamW, True), (torch.optim.SGD, False)]
)
def test_shards_that_change_are_not_told(traced: Traced, mesh: Any, cls: Any, foreach: bool) -> None:
    """Torch does not count what is written to several of them at once."""
    model = parallelize_module(net(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    train(model, cls(model.parameters(), foreach=foreach))
    traced.finish()

    assert not told(traced)


def test_shards_that_never_change_are_told(traced: Traced, mesh: Any) -> None:
    model = parallelize_module(net(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    train(model, torch.optim.SGD(model.parameters(), foreach=True), loss_of=cut_off)
    traced.finish()

    assert told(traced) == [("SGD", 4, 4, 1)]


def test_weights_of_another_type_of_tensor_are_not_told(traced: Traced) -> None:
    """As quantized ones: what they hold is not known."""

    class Other(torch.Tensor):
        pass

    weight = nn.Parameter(torch.ones(4, 1).as_subclass(Other))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    model = net()
    train(model, optimizer)
    traced.finish()

    assert not told(traced)
