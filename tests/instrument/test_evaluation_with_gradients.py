"""Evaluation without `torch.no_grad()` and `eval()`, on the batches of a loader that nothing is trained on."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net, sgd, train
from traceml.database.schema import Phase

CALL_S = 0.002


def validate(model: nn.Module, loader: Any, batches: int = 99) -> None:
    """Compute a loss as in training, of which no gradients are computed."""
    for index, (x,) in enumerate(loader):
        if index == batches:
            break

        model(x).square().mean().item()
        time.sleep(CALL_S)


def after_each_epoch() -> None:
    model, loader, other = net(), data(5), data(3)
    optimizer = sgd(model)
    for _ in range(4):
        for (x,) in loader:
            train(model, optimizer, x)

        validate(model, other)


def left_early() -> None:
    model, loader, other = net(), data(5), data(9)
    optimizer = sgd(model)
    for _ in range(4):
        for (x,) in loader:
            train(model, optimizer, x)

        validate(model, other, batches=2)


def both_left_early() -> None:
    model, loader, other = net(), data(9), data(9)
    optimizer = sgd(model)
    for _ in range(4):
        for (x,) in islice(loader, 5):
            train(model, optimizer, x)

        for (x,) in islice(other, 3):
            model(x).square().mean().item()
            time.sleep(CALL_S)


def within_an_epoch() -> None:
    model, loader, other = net(), data(20), data(3)
    optimizer = sgd(model)
    for index, (x,) in enumerate(loader):
        train(model, optimizer, x)
        if index % 5 == 4:
            validate(model, other)


def on_two_loaders() -> None:
    model, loader = net(), data(5)
    others = data(2), data(2)
    optimizer = sgd(model)
    for _ in range(4):
        for (x,) in loader:
            train(model, optimizer, x)

        for other in others:
            validate(model, other)


def on_the_training_data() -> None:
    model, loader = net(), data(5)
    optimizer = sgd(model)
    for _ in range(4):
        for (x,) in loader:
            train(model, optimizer, x)

        validate(model, loader)


def on_all_data_at_once() -> None:
    model, loader = net(), data(5)
    optimizer = sgd(model)
    for _ in range(4):
        for (x,) in loader:
            train(model, optimizer, x)

        model(torch.randn(64, 4)).square().mean().item()
        time.sleep(2 * CALL_S)


def one_backward_after_each_epoch() -> None:
    model, loader = net(), data(5)
    optimizer = sgd(model)
    for _ in range(3):
        for (x,) in loader:
            train(model, optimizer, x)

        train(model, optimizer, torch.randn(64, 4))


@pytest.mark.parametrize(
    ("loop", "batches"),
    [
        (after_each_epoch, [3, 3, 3, 3]),
        (left_early, [3, 3, 3, 3]),  # with the one at which the loop is left
        (both_left_early, [3, 3, 3, 3]),
        (within_an_epoch, [3, 3, 3, 3]),
        (on_two_loaders, [4, 4, 4, 4]),
        (on_all_data_at_once, [1, 1, 1, 1]),
        (on_the_training_data, [5, 5, 5, 5]),
    ],
)
def test_it_is_in_no_step(traced: Traced, loop: Callable[[], None], batches: list[int]) -> None:
    """Its batches are counted, and every step has its own batch only."""
    loop()

    rows, evals = traced.finish(), traced.table("evals")
    assert [row["bits"] & 0xFFFF for row in rows] == [1] * 20
    assert [row["batches"] for row in evals] == batches
    assert all(row["ns"] >= row["forward_ns"] > 0 for row in evals)
    assert all(row["ns"] >= 2 * CALL_S * 1e9 for row in evals[:-1])  # the end of the last one is not known
    assert not traced.instrumentation.clock.is_plain_evaluation


def attack(model: nn.Module, x: torch.Tensor) -> None:
    """Compute gradients of the input, and call the model on what they make of it."""
    changed = x.clone().requires_grad_()
    (model(changed).square().mean() + 1000).backward()  # a loss that is far from the training's
    with torch.no_grad():
        model(x + changed.grad.sign())

    model.zero_grad()
    time.sleep(CALL_S)


def explain(model: nn.Module, x: torch.Tensor) -> None:
    """Compute gradients of what the model returns, as for a map of what it looks at."""
    (model(x).sum() + 1000).backward()
    model.zero_grad()
    time.sleep(CALL_S)


Uses = Callable[[nn.Module, torch.Tensor], None]


def attacked_after_each_epoch(uses: Uses) -> nn.Module:
    model, loader, other = net(), data(5), data(3)
    optimizer = sgd(model)
    for _ in range(4):
        model.train()
        for (x,) in loader:
            train(model, optimizer, x)

        model.eval()
        for (x,) in other:
            uses(model, x)

    return model


def attacked_within_an_epoch(uses: Uses) -> nn.Module:
    model, loader, other = net(), data(21), data(3)
    optimizer = sgd(model)
    for index, (x,) in enumerate(loader):
        train(model, optimizer, x)
        if index % 5 == 4:
            model.eval()
            for (x,) in other:
                uses(model, x)

            model.train()

    return model


def attacked_on_fixed_data(uses: Uses) -> nn.Module:
    model, loader = net(), data(5)
    optimizer = sgd(model)
    for _ in range(4):
        model.train()
        for (x,) in loader:
            train(model, optimizer, x)

        model.eval()
        uses(model, torch.randn(6, 4))

    return model


@pytest.mark.parametrize(
    ("loop", "uses", "batches", "steps"),
    [
        (attacked_after_each_epoch, attack, [3, 3, 3, 3], 20),
        (attacked_after_each_epoch, explain, [3, 3, 3, 3], 20),
        (attacked_within_an_epoch, attack, [3, 3, 3, 3], 21),
        (attacked_within_an_epoch, explain, [3, 3, 3, 3], 21),
        (attacked_on_fixed_data, attack, [2, 2, 2, 2], 20),  # each call counts
        (attacked_on_fixed_data, explain, [1, 1, 1, 1], 20),
    ],
)
def test_backward_passes_of_a_model_that_evaluates_are_in_no_step(
    traced: Traced, loop: Callable[[Uses], nn.Module], uses: Uses, batches: list[int], steps: int
) -> None:
    """As for attacks: nothing is trained by them, and their losses are none of the training."""
    model = loop(uses)  # alive at the end, as in a script

    rows, evals, losses = traced.finish(), traced.table("evals"), traced.table("losses")
    assert [row["bits"] & 0xFFFF for row in rows] == [1] * steps
    assert [row["samples"] for row in rows] == [2] * steps
    assert [row["batches"] for row in evals] == batches
    assert all(row["ns"] >= CALL_S * 1e9 for row in evals[:-1])
    assert len(losses) >= 16
    assert all(row["loss"] < 1000 for row in losses)
    del model


def test_an_attack_is_known_while_it_runs(traced: Traced) -> None:
    """From its second batch on, as other evaluations with gradients."""
    seen = []
    model, loader, other = net(), data(5), data(3)
    optimizer = sgd(model)
    for _ in range(2):
        model.train()
        for (x,) in loader:
            train(model, optimizer, x)
            seen.append(traced.instrumentation.clock.is_evaluating)

        model.eval()
        for (x,) in other:
            explain(model, x)
            seen.append(traced.instrumentation.clock.is_evaluating)

    assert seen == [False] * 6 + [True] * 2 + [False] * 6 + [True] * 2


def test_it_is_known_while_it_runs(traced: Traced) -> None:
    """From its second batch after the training loader's end: the first may be of the next training."""
    seen = []
    model, loader, other = net(), data(5), data(3)
    optimizer = sgd(model)
    for _ in range(2):
        for (x,) in loader:
            train(model, optimizer, x)
            seen.append(traced.instrumentation.clock.is_evaluating)

        for (x,) in other:
            model(x)
            seen.append(traced.instrumentation.clock.is_evaluating)

    assert seen[:5] == seen[8:13] == [False] * 5
    assert seen[5:8] == seen[13:16] == [False, True, True]


