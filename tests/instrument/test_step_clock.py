"""The patterns of training loops from recipes: each has as many steps as it says, and parts that add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.instrument.conftest import Traced
from traceml.database.schema import Phase, Slot, StepFlag

N = 20
WIDTH = 4


def data(batches: int = N, batch: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(batches * batch, WIDTH)), batch_size=batch)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def evaluate(model: nn.Module, batches: int = 4) -> None:
    model.eval()
    with torch.no_grad():
        for (x,) in data(batches):
            model(x)

    model.train()


def plain() -> None:
    model = net()
    optimizer = sgd(model)
    for (x,) in data():
        train(model, optimizer, x)


def two_epochs_new_loader_each() -> None:
    model = net()
    optimizer = sgd(model)
    for _ in range(2):
        for (x,) in data(N // 2):
            train(model, optimizer, x)


def two_epochs_same_loader() -> None:
    model = net()
    optimizer = sgd(model)
    loader = data(N // 2)
    for _ in range(2):
        for (x,) in loader:
            train(model, optimizer, x)


def accumulation() -> None:
    model = net()
    optimizer = sgd(model)
    for index, (x,) in enumerate(data()):
        (model(x).square().mean() / 4).backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


def fixed_batch() -> None:
    model = net()
    optimizer = sgd(model)
    x = torch.randn(2, WIDTH)
    for _ in range(N):
        train(model, optimizer, x)


def fixed_batch_accumulation() -> None:
    model = net()
    optimizer = sgd(model)
    x = torch.randn(2, WIDTH)
    for _ in range(N):
        optimizer.zero_grad()
        for _ in range(4):
            model(x).square().mean().backward()

        optimizer.step()


def two_loaders_zipped() -> None:
    model = net()
    optimizer = sgd(model)
    for (x,), (y,) in zip(data(), data(), strict=True):
        train(model, optimizer, x + y)


def skipped_batches() -> None:
    model = net()
    optimizer = sgd(model)
    for index, (x,) in enumerate(data()):
        if index % 4 == 1:
            continue

        train(model, optimizer, x)


def distillation() -> None:
    teacher, student = net(), net()
    optimizer = sgd(student)
    for (x,) in data():
        with torch.no_grad():
            target = teacher(x)

        optimizer.zero_grad()
        (student(x) - target).square().mean().backward()
        optimizer.step()


def ppo() -> None:
    policy = net()
    optimizer = sgd(policy)
    for _ in range(2):
        with torch.no_grad():
            rollout = torch.cat([policy(torch.randn(1, WIDTH)).expand(1, WIDTH) for _ in range(8)])

        for _ in range(4):
            for batch in rollout.split(3):
                train(policy, optimizer, batch)


def ppo_with_loader() -> None:
    policy = net()
    optimizer = sgd(policy)
    for _ in range(2):
        with torch.no_grad():
            rollout = torch.cat([policy(torch.randn(1, WIDTH)).expand(1, WIDTH) for _ in range(6)])

        loader = DataLoader(TensorDataset(rollout), batch_size=2)
        for _ in range(4):
            for (batch,) in loader:
                train(policy, optimizer, batch)


def gan_step(generator: nn.Module, critic: nn.Module, og: object, od: object, x: torch.Tensor) -> None:
    od.zero_grad()
    (critic(x).mean() - critic(generator(torch.randn(2, WIDTH)).expand(2, WIDTH).detach()).mean()).backward()
    od.step()
    og.zero_grad()
    critic(generator(torch.randn(2, WIDTH)).expand(2, WIDTH)).mean().backward()
    og.step()


def gan() -> None:
    generator, critic = net(), net()
    og, od = sgd(generator), sgd(critic)
    for (x,) in data():
        gan_step(generator, critic, og, od, x)


def gan_no_loader() -> None:
    generator, critic = net(), net()
    og, od = sgd(generator), sgd(critic)
    for _ in range(N):
        gan_step(generator, critic, og, od, torch.randn(2, WIDTH))


def gan_two_loaders() -> None:
    generator, critic = net(), net()
    og, od = sgd(generator), sgd(critic)
    noise = iter(data())
    for (x,) in data():
        od.zero_grad()
        critic(x).mean().backward()
        od.step()
        (z,) = next(noise)
        og.zero_grad()
        critic(generator(z).expand(2, WIDTH)).mean().backward()
        og.step()


def gan_new_loaders() -> None:
    generator, critic = nn.Linear(WIDTH, WIDTH), net()
    optimizers = sgd(critic), sgd(generator)
    for _ in range(N):
        for optimizer, made in zip(optimizers, (nn.Identity(), generator), strict=True):
            (x,) = next(iter(data()))
            optimizer.zero_grad()
            critic(made(x)).mean().backward()
            optimizer.step()


def wgan() -> None:
    generator, critic = net(), net()
    og, od = sgd(generator), sgd(critic)
    for index, (x,) in enumerate(data()):
        train(critic, od, x)
        if index % 5 == 4:
            og.zero_grad()
            critic(generator(x).expand(2, WIDTH)).mean().backward()
            og.step()


def two_optimizers_one_model() -> None:
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.01)
    second = torch.optim.Adam(model[2].parameters())
    for (x,) in data():
        model(x).square().mean().backward()
        first.step()
        second.step()


def refine(model: nn.Module, batches: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Train with L-BFGS, one step a batch; with an optimizer that is made here if none is given."""
    optimizer = optimizer or torch.optim.LBFGS(model.parameters(), max_iter=2)
    for x in batches:

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def lbfgs(batches: Iterator[torch.Tensor]) -> None:
    model = net()
    refine(model, batches, torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3))


