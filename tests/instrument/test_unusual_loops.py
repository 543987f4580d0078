"""Loops whose optimizers, loaders or threads change while they train: no step is missed, none is counted twice."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.instrument.clocks import use_clock
from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, evaluate, net, sgd, train
from traceml.clock import monotonic_ns
from traceml.database.schema import StepFlag
from traceml.instrument.values import step_pace

N = 130  # twice the steps between two looks at the hooks, after which their pace changes (`sparing`)
X = torch.randn(2, 4)


def optimizer_for_each_step() -> None:
    model = net()
    for _ in range(N):
        optimizer = sgd(model)
        train(model, optimizer, X)


def optimizer_and_scheduler_for_each_step() -> None:
    model = net()
    for _ in range(N):
        optimizer = torch.optim.Adam(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        train(model, optimizer, X)
        scheduler.step()


def optimizer_for_five_steps() -> None:
    """Test-time training: a few steps on each sample."""
    model = net()
    for _ in range(N // 5):
        optimizer = sgd(model)
        for _ in range(5):
            train(model, optimizer, X)


def model_for_each_step() -> None:
    for _ in range(N):
        model = net()
        train(model, sgd(model), X)


def optimizer_after_each_forward() -> None:
    for _ in range(N):
        model = net()
        loss = model(X).square().mean()
        optimizer = sgd(model)
        loss.backward()
        optimizer.step()


def gan_with_optimizers_for_each_step() -> None:
    generator, critic = net(), net()
    for _ in range(N):
        of_critic, of_generator = sgd(critic), sgd(generator)
        critic(X).mean().backward()
        of_critic.step()
        critic(generator(X).expand(2, 4)).mean().backward()
        of_generator.step()


@pytest.fixture
def sparing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hooks of short steps be looked after less often from the 64th step on, not from the 256th."""
    monkeypatch.setattr(step_pace, "_FIRST_STEPS", 63)


@pytest.mark.usefixtures("sparing")
@pytest.mark.parametrize(
    "loop",
    [
        optimizer_for_each_step,
        optimizer_and_scheduler_for_each_step,
        optimizer_for_five_steps,
        model_for_each_step,
        optimizer_after_each_forward,
        gan_with_optimizers_for_each_step,
    ],
)
def test_optimizers_that_are_made_anew(traced: Traced, loop: Callable[[], None]) -> None:
    """An optimizer that is gone does not make the step wait for it, and its facts are sent once."""
    loop()

    rows = traced.finish()
    assert len(rows) == N
    assert all(row["optimizer_ns"] > 0 and row["backward_ns"] > 0 for row in rows)
    assert len([info for info in traced.info if info["kind"] == "optimizer"]) == 1


def test_an_optimizer_without_weak_references(traced: Traced) -> None:
    """It counts as alive; training goes on."""
    model = net()
    optimizer = sgd(model)

    class Handle:
        """As a wrapper with slots, which a scaler steps."""

        __slots__ = ("param_groups", "step")

        def __init__(self) -> None:
            self.param_groups, self.step = optimizer.param_groups, optimizer.step

    handle: Any = Handle()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(20):
        model(X).square().mean().backward()
        scaler.step(handle)

    assert len(traced.finish()) == 20


B = 128


def update(parameters: Iterable[torch.Tensor]) -> None:
    """Update as scripts do that have no optimizer."""
    with torch.no_grad():
        for parameter in parameters:
            assert parameter.grad is not None
            parameter -= 0.01 * parameter.grad
            parameter.grad = None


def own_update() -> None:
    model = net()
    for (x,) in data(B):
        model(x).square().mean().backward()
        update(model.parameters())