def test_the_first_batch_of_the_next_training_is_no_evaluation(traced: Traced) -> None:
    """A new loader for each epoch, of which the clock knows nothing before its first backward pass."""
    seen = []
    model = net()
    optimizer = sgd(model)
    for _ in range(3):
        for (x,) in data(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            seen.append(traced.instrumentation.clock.is_evaluating)
            loss.backward()
            optimizer.step()

    assert seen == [False] * 9


def test_a_save_after_it_takes_nothing_from_it(traced: Traced) -> None:
    """The last validation is followed by a save, which takes longer than that."""
    clock = traced.instrumentation.clock
    after_each_epoch()
    began = clock.enter(int(Phase.CHECKPOINT))
    time.sleep(20 * CALL_S)
    clock.leave(int(Phase.CHECKPOINT), began)

    traced.finish()
    last = traced.table("evals")[-1]
    assert last["ns"] >= 2 * CALL_S * 1e9


def one_backward_for_all_batches() -> None:
    model, loader, other = net(), data(5), data(3)
    optimizer = sgd(model)
    for _ in range(3):
        for (x,) in loader:
            train(model, optimizer, x)

        loss = torch.stack([model(x).square().mean() for (x,) in other]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def loaders_in_turns() -> None:
    model, loaders = net(), (data(5), data(5))
    optimizer = sgd(model)
    for _ in range(3):
        for loader in loaders:
            for (x,) in loader:
                train(model, optimizer, x)


def two_loaders_in_each_step() -> None:
    model, support, loader = net(), data(5), data(5)
    optimizer = sgd(model)
    for _ in range(3):
        for (known,), (x,) in zip(support, loader, strict=True):
            optimizer.zero_grad()
            (model(known).mean() + model(x).square().mean()).backward()
            optimizer.step()


def a_target_from_another_loader() -> None:
    """The loss of a batch of each loader, after each was read: the first one has no backward pass of its own."""
    model, support, loader = net(), data(6), data(5)
    optimizer = sgd(model)
    for _ in range(3):
        known = iter(support)
        for (x,) in loader:
            anchor = model(next(known)[0]).mean()
            optimizer.zero_grad()
            (anchor + model(x).square().mean()).backward()
            optimizer.step()


def pairs_of_batches() -> None:
    model, loader = net(), data(6)
    optimizer = sgd(model)
    for _ in range(3):
        batches = iter(loader)
        for (x,) in batches:
            known = model(x).mean()
            optimizer.zero_grad()
            (known + model(next(batches)[0]).square().mean()).backward()
            optimizer.step()


def a_batch_of_another_loader_before_each() -> None:
    """After a training on the second loader alone: its requests have closed the steps since."""
    model, support, loader = net(), data(6), data(5)
    optimizer = sgd(model)
    for (x,) in loader:
        train(model, optimizer, x)

    for _ in range(3):
        batches = iter(loader)
        for _ in range(5):
            anchor = model(next(iter(support))[0]).mean()
            optimizer.zero_grad()
            (anchor + model(next(batches)[0]).square().mean()).backward()
            optimizer.step()


def batches_left_over(*, training: bool = True) -> None:
    """The last batches of an epoch are too few for a step."""
    model, loader = net().train(training), data(7)
    optimizer = sgd(model)
    for _ in range(3):
        for index, (x,) in enumerate(loader):
            model(x).square().mean().backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()


def batches_left_over_in_evaluation_mode() -> None:
    """Training in `eval()`, as of a model whose statistics stay."""
    batches_left_over(training=False)


def gradients_of_another_loader_in_evaluation_mode() -> None:
    """Two backward passes before each step, the first on a batch of a loader that is not read on."""
    model, support, loader = net().eval(), data(6), data(5)
    optimizer = sgd(model)
    for (x,) in loader:
        train(model, optimizer, x)

    for _ in range(3):
        batches = iter(loader)
        for _ in range(5):
            optimizer.zero_grad()
            model(next(iter(support))[0]).mean().backward()
            model(next(batches)[0]).square().mean().backward()
            optimizer.step()


def adversarial_training() -> None:
    """Each batch is changed by gradients of the model in `eval()`, and then trained on."""
    model, loader = net(), data(6)
    optimizer = sgd(model)
    for _ in range(3):
        for (x,) in loader:
            model.eval()
            changed = x.clone().requires_grad_()
            model(changed).square().mean().backward()
            model.train()
            train(model, optimizer, x + changed.grad.sign())


def importance_of_weights() -> None:
    """Gradients of all batches in training mode, as for the Fisher information: no sign of an evaluation."""
    model, loader, other = net(), data(5), data(3)
    optimizer = sgd(model)
    for _ in range(3):
        for (x,) in loader:
            train(model, optimizer, x)

        for (x,) in other:
            model(x).square().mean().backward()


@pytest.mark.parametrize(
    "loop",
    [
        batches_left_over_in_evaluation_mode,
        gradients_of_another_loader_in_evaluation_mode,
        adversarial_training,
        importance_of_weights,
        one_backward_for_all_batches,
        loaders_in_turns,
        two_loaders_in_each_step,
        a_target_from_another_loader,
        one_backward_after_each_epoch,
        pairs_of_batches,
        a_batch_of_another_loader_before_each,
        batches_left_over,
    ],
)
def test_batches_that_are_trained_on_are_none(traced: Traced, loop: Callable[[], None]) -> None:
    """A backward pass uses them, if later."""
    loop()

    traced.finish()
    assert not len(traced.table("evals"))