def lbfgs_loader() -> None:
    lbfgs(x for (x,) in data())


def lbfgs_no_loader() -> None:
    x = torch.randn(2, WIDTH)
    lbfgs(x for _ in range(N))


def grad_scaler() -> None:
    model = net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    for index, (x,) in enumerate(data()):
        optimizer.zero_grad()
        loss = model(x).square().mean() * (float("inf") if index % 5 == 4 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def adam_then_lbfgs() -> None:
    """Both are alive, as in trainings of networks that are informed by physics."""
    model, x = net(), torch.randn(2, WIDTH)
    first, second = torch.optim.Adam(model.parameters()), torch.optim.LBFGS(model.parameters(), max_iter=2)
    for _ in range(15):
        train(model, first, x)

    refine(model, [x] * 5, second)


def lbfgs_made_after_adam() -> None:
    model, x = net(), torch.randn(2, WIDTH)
    first = torch.optim.Adam(model.parameters())
    for _ in range(15):
        train(model, first, x)

    refine(model, [x] * 5)
    assert first.state


def one_lbfgs_step_after_adam() -> None:
    """One call with all iterations: it was counted to the last step of Adam."""
    model, x = net(), torch.randn(2, WIDTH)
    first = torch.optim.Adam(model.parameters())
    for _ in range(15):
        train(model, first, x)

    refine(model, [x])
    assert first.state


def lbfgs_made_after_an_evaluation() -> None:
    model, x = net(), torch.randn(2, WIDTH)
    first = torch.optim.Adam(model.parameters())
    for _ in range(15):
        train(model, first, x)

    model.eval()
    with torch.no_grad():
        for _ in range(4):
            model(x)

    model.train()
    refine(model, [x] * 5)
    assert first.state


def lbfgs_on_all_data_after_batches() -> None:
    model = net()
    first, loader = torch.optim.Adam(model.parameters()), data(15)
    for (x,) in loader:
        train(model, first, x)

    refine(model, [torch.randn(30, WIDTH)] * 5)
    assert first.state


def lbfgs_in_turns_with_adam() -> None:
    model, x = net(), torch.randn(2, WIDTH)
    first = torch.optim.Adam(model.parameters())
    for _ in range(2):
        for _ in range(12):
            train(model, first, x)

        refine(model, [x] * 3)


def second_optimizer_after_a_warm_up() -> None:
    """The other one steps now and then, with the first."""
    model, other = net(), net()
    first, second = sgd(model), sgd(other)
    x = torch.randn(2, WIDTH)
    for index in range(20):
        train(model, first, x)
        if index >= 14 and index % 2:
            train(other, second, x)


def evaluation_between_epochs() -> None:
    model = net()
    optimizer = sgd(model)
    loader = data(5)
    for _ in range(4):
        for (x,) in loader:
            train(model, optimizer, x)

        evaluate(model, 3)


def evaluation_every_5_steps() -> None:
    model = net()
    optimizer = sgd(model)
    for index, (x,) in enumerate(data()):
        train(model, optimizer, x)
        if index % 5 == 4:
            evaluate(model, 3)


def evaluation_of_new_loaders() -> None:
    model = net()
    optimizer = sgd(model)
    for _ in range(4):
        for (x,) in data(5):
            train(model, optimizer, x)

        evaluate(model, 3)


def evaluation_fixed_batch() -> None:
    model = net()
    optimizer = sgd(model)
    x = torch.randn(2, WIDTH)
    for index in range(N):
        train(model, optimizer, x)
        if index % 5 == 4:
            evaluate(model, 3)


def sanity_check() -> None:
    model = net()
    optimizer = sgd(model)
    evaluate(model, 3)
    for (x,) in data():
        train(model, optimizer, x)


def evaluation_with_gradients() -> None:
    model = net()
    optimizer = sgd(model)
    loader = data(10)
    for _ in range(2):
        for (x,) in loader:
            train(model, optimizer, x)

        model.eval()
        for (x,) in data(6):
            model(x)

        model.train()


def ahead(loader: DataLoader) -> Iterator[torch.Tensor]:
    """As accelerate's loaders, which have to know which batch is the last one."""
    batches = iter(loader)
    (batch,) = next(batches)
    for (following,) in batches:
        yield batch
        batch = following

    yield batch


def fetched_ahead() -> None:
    model = net()
    optimizer = sgd(model)
    loader, others = data(5), data(3)
    for _ in range(4):
        for x in ahead(loader):
            train(model, optimizer, x)

        model.eval()
        with torch.no_grad():
            for x in ahead(others):
                model(x)

        model.train()


def fetched_ahead_no_evaluation() -> None:
    model = net()
    optimizer = sgd(model)
    loader = data(10)
    for _ in range(2):
        for x in ahead(loader):
            train(model, optimizer, x)


def fixed_batch_after_an_epoch() -> None:
    model = net()
    optimizer = sgd(model)
    for (x,) in data(10):
        train(model, optimizer, x)

    for _ in range(10):
        train(model, optimizer, x)


def fused_in_backward() -> None:
    model = net()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}

    def hook(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)

    for (x,) in data():
        model(x).square().mean().backward()


