"""Evaluation in loops without a DataLoader is no part of the steps; teachers and rollouts are."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net, sgd, train
from traceml.clock import monotonic_ns
from traceml.instrument.forward import is_instrumented
from traceml.instrument.search import discovery

X = torch.randn(2, 4)
CALLS = 3
REST_S = 0.1


@torch.no_grad()
def call_often(model: nn.Module) -> None:
    for _ in range(CALLS):
        model(X)
        time.sleep(0.001)


def evaluate(model: nn.Module) -> None:
    """Evaluate as nanoGPT does."""
    model.eval()
    call_often(model)
    model.train()


@torch.inference_mode()
def sample(model: nn.Module) -> None:
    model.eval()
    model(X)
    model.train()


def before_the_step() -> None:
    model = net()
    optimizer = sgd(model)
    for index in range(20):
        if index % 5 == 0:
            evaluate(model)

        train(model, optimizer, X)


def after_the_step() -> None:
    model = net()
    optimizer = sgd(model)
    for index in range(20):
        train(model, optimizer, X)
        if index % 5 == 4:
            evaluate(model)


def with_accumulation() -> None:
    model = net()
    optimizer = sgd(model)
    for index in range(20):
        if index % 5 == 0:
            evaluate(model)

        optimizer.zero_grad()
        for _ in range(3):
            model(X).square().mean().backward()

        optimizer.step()


def after_a_step_on_a_batch() -> None:
    model = net()
    optimizer = sgd(model)
    for index, (x,) in enumerate(data(20)):
        train(model, optimizer, x)
        if index % 5 == 4:
            evaluate(model)


def before_a_step_on_a_batch() -> None:
    model = net()
    optimizer = sgd(model)
    for index, (x,) in enumerate(data(20)):
        if index % 5 == 0:
            evaluate(model)

        train(model, optimizer, x)


def after_each_epoch(evaluation: Callable[[nn.Module], None] = evaluate) -> None:
    model = net()
    optimizer = sgd(model)
    loader = data(5)
    for _ in range(4):
        for (x,) in loader:
            train(model, optimizer, x)

        evaluation(model)


def after_each_epoch_in_training_mode() -> None:
    after_each_epoch(call_often)


def on_one_batch() -> None:
    model = net()
    optimizer = sgd(model)
    (x,) = next(iter(data(3)))
    for index in range(20):
        train(model, optimizer, x)
        if index % 5 == 4:
            evaluate(model)


@pytest.mark.parametrize(
    "loop",
    [
        before_the_step,
        after_the_step,
        with_accumulation,
        after_a_step_on_a_batch,
        before_a_step_on_a_batch,
        after_each_epoch,
        after_each_epoch_in_training_mode,
        on_one_batch,
    ],
)
def test_evaluation_without_a_loader(traced: Traced, loop: Callable[[], None]) -> None:
    """Its calls are counted, its time is in no step."""
    loop()

    rows, evals = traced.finish(), traced.table("evals")
    assert len(rows) == 20
    assert [row["batches"] for row in evals] == [CALLS] * 4
    assert all(row["ns"] >= CALLS * 1_000_000 for row in evals)
    assert all(row["forward_ns"] > 0 and row["backward_ns"] > 0 and row["optimizer_ns"] > 0 for row in rows)


@pytest.mark.parametrize("anew", [False, True])
def test_an_evaluation_is_before_the_step_that_follows_it(traced: Traced, anew: bool) -> None:
    """Other ranks wait for it in that step: only there may their waiting be told from that for data or the network."""
    model = net()
    optimizer, loader = sgd(model), data(5)
    for _ in range(4):
        for (x,) in data(5) if anew else loader:
            train(model, optimizer, x)

        model.eval()
        with torch.no_grad():
            for (x,) in data(3):
                model(x)

        model.train()

    rows = traced.finish()

    assert len(rows) == 20
    assert [row["step"] for row in traced.table("evals")] == [5, 10, 15, 20]


class _SlowRows(torch.utils.data.Dataset[torch.Tensor]):
    """Each row takes a while to read, on purpose."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.004)
        return X[0]