def own_update_in_epochs() -> None:
    model = net()
    for _ in range(4):
        for (x,) in data(B // 4):
            model(x).square().mean().backward()
            update(model.parameters())

        evaluate(model, 3)


def own_update_of_tensors() -> None:
    weight = torch.randn(4, 1, requires_grad=True)
    for (x,) in data(B):
        (x @ weight).square().mean().backward()
        update([weight])


def own_update_of_tensors_without_loader() -> None:
    weight = torch.randn(4, 1, requires_grad=True)
    for _ in range(B):
        (X @ weight).square().mean().backward()
        update([weight])


def update_by(parameters: Iterable[torch.Tensor], grads: Iterable[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter -= 0.01 * grad


def step_by_grad(model: nn.Module, x: torch.Tensor) -> None:
    """A step as in `torch.autograd.grad`'s own examples, whose inputs may be a generator."""
    grads = torch.autograd.grad(model(x).square().mean(), model.parameters())
    update_by(model.parameters(), grads)


def autograd_grad() -> None:
    model = net()
    for (x,) in data(B):
        step_by_grad(model, x)


def autograd_grad_without_loader() -> None:
    model = net()
    for _ in range(B):
        step_by_grad(model, X)


def autograd_grad_of_values() -> None:
    model = net()
    named = dict(model.named_parameters())
    for (x,) in data(B):
        grads = torch.autograd.grad(model(x).square().mean(), named.values())
        update_by(named.values(), grads)


def autograd_grad_by_name() -> None:
    model = net()
    named = dict(model.named_parameters())
    for (x,) in data(B):
        grads: Any = torch.autograd.grad(model(x).square().mean(), named)
        update_by(named.values(), grads.values())


takes_names = "dict" in str(torch.autograd.grad.__annotations__["inputs"])  # of torch 2.13, not of 2.4
by_name = pytest.mark.skipif(not takes_names, reason="this torch takes no dictionary of parameters")


def autograd_grad_of_tensors() -> None:
    weights = [torch.randn(4, 4, requires_grad=True), torch.randn(4, 1, requires_grad=True)]
    for (x,) in data(B):
        grads = torch.autograd.grad((x @ weights[0] @ weights[1]).square().mean(), weights)
        update_by(weights, grads)


def step_by_transform(model: nn.Module, values: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return new parameters, as `torch.func` trains: the model keeps its own."""

    def loss_of(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,)).square().mean()

    grads, _ = torch.func.grad_and_value(loss_of)(values)
    return {name: values[name] - 0.01 * grads[name] for name in values}


def transform() -> None:
    model = net()
    values = {name: value.detach() for name, value in model.named_parameters()}
    for (x,) in data(B):
        values = step_by_transform(model, values, x)


def transform_without_loader() -> None:
    model = net()
    values = {name: value.detach() for name, value in model.named_parameters()}
    for _ in range(B):
        values = step_by_transform(model, values, X)


@pytest.mark.parametrize(
    ("loop", "evaluations"),
    [
        (transform, 0),
        (transform_without_loader, 0),
        (autograd_grad, 0),
        (autograd_grad_without_loader, 0),
        (autograd_grad_of_values, 0),
        pytest.param(autograd_grad_by_name, 0, marks=by_name),
        (autograd_grad_of_tensors, 0),
        (own_update, 0),
        (own_update_in_epochs, 12),
        (own_update_of_tensors, 0),
        (own_update_of_tensors_without_loader, 0),
    ],
)
def test_training_without_an_optimizer(traced: Traced, loop: Callable[[], None], evaluations: int) -> None:
    """Each batch is a step; without a loader, each backward pass."""
    loop()

    rows = traced.finish()
    assert len(rows) == B
    assert all(row["backward_ns"] > 0 and row["flags"] & StepFlag.INFERRED for row in rows)
    assert sum(row["batches"] for row in traced.table("evals")) == evaluations


@pytest.mark.parametrize(("evaluates", "unseen"), [(False, 3), (True, 0)])
def test_new_models_without_an_optimizer(traced: Traced, evaluates: bool, unseen: int) -> None:
    """Each backward pass is a step, as where an optimizer of another library fits one model after the other.

    The first one of a new model, whose call is not seen, belongs to the step before, unless that ended by evaluation.
    """
    for _ in range(4):
        model = net()
        for _ in range(B):
            model(X).square().mean().backward()
            update(model.parameters())

        if evaluates:
            evaluate(model, 1)

    assert len(traced.finish()) == 4 * B - unseen


def test_gradients_of_inputs_and_inner_loops(traced: Traced) -> None:
    """They are backward time of the step, and no step or micro-batch of their own."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(20):
        x.requires_grad_()
        (attack,) = torch.autograd.grad(model(x).sum(), x)
        (penalty,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        inner = torch.autograd.grad(model(x).square().mean(), tuple(model.parameters()), create_graph=True)
        optimizer.zero_grad()
        (model(x + attack).mean() + penalty.square().mean() + sum(grad.square().sum() for grad in inner)).backward()
        optimizer.step()

    rows = traced.finish()
    assert [row["micro"] for row in rows] == [1] * 20


def test_gradients_of_several_inputs_are_none_of_the_training(traced: Traced) -> None:
    """As forces and stresses: no micro-batch of a step, nor a sign that a batch of the validation is trained on."""
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, X)
    loader, other = data(6), data(3)
    for _ in range(3):
        for (x,) in loader:
            first, second = x[:1].requires_grad_(), x[1:].requires_grad_()
            torch.autograd.grad(model(torch.cat([first, second])).sum(), [first, second])
            train(model, optimizer, x)

        for (x,) in other:
            first, second = x[:1].requires_grad_(), x[1:].requires_grad_()
            torch.autograd.grad(model(torch.cat([first, second])).sum(), [first, second])

    rows = traced.finish()
    assert [row["micro"] for row in rows] == [1] * 19
    assert [row["samples"] for row in rows[1:]] == [2] * 18
    assert [row["batches"] for row in traced.table("evals")] == [3] * 3


@pytest.mark.parametrize("parameters", [False, True])
def test_gradients_that_an_optimizer_gets_are_backward_passes(traced: Traced, parameters: bool) -> None:
    """Of parameters, or of tensors that it was given."""
    weights = [torch.randn(4, 4, requires_grad=True), torch.randn(4, 1, requires_grad=True)]
    if parameters:
        weights = [nn.Parameter(each.detach()) for each in weights]

    optimizer = torch.optim.SGD(weights, lr=0.01)
    for _ in range(20):
        first, second = torch.randn(2, 1, 4)
        halves = [torch.autograd.grad((half @ weights[0] @ weights[1]).sum(), weights) for half in (first, second)]
        for weight, *grads in zip(weights, *halves, strict=True):
            weight.grad = sum(grads)

        optimizer.step()

    assert [row["micro"] for row in traced.finish()][-19:] == [2] * 19  # the first backward pass is a step by itself


def test_transforms_in_an_inner_loop_are_no_steps(traced: Traced) -> None:
    """Its gradients are differentiated again: by backward, or by an outer transform."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(20):
        fast = step_by_transform(model, dict(model.named_parameters()), x)
        optimizer.zero_grad()
        torch.func.functional_call(model, fast, (x,)).square().mean().backward()
        optimizer.step()

    rows = traced.finish()
    assert [row["micro"] for row in rows] == [1] * 20


def slowly(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield after two milliseconds."""
    time.sleep(0.002)
    yield from tensors


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(slowly(model.parameters()), 1.0)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(slowly(model.parameters()), 1.0)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_no_optimizer_time(traced: Traced, by_name: bool) -> None:
    """skorch and Lightning give one to any optimizer: what the loop does in it, beside the model, is `other`."""
    model = net()
    optimizer = sgd(model)

    inside: list[int] = []
    whole: list[int] = []

    def closure() -> torch.Tensor:
        began = monotonic_ns()
        optimizer.zero_grad()
        time.sleep(0.02)
        loss = model(X).square().mean()
        loss.backward()
        inside.append(monotonic_ns() - began)
        return loss

    for _ in range(5):
        began = monotonic_ns()
        assert optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        whole.append(monotonic_ns() - began)

    steps = traced.finish()
    assert len(steps) == 5
    for step, own_ns in zip(steps, np.subtract(whole, inside), strict=True):
        assert own_ns >= step["optimizer_ns"] > 0
        assert step["other_ns"] > 20e6
        assert min(step["forward_ns"], step["backward_ns"]) > 0


@pytest.mark.process
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_that_are_taken_at_once_are_waited_for_in_the_first_step(traced: Traced, persistent: bool) -> None:
    """`for batch in list(loader)`: that step begins the epoch, and the next one on the same batches waits for none."""
    model = net()
    optimizer = sgd(model)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(20, 4)), 2, num_workers=1, persistent_workers=persistent
    )
    for _ in range(3):
        for (batch,) in list(loader):
            train(model, optimizer, batch)

    steps = traced.finish()
    waits = np.array([step["input_wait_ns"] for step in steps])
    assert len(steps) == 30
    assert np.flatnonzero(waits).tolist() == [0, 10, 20]
    assert [bool(step["flags"] & StepFlag.EPOCH) for step in steps[::10]] == [True] * 3
    assert sum(bool(step["flags"] & StepFlag.EPOCH) for step in steps) == 3


class Waits(torch.utils.data.Dataset[torch.Tensor]):
    """Samples that take a moment each, by the clock that it is given."""

    def __init__(self, now: list[int]) -> None:
        self._now = now

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        self._now[0] += 1
        return torch.ones(4)


@pytest.mark.parametrize(
    ("read", "waits"),
    [
        (lambda loader: [next(iter(loader))], [1] * 4),
        (list, [5, 0, 0, 0, 0] * 4),
        (lambda loader: (batch for _, batch in zip((1, 2), loader, strict=False)), [1, 1] * 4),
        (lambda loader: (batch for batch, _ in zip(loader, (1, 2), strict=False)), [1, 1] + [2, 1] * 3),
    ],
    ids=["the first", "all at once", "two", "one too many"],
)
def test_batches_of_a_new_loader_each_time_are_waited_for_in_their_steps(
    read: Callable[[Any], Iterable[torch.Tensor]], waits: list[int], traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for a batch belongs to the step that uses it, also if the loader of the step before is left."""
    now = [monotonic_ns()]
    use_clock(monkeypatch, lambda: now[0])
    model = net()
    optimizer = sgd(model)
    for _ in range(4):
        for batch in read(torch.utils.data.DataLoader(Waits(now))):
            train(model, optimizer, batch)
            now[0] += 1

    assert [row["input_wait_ns"] for row in traced.finish()] == waits


@pytest.mark.parametrize("fetches", [False, True])
def test_a_repeated_closure_trains_on_the_same_data(traced: Traced, fetches: bool) -> None:
    """L-BFGS calls its closure many times in a step. One that takes a batch each time trains on more."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, tolerance_grad=0, tolerance_change=0)
    batches = iter(data(100))
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = model(next(batches)[0] if fetches else X).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)

    steps = traced.finish()
    assert len(steps) == 5 < calls
    assert sum(step["samples"] for step in steps) == (calls if fetches else 5) * len(X)


def test_a_step_that_ends_in_a_closure_has_the_optimizer_s_time_before(traced: Traced) -> None:
    """A loader asked in the closure closes the step: it has the next optimizer step until then."""

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            time.sleep(0.02)
            return super().step(closure)

    model = net()
    optimizer = Slow(model.parameters(), 0.1)
    batches = iter(data(10))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(next(batches)[0]).square().mean()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)

    steps = traced.finish()  # which checks that no time is below 0
    assert sum(step["optimizer_ns"] for step in steps) >= 8 * 20e6


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_clipping_is_optimizer_time(traced: Traced, clip: Callable[[nn.Module], None]) -> None:
    """What is done to the gradients before the update belongs to the update."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        clip(model)
        optimizer.step()

    rows = traced.finish()
    assert len(rows) == 5
    assert all(row["optimizer_ns"] >= 2_000_000 for row in rows)


def one_batch() -> None:
    (x,) = next(iter(data(40)))
    model = net()
    optimizer = sgd(model)
    for _ in range(200):
        train(model, optimizer, x)


def one_batch_of_an_iterator() -> None:
    batches = iter(data(40))
    (x,) = next(batches)
    model = net()
    optimizer = sgd(model)
    for _ in range(200):
        train(model, optimizer, x)

    del batches


def a_new_iterator_for_each_batch() -> None:
    loader, model = data(5), net()
    optimizer = sgd(model)
    for _ in range(200):
        (x,) = next(iter(loader))
        train(model, optimizer, x)


def epochs_that_are_left() -> None:
    loader, model = data(60), net()
    optimizer = sgd(model)
    for _ in range(4):
        for index, (x,) in enumerate(loader):
            train(model, optimizer, x)
            if index == 39:
                break

    for _ in range(40):
        train(model, optimizer, x)


def five_updates_on_each_batch() -> None:
    model = net()
    optimizer = sgd(model)
    for (x,) in data(200):
        for _ in range(5):
            train(model, optimizer, x)


@pytest.mark.parametrize(
    "loop",
    [
        one_batch,
        one_batch_of_an_iterator,
        a_new_iterator_for_each_batch,
        epochs_that_are_left,
        five_updates_on_each_batch,
    ],
)
def test_batches_that_outlive_their_iterator(traced: Traced, loop: Callable[[], None]) -> None:
    """Steps on the one batch that a loader gave are counted; several updates on each batch are one step."""
    loop()

    rows = traced.finish()
    assert len(rows) == 200
    assert all(row["backward_ns"] > 0 for row in rows)


def train_all(steps: int, *, with_loader: bool) -> None:
    model = net()
    optimizer = sgd(model)
    for (x,) in data(steps) if with_loader else [(X,)] * steps:
        train(model, optimizer, x)


def in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize("with_loader", [True, False])
def test_training_that_moves_with_its_context(traced: Traced, with_loader: bool) -> None:
    """After training on the main thread, training in `asyncio.to_thread` is seen, and again on the main thread."""
    train_all(100, with_loader=with_loader)
    asyncio.run(asyncio.to_thread(train_all, 100, with_loader=with_loader))
    train_all(100, with_loader=with_loader)

    assert len(traced.finish()) == 300


def test_steps_in_contexts_of_their_own(traced: Traced) -> None:
    """A task of asyncio for each step has one; its wait for a batch ends the step before."""
    model = net()
    optimizer = sgd(model)
    batches = iter(data(8))

    def step() -> None:
        (x,) = next(batches)
        train(model, optimizer, x)

    for _ in range(8):
        contextvars.Context().run(step)

    assert len(traced.finish()) == 8


def test_steps_that_move_between_threads(traced: Traced) -> None:
    """Each step in a call of `asyncio.to_thread`."""
    model = net()
    optimizer = sgd(model)

    async def steps() -> None:
        for _ in range(100):
            await asyncio.to_thread(train, model, optimizer, X)

    train(model, optimizer, X)
    asyncio.run(steps())

    assert len(traced.finish()) == 101


@pytest.mark.parametrize("with_blocks", [False, True])
def test_steps_in_threads_of_a_pool(traced: Traced, *, with_blocks: bool) -> None:
    """Each step is a task of its own, from its first on: no context goes from one thread to the next."""
    model = net()
    optimizer = sgd(model)

    def step() -> None:
        with traced.instrumentation.trace_step() if with_blocks else nullcontext():
            train(model, optimizer, X)

    ended = threading.Event()

    async def steps() -> None:
        asyncio.get_running_loop().run_in_executor(None, ended.wait)  # keeps one thread busy
        for number in range(50):
            await asyncio.to_thread(step)
            await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.001) for _ in range(number % 3)))

        ended.set()

    asyncio.run(steps())

    assert len(traced.finish()) == 50


def test_training_in_one_thread_after_another(traced: Traced) -> None:
    """A thread that trains takes over from one that has ended."""
    for _ in range(3):
        in_thread(lambda: train_all(50, with_loader=True))

    assert len(traced.finish()) == 150


def test_a_second_training_at_the_same_time(traced: Traced, caplog: pytest.LogCaptureFixture) -> None:
    """While the training thread is alive, another thread's training is not counted, which is said once."""
    model: nn.Module = net()
    optimizer = sgd(model)
    for _ in range(20):
        train(model, optimizer, X)

    in_thread(lambda: train_all(50, with_loader=False))
    for _ in range(20):
        train(model, optimizer, X)

    assert len(traced.finish()) == 40
    [said] = [record.getMessage() for record in caplog.records if "latter are counted" in record.getMessage()]
    assert "in the thread MainThread is traced" in said


def test_an_optimizer_that_moves_with_the_training_is_no_second_one(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    """One thread after another, and optimizers that step in the backward pass."""
    for _ in range(2):
        in_thread(lambda: train_all(20, with_loader=False))

    model = net()
    own = {parameter: torch.optim.SGD([parameter], lr=0.01) for parameter in model.parameters()}
    for parameter in own:
        parameter.register_post_accumulate_grad_hook(lambda tensor: own[tensor].step())

    for _ in range(20):
        model(X).sum().backward()

    assert "latter are counted" not in caplog.text


def test_an_optimizer_that_gets_more_parameters_is_described_again(traced: Traced) -> None:
    """As when layers are unfrozen: steps are longer from there on, and it is another training."""
    body, head = nn.Linear(4, 4), nn.Linear(4, 1)
    body.requires_grad_(False)
    optimizer = sgd(head)
    for step in range(20):
        if step == 10:
            body.requires_grad_()
            optimizer.add_param_group({"params": body.parameters(), "lr": 0.01})

        optimizer.zero_grad()
        head(body(torch.ones(2, 4))).sum().backward()
        optimizer.step()

    traced.finish()
    told = [(info["step"], info["tensors"]) for info in traced.info if info["kind"] == "optimizer"]
    assert [tensors for _, tensors in told] == [2, 4]
    assert told[1][0] in (9, 10)
    assert not [info for info in traced.info if info["kind"] == "training_begins"]


@pytest.mark.parametrize("with_loader", [True, False])
def test_gradients_of_many_batches_are_one_step(traced: Traced, with_loader: bool) -> None:
    """From the first one on: as in gradient descent on all data, or for batches of a million tokens."""
    model = net()
    optimizer = sgd(model)
    for number, (x,) in enumerate(data(500) if with_loader else [(X,)] * 500, 1):
        model(x).sum().backward()
        if number % 100 == 0:
            optimizer.step()
            optimizer.zero_grad()

    rows = traced.finish()
    assert [row["micro"] for row in rows] == [100] * 5
    assert not any(row["flags"] & StepFlag.INFERRED for row in rows)


@pytest.mark.parametrize(("batches", "steps"), [(63, 0), (64, 64), (600, 600)])
def test_batches_are_steps_where_the_optimizer_never_steps(traced: Traced, batches: int, steps: int) -> None:
    """Known after many of them, or at the end of the script."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(batches):
        optimizer.zero_grad()
        model(x).sum().backward()

    rows = traced.finish()
    assert len(rows) == steps
    assert all(row["flags"] & StepFlag.INFERRED for row in rows)