def second_optimizer_later() -> None:
    """A second model and its optimizer join in the middle, as in a training that adds a critic."""
    models, optimizers = [net()], []
    optimizers.append(sgd(models[0]))
    for index in range(20):
        if index == 10:
            models.append(net())
            optimizers.append(sgd(models[1]))

        x = torch.randn(2, WIDTH)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, x)


def idle_optimizer_later() -> None:
    """An optimizer that is made in the middle, and never steps."""
    model = net()
    optimizer = sgd(model)
    for index in range(20):
        idle = sgd(net()) if index == 10 else None
        train(model, optimizer, torch.randn(2, WIDTH))
        del idle


def optimizers_made_after_backward() -> None:
    """As in Pyro with several particles: an optimizer per parameter, made when it first steps."""
    model, optimizers = net(), {}
    for _ in range(N):
        for _ in range(4):
            model(torch.randn(2, WIDTH)).square().mean().backward()

        for parameter in model.parameters():
            optimizers.setdefault(parameter, torch.optim.SGD([parameter], 0.01)).step()
            parameter.grad = None


def no_optimizer() -> None:
    model = net()
    for (x,) in data():
        model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None


def no_optimizer_no_loader() -> None:
    model = net()
    x = torch.randn(2, WIDTH)
    for _ in range(N):
        model(x).square().mean().backward()
        for parameter in model.parameters():
            parameter.data -= 0.01 * parameter.grad
            parameter.grad = None