def test_an_evaluation_knows_what_its_data_and_its_calls_take(traced: Traced) -> None:
    """The waits of its batches are in it, and none of those of the training; a loop without a loader waits for none."""
    model = net()
    optimizer, loader, slow = sgd(model), data(5), DataLoader(_SlowRows(), batch_size=2)
    for number in range(2):
        for (x,) in loader:
            train(model, optimizer, x)

        model.eval()
        with torch.no_grad():
            for x in slow if number else [X] * 4:
                model(x)

        model.train()

    without, with_loader = (traced.finish(), traced.table("evals"))[1]
    assert (without["input_wait_ns"], with_loader["batches"]) == (0, 2)
    assert with_loader["input_wait_ns"] >= 4 * 4_000_000
    assert all(
        row["forward_ns"] > 0 and row["input_wait_ns"] + row["forward_ns"] <= row["ns"]
        for row in (without, with_loader)
    )


@pytest.mark.parametrize("with_loader", [True, False])
def test_set_up_of_the_next_fold_is_no_evaluation(traced: Traced, with_loader: bool) -> None:
    """It comes after the last call, and another model is made and trained then, which is in training mode."""
    set_up_s = 5 * REST_S
    began_ns, evaluated_ns = [], []
    for _ in range(4):
        time.sleep(set_up_s)
        model = net()
        optimizer = sgd(model)
        for (x,) in data(5) if with_loader else [[X]] * 5:
            began_ns.append(monotonic_ns())
            train(model, optimizer, x)

        began_ns.append(monotonic_ns())
        model.eval()
        with torch.no_grad():
            for (x,) in data(CALLS) if with_loader else [[X]] * CALLS:
                model(x)
                time.sleep(0.001)

        evaluated_ns.append(monotonic_ns() - began_ns[-1])

    # Beside what each took: a busy machine may stop this process anywhere.
    trained_ns = np.diff(np.reshape(began_ns, (4, 6))).ravel().tolist()
    rows, evals = traced.finish(), traced.table("evals")
    assert len(rows) == 20
    assert len(evals) == 4
    assert all(row["ns"] < took + set_up_s * 1e9 / 2 for row, took in zip(evals, evaluated_ns, strict=True))
    long = [row["step"] for row, took in zip(rows, trained_ns, strict=True) if row["total_ns"] > took + set_up_s * 5e8]
    assert long == [5, 10, 15]


def sampling_before_the_epoch() -> list[int]:
    """As NCF does: its next epoch has other samples. Nothing comes after the last evaluation."""
    model = net()
    optimizer = sgd(model)
    loader, held_back = data(5), data(CALLS)
    longest_ns, began_ns = [], 0
    for epoch in range(4):
        model.train()
        if epoch:
            longest_ns.append(monotonic_ns() - began_ns)

        time.sleep(REST_S)
        for (x,) in loader:
            began_ns = monotonic_ns()
            train(model, optimizer, x)

        model.eval()
        with torch.no_grad():
            for (x,) in held_back:
                model(x)
                time.sleep(0.001)

    return longest_ns


def sampling_without_a_loader() -> list[int]:
    model = net()
    optimizer = sgd(model)
    longest_ns, began_ns = [], monotonic_ns()
    for index in range(20):
        if index % 5 == 0:
            evaluate(model)
            longest_ns.append(monotonic_ns() - began_ns)
            time.sleep(REST_S)

        began_ns = monotonic_ns()
        train(model, optimizer, X)

    return longest_ns


@pytest.mark.parametrize("loop", [sampling_before_the_epoch, sampling_without_a_loader])
def test_evaluation_ends_as_the_model_changes_to_training_mode(traced: Traced, loop: Callable[[], list[int]]) -> None:
    """What the script does after that is a part of the next step."""
    longest_ns = loop()  # from the last step before each evaluation until the change, without what comes after it

    rows, evals = traced.finish(), traced.table("evals")
    assert len(rows) == 20
    assert [row["batches"] for row in evals] == [CALLS] * 4
    assert all(row["ns"] >= CALLS * 1_000_000 for row in evals)
    assert all(row["ns"] <= most for row, most in zip(evals, longest_ns, strict=False))
    assert all(row["total_ns"] >= REST_S * 1e9 for row in rows[5::5])


def test_evaluation_of_the_module_inside_a_wrapper(traced: Traced) -> None:
    """As DDP trains it: the wrapper is called in training, the module itself in an evaluation on one rank."""
    inside = net()
    model = nn.DataParallel(inside)
    optimizer = sgd(model)
    for index in range(20):
        train(model, optimizer, X)
        if index % 5 == 4:
            evaluate(inside)

    rows = traced.finish()
    assert len(rows) == 20
    assert [row["batches"] for row in traced.table("evals")] == [CALLS] * 4
    assert traced.instrumentation.clock.errors == 0


class Watching(nn.Linear):
    """A model that notes in each call whether an evaluation runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, self.clock.is_evaluating))
        return super().forward(x)


def test_evaluation_of_averaged_weights(traced: Traced) -> None:
    """The copy inside is called as often as the wrapper itself, as timm does: its batches are no part of the steps."""
    model = net()
    optimizer = sgd(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    validation = data(CALLS)
    for _ in range(2):
        for (x,) in data(4):
            train(model, optimizer, x)
            averaged.update_parameters(model)

        with torch.inference_mode():
            for (x,) in validation:
                averaged.module.eval()(x)

    assert len(traced.finish()) == 8
    assert [row["batches"] for row in traced.table("evals")] == [CALLS, CALLS]


@pytest.mark.parametrize("in_epoch", [False, True])
def test_samples_of_averaged_weights(traced: Traced, *, in_epoch: bool) -> None:
    """A copy that no optimizer has samples images, as of a diffusion model: it counted for a step."""
    model, averaged = net(), net().eval()
    optimizer = sgd(model)

    @torch.no_grad()
    def sample_images() -> None:
        for _ in range(CALLS):
            averaged(X)

    for _ in range(3):
        for index, (x,) in enumerate(data(4)):
            train(model, optimizer, x)
            if in_epoch and index == 1:
                sample_images()

        if not in_epoch:
            sample_images()

    assert len(traced.finish()) == 12
    assert [row["batches"] for row in traced.table("evals")] == [CALLS] * 3


class Sampler(nn.Module):
    """A model that samples by its parts, as a language model or a diffusion model does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    @torch.no_grad()
    def generate(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(CALLS):
            x = self.head(self.body(x))

        return x


@pytest.mark.parametrize("with_loader", [False, True])
def test_samples_by_parts_of_a_model(traced: Traced, monkeypatch: pytest.MonkeyPatch, *, with_loader: bool) -> None:
    """Between `eval()` and `train()`; they were other code of the steps."""
    monkeypatch.setattr(discovery, "_has_compiled", bool)  # another test may have
    model = Sampler()
    optimizer = sgd(model)
    for index, x in enumerate(x for (x,) in data(20)) if with_loader else enumerate([X] * 20):
        train(model, optimizer, x)
        if index % 5 == 4:
            model.eval()
            model.generate(x)
            model.train()

    assert len(traced.finish()) == 20
    assert [row["batches"] for row in traced.table("evals")] == [2 * CALLS] * 4


def test_parts_of_parts_are_not_timed(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval()` reaches them too: each would cost a hook in every step."""
    monkeypatch.setattr(discovery, "_has_compiled", bool)
    model = Sampler()
    model.body = Sampler()
    optimizer = sgd(model)
    for _ in range(3):
        train(model, optimizer, X)
        model.eval()
        model.train()

    assert is_instrumented(model.body)
    assert not is_instrumented(model.body.body)


class Criterion(nn.Module):
    """The module that is trained: it holds the model and adds the loss, as those of sentence-transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.classifier = model, nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.model(x)).square().mean()


@pytest.mark.parametrize("by_parts", [False, True])
def test_a_model_in_the_module_that_is_trained(traced: Traced, monkeypatch: pytest.MonkeyPatch, by_parts: bool) -> None:
    """It evaluates by itself, by a call or by a method that calls its parts; that was other code of the steps."""
    monkeypatch.setattr(discovery, "_has_compiled", bool)
    model = Sampler()
    model(X)
    model.eval()  # before the training, when the module around it is not known
    criterion = Criterion(model)
    optimizer = sgd(criterion)
    for index, (x,) in enumerate(data(20)):
        criterion.train()
        optimizer.zero_grad()
        criterion(x).backward()
        optimizer.step()
        if index % 5 == 4:
            model.eval()
            model.generate(x) if by_parts else evaluate(model)

    assert len(traced.finish()) == 20
    assert [row["batches"] for row in traced.table("evals")] == [2 * CALLS if by_parts else CALLS] * 4


def test_layers_that_stay_in_evaluation_are_not_timed(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """As frozen layers of normalization, which a script sets to `eval()` in each step."""
    monkeypatch.setattr(discovery, "_has_compiled", bool)
    model = Criterion(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
    optimizer = sgd(model)
    for (x,) in data(5):
        model.train()
        model.model[1].eval()
        model(x).backward()
        optimizer.step()

    assert not any(is_instrumented(part) for part in model.model.modules())


def plain(count: int) -> Iterator[torch.Tensor]:
    """Fetch each batch when the one before it was used."""
    return (x for (x,) in data(count))


def ahead(count: int = 5) -> Iterator[torch.Tensor]:
    """Fetch each batch before the one before it is used, as accelerate does."""
    batches = iter(data(count))
    (last,) = next(batches)
    for (x,) in batches:
        yield last
        last = x

    yield last


@pytest.mark.parametrize("batches", [plain, ahead])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_teacher_on_each_batch_of_a_loader_is_no_evaluation(
    traced: Traced, is_first: bool, batches: Callable[[int], Iterable[torch.Tensor]]
) -> None:
    """Its targets are a part of the step, also on a batch that was fetched before the end of its loader."""
    taught, model = net().eval(), net()
    optimizer = sgd(model)
    for x in (x for _ in range(4) for x in batches(5)):
        student = None if is_first else model(x)
        with torch.no_grad():
            target = taught(x)

        ((model(x) if student is None else student) - target).square().mean().backward()
        optimizer.step()

    assert len(traced.finish()) == 20
    assert traced.table("evals") == []


@pytest.mark.parametrize("with_loader", [False, True])
def test_an_evaluation_is_known_while_it_runs(traced: Traced, with_loader: bool) -> None:
    """From its second batch on; the training after it is none."""
    model = Watching(4, 1)
    model.seen, model.clock = [], traced.instrumentation.clock
    optimizer = sgd(model)
    for _ in range(3):
        for (x,) in data(4):
            train(model, optimizer, x)

        if with_loader:
            with torch.no_grad():
                model.eval()
                for (x,) in data(CALLS):
                    model(x)

            model.train()
        else:
            evaluate(model)

    training = [evaluating for is_training, evaluating in model.seen if is_training]
    evaluation = [evaluating for is_training, evaluating in model.seen if not is_training]
    assert training == [False] * 12
    assert evaluation[1:CALLS] == evaluation[-CALLS + 1 :] == [True] * (CALLS - 1)


def test_an_evaluation_on_one_batch_ends_with_it(traced: Traced) -> None:
    """As where images are sampled every n-th step, with gradients: the next step trains again."""
    model = Watching(4, 1)
    model.seen, model.clock = [], traced.instrumentation.clock
    optimizer = sgd(model)
    for (x,) in data(6):
        model.train()
        train(model, optimizer, x)
        model.eval()
        model(next(iter(data(CALLS)))[0])

    assert [evaluating for is_training, evaluating in model.seen if is_training] == [False] * 6
    assert len(traced.finish()) == 6


def test_samples_of_a_gan(traced: Traced) -> None:
    """Evaluation between steps with two optimizers."""
    generator, critic = nn.Linear(4, 4), net()
    of_generator, of_critic = sgd(generator), sgd(critic)
    for index in range(20):
        critic(generator(X).detach()).mean().backward()
        of_critic.step()
        critic(generator(X)).mean().backward()
        of_generator.step()
        if index % 5 == 4:
            sample(generator)

    assert len(traced.finish()) == 20
    assert [row["batches"] for row in traced.table("evals")] == [1] * 4


def test_saving_during_evaluation_stays_in_the_step(traced: Traced, tmp_path: object) -> None:
    """A checkpoint of the best model is saving time of the step."""
    model = net()
    optimizer = sgd(model)
    for index in range(10):
        train(model, optimizer, X)
        if index == 4:
            evaluate(model)
            torch.save(model.state_dict(), f"{tmp_path}/model.pt")

    rows = traced.finish()
    assert len(rows) == 10
    assert sum(row["checkpoint_ns"] > 0 for row in rows) == 1


def teacher() -> None:
    taught, model = net().eval(), net()
    optimizer = sgd(model)
    for _ in range(20):
        with torch.no_grad():
            target = taught(X)

        optimizer.zero_grad()
        (model(X) - target).square().mean().backward()
        optimizer.step()


def rollout() -> None:
    policy = net()
    optimizer = sgd(policy)
    for _ in range(5):
        with torch.no_grad():
            for _ in range(8):
                policy(X)

        for _ in range(4):
            train(policy, optimizer, X)


def critic() -> None:
    """A GAN whose critic steps several times on each batch, between calls of a generator in training mode."""
    generator, judge = net(), net()
    optimizer = sgd(judge)
    for (x,) in data(20):
        for _ in range(3):
            with torch.no_grad():
                generator(x)

            train(judge, optimizer, x)


def tried_before_training() -> None:
    model = net()
    optimizer = sgd(model)
    sample(model)
    for _ in range(20):
        train(model, optimizer, X)


@pytest.mark.parametrize("loop", [teacher, rollout, critic, tried_before_training])
def test_calls_without_gradients_that_are_no_evaluation(traced: Traced, loop: Callable[[], None]) -> None:
    """A model that is not trained, one that acts, one that generates what is trained on, one that is only tried."""
    loop()

    assert len(traced.finish()) == 20
    assert traced.table("evals") == []


def playing(observations: Callable[[], torch.Tensor], acts_on: slice | int = slice(2)) -> None:
    """Call a policy without gradients, in training mode as CleanRL does, and train it 30 times."""
    policy = net()
    optimizer = sgd(policy)
    for _ in range(30):
        seen = observations()
        with torch.no_grad():
            policy(seen[acts_on])

        train(policy, optimizer, seen)


@pytest.mark.parametrize(
    ("observations", "reported"), [(lambda: torch.randn(6, 4), True), (lambda: torch.ones(2, 4), False)]
)
def test_rollouts_are_reported(traced: Traced, observations: Callable[[], torch.Tensor], reported: bool) -> None:
    """What a model sees before it is trained on more of it; not a call on the same batch, as of a teacher."""
    playing(observations)

    assert len(traced.finish()) == 30
    assert ("rollouts" in {row["kind"] for row in traced.info}) is reported
    assert traced.table("evals") == []


@pytest.mark.parametrize(("acts_on", "reported"), [(0, True), (slice(0), False)])
def test_rollouts_of_single_states(traced: Traced, acts_on: slice | int, reported: bool) -> None:
    """A state may come without a dimension of the batch; a batch without any is none."""
    playing(lambda: torch.randn(6, 4), acts_on)

    assert len(traced.finish()) == 30
    assert ("rollouts" in {row["kind"] for row in traced.info}) is reported


@pytest.mark.parametrize(("prompted_by", "reported"), [(slice(4), True), (slice(1, 5), False)])
def test_texts_that_a_model_continues_to_learn_from_them(traced: Traced, prompted_by: slice, *, reported: bool) -> None:
    """A language model that is rewarded for its answers generates in `eval()`, on as many texts as it is trained on."""
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 50))
    optimizer = sgd(model)
    for _ in range(12):
        texts = torch.randint(50, (4, 8))
        model.eval()
        with torch.no_grad():
            model(texts[:, prompted_by])
            model(texts)

        model.train()
        train(model, optimizer, texts)

    assert len(traced.finish()) == 12
    assert ("rollouts" in {row["kind"] for row in traced.info}) is reported
    assert (len(traced.table("evals")) < 10) is reported


@pytest.mark.parametrize(("samples", "has_loader", "reported"), [(1, False, True), (8, False, False), (1, True, False)])
def test_calls_with_one_sample_are_reported(traced: Traced, samples: int, *, has_loader: bool, reported: bool) -> None:
    """Self-play of AlphaZero calls the model for one board after another, and trains on many of them later."""
    model = net()
    optimizer = sgd(model)
    boards = torch.zeros(6 * samples, 4)
    for _ in range(4):
        model.eval()
        with torch.no_grad():
            for board in DataLoader(boards, batch_size=samples) if has_loader else boards.split(samples):
                model(board)

        model.train()
        for _ in range(5):
            train(model, optimizer, X)

    assert len(traced.finish()) == 20
    assert len(traced.table("evals")) >= 3
    assert ("plays" in {row["kind"] for row in traced.info}) is reported


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_without_gradients_is_reported(traced: Traced, mode: Callable[[], Any], averaged: bool) -> None:
    """Advice to turn gradients off is of no use to a script that does, be it for averaged weights."""
    model = net()
    evaluated = copy.deepcopy(model) if averaged else model
    optimizer = sgd(model)
    for _ in range(3):
        for x in DataLoader(X, batch_size=4):
            train(model, optimizer, x)

        evaluated.eval()
        with mode():
            for x in DataLoader(X, batch_size=8):
                evaluated(x)

        evaluated.train()

    traced.finish()
    reported = [row for row in traced.info if row["kind"] == "plain_evaluation"]
    assert len(reported) == (mode is not torch.enable_grad)


def forces(model: nn.Module, x: torch.Tensor) -> None:
    torch.autograd.grad(model(x.clone().requires_grad_()).sum(), [*model.parameters()][:1], create_graph=True)


def maps(model: nn.Module, x: torch.Tensor) -> None:
    model(x).sum().backward()


def calls(model: nn.Module, x: torch.Tensor) -> None:
    model(x)


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("uses", [forces, maps, calls])
def test_gradients_in_an_evaluation_are_reported(
    traced: Traced, uses: Callable[[nn.Module, torch.Tensor], None], loads: bool
) -> None:
    """It needs them, so nobody is told to turn them off."""
    model = net()
    optimizer = sgd(model)
    loader = DataLoader(X, batch_size=4)
    for _ in range(3):
        model.train()
        for x in loader:
            train(model, optimizer, x)

        model.eval()
        for x in DataLoader(X, batch_size=8) if loads else [X]:
            uses(model, x)

    traced.finish()
    reported = [row for row in traced.info if row["kind"] == "evaluates_gradients"]
    assert len(reported) == (uses is not calls)
    assert traced.table("evals")


def test_rollouts_of_a_simulator(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stable-baselines3 does it, whose policies act in `eval()`."""
    monkeypatch.setitem(sys.modules, "gymnasium", ModuleType("gymnasium"))
    policy = net()
    optimizer = sgd(policy)
    for _ in range(5):
        evaluate(policy)
        for _ in range(4):
            train(policy, optimizer, X)

    rows = traced.finish()
    assert len(rows) == 20
    assert traced.table("evals") == []
    assert sum(row["other_ns"] >= CALLS * 1_000_000 for row in rows) >= 4


def collecting(policy: nn.Module, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Call a policy in `eval()`; return what it saw, or what is given, in another order."""
    policy.eval()
    with torch.no_grad():
        found = [torch.randn(2, 4) if seen is None else seen[:2] for _ in range(CALLS)]
        for observation in found:
            policy(observation)

    policy.train()
    return torch.cat(found).flip(0) if seen is None else seen


def test_rollouts_of_a_simulator_of_the_script(traced: Traced) -> None:
    """What the policy has seen is trained on: after three of them it is known."""
    policy = net()
    optimizer = sgd(policy)
    for _ in range(8):
        observations = collecting(policy)
        for _ in range(4):
            train(policy, optimizer, observations)

    assert len(traced.finish()) == 32
    assert [row["step"] for row in traced.table("evals") if row["step"]] == [4, 8]  # the first may be a trial


def test_rollouts_in_training_mode_after_an_epoch(traced: Traced) -> None:
    """Each epoch trains on what the policy has seen before it: after three of them it is known."""
    policy, seen = net(), torch.empty(6, 4)
    optimizer, loader = sgd(policy), DataLoader(seen, batch_size=3)
    for _ in range(8):
        seen.normal_()
        with torch.no_grad():
            for observation in seen.split(2):
                policy(observation)

        for x in loader:
            train(policy, optimizer, x)

    assert len(traced.finish()) == 16
    assert max(row["step"] for row in traced.table("evals")) <= 6


def test_evaluation_on_training_data_is_no_rollout(traced: Traced) -> None:
    """A part of the data on which the model is trained, the same each time."""
    model = net()
    optimizer = sgd(model)
    samples = torch.randn(8, 4)
    for _ in range(8):
        collecting(model, samples)
        for _ in range(4):
            train(model, optimizer, samples)

    assert len(traced.finish()) == 32
    assert [row["step"] for row in traced.table("evals") if row["step"]] == list(range(4, 32, 4))


def test_pseudo_labels_on_each_batch(traced: Traced) -> None:
    """Calls in `eval()` in each step become a part of the step."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(20):
        model.eval()
        with torch.no_grad():
            target = model(x)

        model.train()
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()

    assert len(traced.finish()) == 20
    assert len(traced.table("evals")) <= 3


@pytest.mark.parametrize(("optimizers", "evaluates"), [(1, True), (2, False)])
def test_evaluation_after_each_step(traced: Traced, optimizers: int, *, evaluates: bool) -> None:
    """What is called after the step on each batch is evaluation, unless another optimizer follows and learns of it."""
    model, critic = net(), net()
    first, second = sgd(critic), sgd(model)
    for (x,) in data(20):
        if optimizers == 2:
            train(critic, first, x)
        else:
            train(model, second, x)

        model.eval()
        with torch.no_grad():
            target = model(x)

        model.train()
        if optimizers == 2:
            second.zero_grad()
            (model(x) - target).square().mean().backward()
            second.step()

    assert len(traced.finish()) == 20
    assert (len(traced.table("evals")) >= 19) is evaluates
    assert evaluates or len(traced.table("evals")) <= 5


def on_batches(model: nn.Module, batches: int) -> None:
    model.eval()
    with torch.no_grad():
        for index, (x,) in enumerate(data(5)):
            model(x)
            if index + 1 == batches:
                break

    model.train()


@pytest.mark.parametrize(
    "evaluates", [evaluate, lambda model: on_batches(model, 4), lambda model: on_batches(model, 9)]
)
def test_what_a_script_does_at_its_end_is_no_evaluation(
    traced: Traced, evaluates: Callable[[nn.Module], None], tmp_path: object
) -> None:
    """Plots, exports, workers that end: no later batch tells when the last evaluation ended."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(5):
        train(model, optimizer, x)

    began = monotonic_ns()
    evaluates(model)
    ended = monotonic_ns()
    torch.save(model.state_dict(), f"{tmp_path}/model.pt")
    saved = monotonic_ns()
    time.sleep(20 * (ended - began) / 1e9)

    assert len(traced.finish()) == 5
    (row,) = traced.table("evals")
    assert 0 < row["ns"] < 3 * (ended - began)
    assert row["t_end_ns"] < saved + 3 * (ended - began)


@pytest.mark.parametrize("batches", [lambda: (x for (x,) in data(5)), ahead, lambda: [X] * CALLS])
def test_usual_work_after_an_evaluation_is_part_of_it(
    traced: Traced, batches: Callable[[], Iterable[torch.Tensor]]
) -> None:
    """Metrics of all batches, as after the evaluation before it."""
    model = net()
    optimizer = sgd(model)
    for _ in range(2):
        model.train()
        for (x,) in data(5):
            train(model, optimizer, x)

        model.eval()
        with torch.no_grad():
            for x in batches():
                model(x)

        time.sleep(0.02)

    traced.finish()
    assert [row["ns"] >= 20_000_000 for row in traced.table("evals")] == [True, True]