PATTERNS: list[tuple[Callable[[], None], int, int]] = [
    (plain, 20, 0),
    (two_epochs_new_loader_each, 20, 0),
    (two_epochs_same_loader, 20, 0),
    (accumulation, 5, 0),
    (fixed_batch, 20, 0),
    (fixed_batch_accumulation, 20, 0),
    (two_loaders_zipped, 20, 0),
    (skipped_batches, 15, 0),
    (distillation, 20, 0),
    (ppo, 24, 0),
    (ppo_with_loader, 24, 0),
    (gan, 20, 0),
    (gan_no_loader, 20, 0),
    (gan_two_loaders, 20, 0),
    (gan_new_loaders, 20, 0),
    (wgan, 20, 0),
    (two_optimizers_one_model, 20, 0),
    (lbfgs_loader, 20, 0),
    (lbfgs_no_loader, 20, 0),
    (grad_scaler, 20, 0),
    (adam_then_lbfgs, 20, 0),
    (lbfgs_made_after_adam, 20, 0),
    (one_lbfgs_step_after_adam, 16, 0),
    (lbfgs_made_after_an_evaluation, 20, 4),
    (lbfgs_on_all_data_after_batches, 20, 0),
    (lbfgs_in_turns_with_adam, 30, 0),
    (second_optimizer_after_a_warm_up, 20, 0),
    (evaluation_between_epochs, 20, 12),
    (evaluation_every_5_steps, 20, 12),
    (evaluation_of_new_loaders, 20, 12),
    (evaluation_fixed_batch, 20, 12),
    (evaluation_with_gradients, 20, 12),
    (sanity_check, 20, 3),
    (fetched_ahead, 20, 12),
    (fetched_ahead_no_evaluation, 20, 0),
    (fixed_batch_after_an_epoch, 20, 0),
    (fused_in_backward, 20, 0),
    (second_optimizer_later, 20, 0),
    (idle_optimizer_later, 20, 0),
    (optimizers_made_after_backward, 20, 0),
    (no_optimizer, 20, 0),
    (no_optimizer_no_loader, 20, 0),
]


@pytest.mark.parametrize(("loop", "steps", "evaluations"), PATTERNS, ids=[p[0].__name__ for p in PATTERNS])
def test_a_loop_has_the_steps_it_says(traced: Traced, loop: Callable[[], None], steps: int, evaluations: int) -> None:
    """Steps and evaluation batches are found as a reader of the loop would count them."""
    loop()

    rows = traced.finish()
    assert len(rows) == steps
    assert sum(row["batches"] for row in traced.table("evals")) == evaluations
    assert all(row["backward_ns"] > 0 for row in rows)
    assert all(row["optimizer_ns"] > 0 or row["flags"] & StepFlag.INFERRED for row in rows)
    assert all(row["forward_ns"] > 0 for row in rows[1:])  # a model may only be found by its first backward pass


@pytest.mark.parametrize("flagged", [0, 5])
def test_steps_whose_closure_is_called_several_times_are_told(traced: Traced, flagged: int) -> None:
    """L-BFGS evaluates the model for each of its iterations; Adam before it has no closure."""
    model, x = net(), torch.randn(2, WIDTH)
    first = torch.optim.Adam(model.parameters())
    second = torch.optim.LBFGS(model.parameters(), max_iter=2, tolerance_grad=0, tolerance_change=0)
    for _ in range(15):
        train(model, first, x)

    refine(model, [x] * flagged, second)

    flags = [bool(row["flags"] & StepFlag.CLOSURES) for row in traced.finish()]
    assert flags == [False] * 15 + [True] * flagged


def test_one_call_of_a_closure_is_a_usual_step(traced: Traced) -> None:
    """SGD calls it once."""
    model = net()
    refine(model, [torch.randn(2, WIDTH)] * 10, sgd(model))

    assert not any(row["flags"] & StepFlag.CLOSURES for row in traced.finish())


def test_batches_that_are_gathered_first(traced: Traced) -> None:
    """Batches of a step that are all fetched before it are its micro-batches, the one fetched ahead included."""
    model = net()
    optimizer = sgd(model)
    batches = ahead(data(12))
    for _ in range(3):
        for x in [next(batches) for _ in range(4)]:
            model(x).square().mean().backward()

        optimizer.step()
        optimizer.zero_grad()

    assert [row["micro"] for row in traced.finish()] == [4, 4, 4]


def test_micro_batches_that_are_fetched_ahead(traced: Traced) -> None:
    """The last one of an epoch is trained on after the loader's end."""
    model = net()
    optimizer = sgd(model)
    loader = data(8)
    for _ in range(3):
        for number, x in enumerate(ahead(loader), 1):
            model(x).square().mean().backward()
            if number % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()

    rows = traced.finish()
    size = rows[0]["samples"]
    assert [(row["micro"], row["samples"]) for row in rows] == [(4, size)] * 6


@pytest.mark.parametrize("loader_type", [DataLoader, StatefulDataLoader])
def test_the_first_batch_of_an_epoch_is_reported(traced: Traced, loader_type: Any) -> None:
    """Each epoch has a row, with the end of the iterator before; evaluation between them has none."""
    model = net()
    optimizer = sgd(model)
    loader = loader_type(data(5).dataset, batch_size=2)
    for _ in range(3):
        for (x,) in loader:
            train(model, optimizer, x)

        evaluate(model, 3)

    steps, epochs = traced.finish(), traced.table("epochs")
    assert [(row["step"], row["first"]) for row in epochs] == [(0, 1), (5, 0), (10, 0)]
    assert [row["step"] for row in steps if row["flags"] & StepFlag.EPOCH] == [0, 5, 10]
    assert [row["drain_ns"] > 0 for row in epochs] == [False, True, True]
    for row in epochs:
        assert row["create_ns"] > 0
        assert row["create_ns"] + row["drain_ns"] < row["ns"] == steps[row["step"]]["input_wait_ns"]


@pytest.mark.process
def test_workers_of_a_dropped_loader_end_in_the_wait_for_the_next(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that were asked to stay end with their loader: that is the wait for the next epoch's first batch."""
    model, joined_in = net(), []
    optimizer = sgd(model)
    join = BaseProcess.join

    def noting(self: BaseProcess, timeout: float | None = None) -> None:
        joined_in.append(traced.instrumentation.clock.current)
        join(self, timeout)

    monkeypatch.setattr(BaseProcess, "join", noting)
    for _ in range(3):
        for (x,) in DataLoader(data(4).dataset, batch_size=2, num_workers=1, persistent_workers=True):
            train(model, optimizer, x)

    steps, epochs = traced.finish(), traced.table("epochs")
    assert set(joined_in) == {Phase.INPUT_WAIT}
    for row in epochs[1:]:
        assert 0 < row["create_ns"] + row["drain_ns"] < row["ns"] == steps[row["step"]]["input_wait_ns"]


@pytest.mark.process
@pytest.mark.parametrize("persistent", [True, False])
def test_workers_of_torchdata_start_in_the_wait_for_the_first_batch(traced: Traced, *, persistent: bool) -> None:
    """Its loader keeps the iterator, so the loop has left it when no other one reads it."""
    model = net()
    optimizer = sgd(model)
    loader = StatefulDataLoader(data(4).dataset, batch_size=2, num_workers=1, persistent_workers=persistent)
    for _ in range(2):
        for (x,) in loader:
            train(model, optimizer, x)

    next(iter(loader))
    token = traced.instrumentation.clock.training_loader
    assert token.is_read
    token.note_left(traced.instrumentation.clock)
    assert not token.is_read
    steps, epochs = traced.finish(), traced.table("epochs")
    assert [row["step"] for row in epochs] == [0, 4]
    assert [row["drain_ns"] > 0 for row in epochs] == [False, True]
    for row in epochs:
        assert 0 < row["create_ns"] < row["ns"] == steps[row["step"]]["input_wait_ns"]


@pytest.mark.process
def test_workers_of_an_epoch_that_is_left_end_after_its_last_step(traced: Traced) -> None:
    """A loop that leaves its loader by `break` ends the workers at once: that is part of the next epoch's start."""
    model = net()
    optimizer = sgd(model)
    loader = DataLoader(data(8).dataset, batch_size=2, num_workers=1)
    for _ in range(3):
        for number, (x,) in enumerate(loader):
            train(model, optimizer, x)
            if number == 1:
                break

    steps, epochs = traced.finish(), traced.table("epochs")
    assert [row["step"] for row in epochs] == [0, 2, 4]
    for row in epochs[1:]:
        assert row["create_ns"] > 0
        assert row["drain_ns"] > 0
        assert row["create_ns"] + row["drain_ns"] < row["ns"] == steps[row["step"]]["input_wait_ns"]


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_an_optimizer_that_steps_after_the_loader_is_left_is_part_of_the_step(traced: Traced, workers: int) -> None:
    """A discriminator trains on the loader's first batch, then the generator on noise: one step, as without workers."""
    judge, generator = net(), net()
    optimizers = sgd(judge), sgd(generator)
    loader = DataLoader(data(8).dataset, batch_size=2, num_workers=workers)
    for _ in range(4):
        for (x,) in loader:
            train(judge, optimizers[0], x)
            break

        train(generator, optimizers[1], torch.randn(2, 4))

    assert len(traced.finish()) == 4


def test_what_is_saved_after_an_evaluation(traced: Traced, tmp_path: Path) -> None:
    """Saving the best model belongs to the step that comes after, as it would without the evaluation before it."""
    model = net()
    optimizer = sgd(model)
    loader = data(5)
    for _ in range(2):
        for (x,) in loader:
            train(model, optimizer, x)

        evaluate(model, 3)
        torch.save(model.state_dict(), tmp_path / "best.pt")

    rows = traced.finish()
    assert [index for index, row in enumerate(rows) if row["checkpoint_ns"]] == [5]
    assert [row["batches"] for row in traced.table("evals")] == [3, 3]


def test_the_end_of_the_loop_is_known(traced: Traced) -> None:
    """Between epochs and after the last step another one is open, of which nothing is done."""
    model = net()
    optimizer = sgd(model)
    clock, seen = traced.instrumentation.clock, []
    for _ in range(2):
        for (x,) in data(3):
            seen.append(clock.loop_has_ended)
            train(model, optimizer, x)
            seen.append(clock.loop_has_ended)

        assert clock.loop_has_ended

    assert not any(seen)


def test_a_step_is_done_once_its_optimizer_has_stepped(traced: Traced) -> None:
    """What fails from then on, before a part of another step begins, comes after it."""
    model = net()
    optimizer = sgd(model)
    clock, done = traced.instrumentation.clock, []
    for x in torch.randn(4, 2, WIDTH):
        loss = model(x).sum()
        loss.backward()
        done.append(clock.step_is_done)
        optimizer.step()
        assert clock.step_is_done

    assert not any(done)
    clock.open_slots[Slot.STEP_START] -= 60 * 10**9  # less than the machine is up
    assert clock.is_overdue()


def test_with_several_optimizers_a_step_is_not_known_to_be_done(traced: Traced) -> None:
    """The generator's part of a GAN follows that of the discriminator."""
    model, other = net(), net()
    optimizers = [sgd(model), sgd(other)]
    for (x,) in data(3):
        train(model, optimizers[0], x)
        assert not traced.instrumentation.clock.step_is_done
        train(other, optimizers[1], x)
