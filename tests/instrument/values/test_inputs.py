"""Sizes of batches: samples and elements of each step, and fingerprints by which equal batches are found."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net, sgd
from traceml.database.info_kinds import InfoKind
from traceml.instrument.values.inputs import fingerprint_of


class Named(nn.Module):
    """A model that takes its input by name, as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(50, 4)

    def forward(self, attention_mask: Any = None, input_ids: Any = None) -> Any:
        return self.inner(input_ids).mean()


def sizes(traced: Traced) -> list[tuple[int, int]]:
    return [(row["samples"], row["elements"]) for row in traced.finish()]


def test_batches_of_any_length(traced: Traced) -> None:
    """Each step has the size of its own batch."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for (x,) in DataLoader(TensorDataset(torch.randn(11, 4)), batch_size=4):
        model(x).sum().backward()
        optimizer.step()

    assert sizes(traced) == [(4, 16), (4, 16), (3, 12)]


def test_the_largest_batch_is_reported(traced: Traced) -> None:
    """What a loader worker would take to hand it over: of some batches, the largest; the last is a small one."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in DataLoader(TensorDataset(torch.randn(7, 4), torch.randn(7)), batch_size=4):
        model(x).sum().add(y.sum()).backward()
        optimizer.step()

    assert [(row["tensors"], row["bytes"]) for row in traced.info if row["kind"] == InfoKind.BATCH] == [(2, 4 * 5 * 4)]


def test_micro_batches_are_added(traced: Traced) -> None:
    """With gradient accumulation a step has the samples of all its batches."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, (x,) in enumerate(DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=2)):
        model(x).sum().backward()
        if index % 3 == 2:
            optimizer.step()

    assert sizes(traced) == [(6, 24), (6, 24)]


def test_evaluation_does_not_count(traced: Traced) -> None:
    """Batches without a backward pass add nothing."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for (x,) in DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4):
            model(x).sum().backward()
            optimizer.step()

        with torch.no_grad():
            for (x,) in DataLoader(TensorDataset(torch.randn(9, 4)), batch_size=3):
                model(x)

    assert sizes(traced) == [(4, 16)] * 4


def test_rollouts_do_not_count(traced: Traced) -> None:
    """A policy that is called with one state is trained on sixteen, by its parts: only these have the size."""

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

        def evaluate_actions(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    policy = Policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(5):
        with torch.no_grad():
            for _ in range(3):
                policy(torch.randn(1, 4))

        policy.evaluate_actions(torch.randn(16, 4)).sum().backward()
        optimizer.step()

    samples = [row for row, _ in sizes(traced)]
    assert samples == [0] + [16] * 4


def test_a_call_without_gradients_changes_no_size(traced: Traced) -> None:
    """A larger batch of evaluation, before a batch of the usual size and one of its own."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size in (4, 4, 8, 4):
        with torch.no_grad():
            model(torch.randn(8, 4))
            model(torch.randn(2, 4))

        model(torch.randn(size, 4)).sum().backward()
        optimizer.step()

    assert [row for row, _ in sizes(traced)] == [4, 4, 8, 4]


def test_two_models_on_one_batch_count_once(traced: Traced) -> None:
    """Discriminator and generator of a GAN train on the same samples."""
    one, two = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (one, two)]
    for (x,) in DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4):
        for optimizer in optimizers:
            two(one(x)).sum().backward()
            optimizer.step()

    assert [samples for samples, _ in sizes(traced)] == [4] * 6


def test_optimizers_on_one_sample_of_a_memory_count_once(traced: Traced) -> None:
    """cleanrl's soft actor-critic draws 8 rows for critic, actor and temperature: they were told to be 24 a step."""
    critic, actor, temperature = nn.Linear(4, 1), nn.Linear(4, 4), nn.Parameter(torch.zeros(1))
    parts = (critic.parameters(), actor.parameters(), [temperature])
    optimizers = [torch.optim.SGD(parameters, lr=0.1) for parameters in parts]
    losses = (lambda x: critic(x).sum(), lambda x: critic(actor(x)).sum(), lambda x: (temperature * x.sum()).sum())
    for _ in range(6):
        x = torch.randn(8, 4)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()

    assert sizes(traced) == [(8, 32)] * 6


def test_input_by_name(traced: Traced) -> None:
    """A model that is called with keywords is measured by its `input_ids`, which are tokens."""
    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(attention_mask=torch.ones(1, 1), input_ids=torch.randint(50, (2, 7))).backward()
        optimizer.step()

    assert sizes(traced) == [(2, 14)] * 3
    assert [info["tokens"] for info in traced.info if info["kind"] == "input"] == [True]


@dataclass(slots=True)
class Series:
    """A batch as a library of time series gives it to its model."""

    past: torch.Tensor
    stage: str = "train"


def test_input_in_a_dataclass(traced: Traced) -> None:
    """Its first tensor is the batch; a class is none, nor is one without tensors."""
    inner = nn.Linear(4, 1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: Any, *_: Any) -> torch.Tensor:
            return self.inner(batch.past if isinstance(batch, Series) else torch.ones(3, 4)).sum()

    model, optimizer = Model(), torch.optim.SGD(inner.parameters(), lr=0.1)
    for args in ((Series(torch.randn(5, 4)),), (Series,), ({"options": Series("none")}, torch.randn(2, 4))):
        model(*args).backward()
        optimizer.step()

    assert sizes(traced) == [(5, 20), (0, 0), (2, 8)]


class Compared(nn.Module):
    """A loss that calls its model for each text of a pair, as of sentence-transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.EmbeddingBag(50, 4)

    def forward(self, texts: list[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        one, other = (self.model(each["input_ids"]) for each in texts)
        return ((one * other).sum(1) - labels).pow(2).mean()


@pytest.mark.parametrize("by_name", [False, True])
def test_texts_that_are_compared_are_all_tokens(traced: Traced, *, by_name: bool) -> None:
    """A pair is one sample; only the first text's tokens were counted."""
    model = Compared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        texts = [{"attention_mask": torch.ones(2, n), "input_ids": torch.randint(50, (2, n))} for n in (7, 9)]
        labels = torch.zeros(2)
        (model(texts=texts, labels=labels) if by_name else model(texts, labels)).backward()
        optimizer.step()

    assert sizes(traced) == [(2, 32)] * 3


def test_targets_in_a_list_are_no_texts(traced: Traced) -> None:
    """Boxes of a detection are not the samples; the images are."""

    class Detector(nn.Linear):
        def forward(self, images: torch.Tensor, targets: list[dict[str, torch.Tensor]]) -> torch.Tensor:
            return super().forward(images).sum() + sum(each["boxes"].sum() for each in targets)

    model = Detector(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(3, 4), [{"boxes": torch.ones(5, 4), "input_ids": torch.ones(3, 9)}]).backward()
        optimizer.step()

    assert sizes(traced) == [(3, 12)] * 2


class Table(nn.Module):
    """A model for a table with columns of integers: as numbers, or looked up in an embedding for each column."""

    def __init__(self, columns: int, *, looks_up: bool) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(9, 1) for _ in range(columns if looks_up else 0))
        self.out = nn.Linear(columns, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = [each(x[:, n]).squeeze(1) for n, each in enumerate(self.embeddings)]
        return self.out(torch.stack(columns, 1) if columns else x.float()).mean()


@pytest.mark.parametrize(
    ("make", "are_tokens"),
    [
        (lambda: Table(6, looks_up=False), False),
        (lambda: Table(6, looks_up=True), False),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 1)), True),
    ],
)
def test_columns_of_a_table_are_no_tokens(traced: Traced, make: Callable[[], nn.Module], are_tokens: bool) -> None:
    """Integers are tokens where one embedding looks all of them up."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randint(9, (5, 6))).mean().backward()
        optimizer.step()

    assert sizes(traced) == [(5, 30)] * 2
    assert [info["tokens"] for info in traced.info if info["kind"] == "input"] == [are_tokens]


class Sequences(nn.Module):
    """A recurrent model, called with positions first or with samples first."""

    def __init__(self, *, batch_first: bool, transposes: bool = False) -> None:
        super().__init__()
        self.embedding, self.transposes = nn.Embedding(9, 4), transposes
        self.rnn = nn.LSTM(4, 4, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.embedding(x.t() if self.transposes else x))[0].mean()


@pytest.mark.parametrize(
    ("make", "has_loader", "counts"),
    [
        (lambda: Sequences(batch_first=False), False, False),
        (lambda: Sequences(batch_first=True), False, True),
        (lambda: Sequences(batch_first=False, transposes=True), True, True),
        (lambda: Table(6, looks_up=True), False, True),
    ],
)
def test_positions_are_no_samples(
    traced: Traced, make: Callable[[], nn.Module], *, has_loader: bool, counts: bool
) -> None:
    """The first dimension may count positions where a module takes these first, unless the loader has made it."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = torch.randint(9, (10, 6))
    for x in DataLoader(batches, batch_size=5) if has_loader else batches.split(5):
        model(x).backward()
        optimizer.step()

    assert sizes(traced) == [(5, 30)] * 2
    (info,) = (each for each in traced.info if each["kind"] == "input")
    assert (info["batch_first"], info["requires_grad"]) == (counts, False)


class Listed(nn.Module):
    """A model that is called with a list of tensors, as those that detect objects in images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.layer(each).flatten() for each in tensors]).mean()


@pytest.mark.parametrize(
    ("collate", "counts"),
    [(list, False), (lambda images: [torch.stack(images), torch.stack(images)], True)],
    ids=["images", "views"],
)
def test_colors_of_an_image_are_no_samples(
    traced: Traced, collate: Callable[[list[torch.Tensor]], list[torch.Tensor]], *, counts: bool
) -> None:
    """A list is of the samples, or of views that are batches: the loader's batch size tells which."""
    model = Listed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images: Any = [torch.randn(3, 5, 4)] * 4
    for batch in DataLoader(images, batch_size=2, collate_fn=collate):
        model(batch).backward()
        optimizer.step()

    assert counted(traced)[1] is counts


def test_what_an_encoder_has_made_is_no_batch(traced: Traced) -> None:
    """The decoder of a translation gets 6 * 4 numbers for each text of 6 tokens: they were told to be tokens."""
    encoder, decoder = nn.Sequential(nn.Embedding(9, 4)), nn.Linear(4, 9)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (encoder, decoder)]
    for texts in torch.randint(9, (30, 6)).split(5):
        decoder(encoder(texts)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    assert sizes(traced) == [(5, 30)] * 6
    assert counted(traced) == (True, True)


def counted(traced: Traced) -> tuple[bool, bool]:
    """Return whether the newest facts say that tokens and samples are counted."""
    facts = [info for info in traced.info if info["kind"] == "input"][-1]
    return facts["tokens"], facts["batch_first"]


def chunks(model: nn.Module) -> torch.Tensor:
    """Rays of an image, as many as fit into memory at a time."""
    return torch.cat([model(part) for part in torch.randint(9, (13, 6)).split(4)]).mean()


def states(model: nn.Module) -> torch.Tensor:
    """An episode of a game, one state after another, as of REINFORCE."""
    return torch.stack([model(torch.randint(9, (1, 6))).mean() for _ in range(9)]).mean()


def points(model: nn.Module) -> torch.Tensor:
    """The boundary of a field, and more points inside."""
    return model(torch.randint(9, (3, 6))).mean() + model(torch.randint(9, (8, 6))).mean()


def views(model: nn.Module) -> torch.Tensor:
    """Two views of each sample."""
    batch = torch.randint(9, (5, 6))
    return (model(batch) - model(batch.flip(1))).mean()


def positions(model: nn.Module) -> torch.Tensor:
    """One position after another of the loader's five samples."""
    return torch.stack([model(torch.randint(9, (5, 1))).mean() for _ in range(6)]).mean()


def whole(model: nn.Module) -> torch.Tensor:
    """All of the batch at once."""
    return model(torch.randint(9, (5, 6))).mean()


@pytest.mark.parametrize("has_loader", [True, False])
@pytest.mark.parametrize(
    ("loss_of", "tokens", "samples", "samples_of_loader"),
    [
        (whole, True, True, True),
        (views, False, True, True),
        (positions, False, False, True),
        (points, False, False, False),
        (chunks, False, False, False),
        (states, False, False, False),
    ],
)
def test_parts_of_a_batch_are_not_counted(
    traced: Traced,
    loss_of: Callable[[nn.Module], torch.Tensor],
    *,
    tokens: bool,
    samples: bool,
    samples_of_loader: bool,
    has_loader: bool,
) -> None:
    """Before the training the model is called once to see its output, which does not count."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randint(9, (2, 6)))
    for _ in DataLoader(torch.zeros(30), batch_size=5) if has_loader else range(6):
        loss_of(model).backward()
        optimizer.step()

    traced.finish()
    assert counted(traced) == (tokens, samples_of_loader if has_loader else samples)


@pytest.mark.parametrize("critic_steps", [1, 5])
def test_networks_of_a_gan_are_called_with_the_same_samples(traced: Traced, critic_steps: int) -> None:
    """A critic sees real, false and mixed samples, as many of each."""
    maker, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (maker, critic)]
    for step in range(12):
        real, noise = torch.randn(8, 4), torch.randn(8, 4)
        false = maker(noise).detach()
        (critic(real) - critic(false) + critic((real + false) / 2)).mean().backward()
        optimizers[1].step()
        if step % critic_steps == 0:
            critic(maker(noise)).mean().backward()
            optimizers[0].step()

    traced.finish()
    assert counted(traced) == (False, True)


class Weighted(nn.Linear):
    """A model that is called with a batch as one object, or with a time and a state."""

    def forward(self, batch: Any, x: Any = None) -> torch.Tensor:
        return super().forward(batch["data"]["x"] if x is None else x)


@pytest.mark.parametrize("is_nested", [True, False])
def test_weights_and_times_before_the_batch_are_not_its_size(traced: Traced, *, is_nested: bool) -> None:
    """A vector of numbers, or one number, came first: the batch had no size."""
    model = Weighted(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(5, 4)
        nested = {"weight": torch.rand(5), "data": {"x": x}}
        (model(nested) if is_nested else model(torch.tensor(0.5), x)).mean().backward()
        optimizer.step()

    assert sizes(traced) == [(5, 20)] * 3


def test_nodes_of_graphs_are_no_samples(traced: Traced) -> None:
    """The model gets all nodes of the loader's two graphs, 14 rows."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graphs: Any = [torch.randn(7, 4)] * 8
    for nodes in DataLoader(graphs, batch_size=2, collate_fn=torch.cat):
        model(nodes).mean().backward()
        optimizer.step()

    traced.finish()
    assert counted(traced) == (False, False)


@pytest.mark.parametrize(("parts", "samples"), [([8, 8, 8, 8], 32), ([12, 12, 8], 32), ([8, 8], 8), ([32, 32], 32)])
def test_parts_of_a_batch_are_added(traced: Traced, parts: list[int], samples: int) -> None:
    """Each part has its backward pass: 8 of 32 samples were counted. Passes on other samples do not make it larger."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in DataLoader(torch.randn(32 * 20, 4), batch_size=32):
        at = 0
        for count in parts:
            model(batch[at : at + count] if at + count <= 32 else batch).mean().backward()
            at += count

        optimizer.step()

    traced.finish()
    assert [size for size, _ in sizes(traced)][-10:] == [samples] * 10
    assert counted(traced)[1]


def test_a_pass_without_a_call_adds_no_part(traced: Traced) -> None:
    """GradCache computes all representations without gradients, and the loss of these, before the parts."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in DataLoader(torch.randn(32 * 20, 4), batch_size=32):
        with torch.no_grad():
            found = torch.cat([model(part) for part in batch.split(8)])

        found.requires_grad_().square().mean().backward()
        for part in batch.split(8):
            model(part).mean().backward()

        optimizer.step()

    traced.finish()
    assert [size for size, _ in sizes(traced)][-10:] == [32] * 10


@pytest.mark.parametrize(("inner", "counts"), [(20, False), (30, True)])
@pytest.mark.parametrize("has_loader", [True, False])
def test_passes_of_an_inner_loop_are_on_other_samples(
    traced: Traced, *, has_loader: bool, inner: int, counts: bool
) -> None:
    """Five passes on 20 samples and one on 30 were 43 of two batches; as many on the same are one batch."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    support, query = (DataLoader(torch.randn(6 * n, 4), batch_size=n) for n in (inner, 30))
    ready = [torch.randn(n, 4) for n in (inner, 30)]
    for few, many in zip(support, query, strict=True) if has_loader else [ready] * 6:
        for _ in range(5):
            torch.autograd.grad(model(few).mean(), list(model.parameters()))

        model(many).mean().backward()
        optimizer.step()

    traced.finish()
    assert counted(traced)[1] is counts


def test_batches_of_any_number_of_samples_are_counted(traced: Traced) -> None:
    """Batches that are filled up to a number of tokens have other samples in each step, and in each micro-batch."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for samples in range(3, 15):
        model(torch.randn(samples, 4)).mean().backward()
        optimizer.step()

    traced.finish()
    assert counted(traced) == (False, True)


def test_an_ensemble_has_the_samples_of_all_its_models(traced: Traced) -> None:
    """Three models under `vmap`, each with five samples of its own."""
    from torch.func import functional_call, stack_module_state, vmap

    models = [nn.Linear(4, 1) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.1)
    for _ in range(3):
        predict = vmap(lambda weights, others, x: functional_call(models[0], (weights, others), (x,)))
        predict(parameters, buffers, torch.randn(3, 5, 4)).mean().backward()
        optimizer.step()

    assert sizes(traced) == [(15, 60)] * 3


def test_gradients_of_each_sample_are_of_all_samples_of_the_batch(traced: Traced) -> None:
    """`vmap` of `grad`, as for private training; gradients inside another gradient are a part of the step."""
    from torch.func import functional_call, grad, vmap

    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    of_each = vmap(grad(lambda weights, x: functional_call(model, weights, (x[None],)).mean()), in_dims=(None, 0))
    for _ in range(3):
        gradients = of_each({name: each.detach() for name, each in model.named_parameters()}, torch.randn(6, 4))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].mean(0)

        optimizer.step()

    assert sizes(traced) == [(6, 24)] * 3


def test_fingerprints_are_of_the_first_batches_of_an_epoch(traced: Traced) -> None:
    """The first three batches that are trained on have a fingerprint; of evaluation there is none."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(80, 4))
    seen = []
    for _ in range(2):
        for (x,) in DataLoader(data, batch_size=8):
            seen.append(fingerprint_of(x))
            model(x).sum().backward()
            optimizer.step()

    traced.finish()
    found = {row["step"]: row["fingerprint"] for row in traced.table("fingerprints")}
    assert found == {step: seen[step] for step in (0, 1, 2, 10, 11, 12)}


def test_fingerprints_of_batches_that_prove_to_be_steps(traced: Traced) -> None:
    """The optimizer that is alive never steps: the rows of the first 64 batches are written together."""
    model = nn.Linear(4, 1)
    idle = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(640, 4)
    for (x,) in DataLoader(TensorDataset(data), batch_size=8):
        model(x).sum().backward()
        idle.zero_grad()

    assert len(traced.finish()) == 80
    found = [(row["step"], row["fingerprint"]) for row in traced.table("fingerprints")]
    assert found[0] == (0, fingerprint_of(data[:8]))
    assert len({fingerprint for _, fingerprint in found}) == len(found)


def test_fingerprints_are_few(traced: Traced) -> None:
    """Many short epochs have no more than one fingerprint in 192 steps, beyond the first ones."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(32, 4))
    for _ in range(100):
        for (x,) in DataLoader(data, batch_size=8):
            model(x).sum().backward()
            optimizer.step()

    assert len(traced.finish()) == 400
    assert 6 <= len(traced.table("fingerprints")) <= 6 + 3 + 400 // 192


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(100),
        torch.eye(10),
        torch.randn(3),
        torch.empty(40, device="meta"),
        torch.randn(40, 2)[:, 0],
        "text",
        None,
    ],
)
def test_batches_without_fingerprint(tensor: Any) -> None:
    """A batch of equal numbers, a small one, or one that is not on the CPU has none."""
    assert fingerprint_of(tensor) == 0


class Operators(TorchDispatchMode):
    """Counts the operators that a script runs, as estimators of memory and time do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_script_that_counts_operators_sees_its_own(traced: Traced) -> None:
    """Neither batches nor the samples of rollouts are read where each operator is seen."""
    model = net()
    optimizer = sgd(model)
    with Operators() as operators:
        for (x,) in data(3):
            with torch.no_grad():
                model(x[:1])

            model(x).sum().backward()
            optimizer.step()

    assert "addmm" in operators.seen
    assert operators.seen.isdisjoint(("clone", "eq", "unbind"))
    assert len(traced.finish()) == 3


def test_fingerprints_tell_batches_apart() -> None:
    """Equal batches have equal fingerprints."""
    x = torch.randn(8, 5)
    assert fingerprint_of(x) == fingerprint_of(x.clone()) != fingerprint_of(x + 1)


def test_labels_tell_batches_of_made_up_inputs_apart(traced: Traced) -> None:
    """A data set that draws its inputs, with one seed on all ranks, gives equal ones with labels of other samples."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, labels = torch.randn(8, 4), torch.arange(8)
    for batch in DataLoader([(inputs, labels), (inputs, labels), (inputs, labels + 8)], batch_size=None):
        model(batch[0]).sum().backward()
        optimizer.step()

    traced.finish()
    first, equal, other = (row["fingerprint"] for row in traced.table("fingerprints"))
    assert first == equal != other
    assert fingerprint_of(inputs, {"y": labels}.values()) == first != fingerprint_of(inputs)


def test_a_batch_of_as_many_elements_has_its_own_samples(traced: Traced) -> None:
    """As where a batch has as many tokens, in sequences of another length."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for shape in ((4, 8, 1), (8, 4, 1), (4, 2, 4, 1), (4, 1, 1)):
        for _ in range(2):
            model(torch.ones(shape)).sum().backward()
            optimizer.step()

    assert sizes(traced) == [(4, 32)] * 2 + [(8, 32)] * 2 + [(4, 32)] * 2 + [(4, 4)] * 2


class Padding(nn.Module):
    """Takes sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        return self.linear(sequences.to_padded_tensor(0.0) if sequences.is_nested else sequences)


def test_nested_tensors_have_no_size(traced: Traced) -> None:
    """Torch raises when it is asked for the shape of one; the steps are timed as before."""
    model = Padding()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(5, 2)])

    for batch in (nested, torch.ones(4, 2), nested, nested, torch.ones(4, 2)):
        model(batch).sum().backward()
        optimizer.step()

    assert sizes(traced) == [(0, 0), (4, 8), (0, 0), (0, 0), (4, 8)]


def test_vectors_of_numbers_have_no_size(traced: Traced) -> None:
    """A state of four numbers, as of a game, is not four samples; eight token numbers may be."""
    model, words = nn.Linear(4, 1), nn.Embedding(8, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *words.parameters()], lr=0.1)
    for loss_of in (lambda: model(torch.ones(4)), lambda: words(torch.arange(8)), lambda: model(torch.ones(3, 4))):
        loss_of().sum().backward()
        optimizer.step()

    assert sizes(traced) == [(0, 0), (8, 8), (3, 12)]


def one_by_one(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield torch.stack([model(x[index : index + 1]).mean() for index in range(len(x))]).sum()


def as_vectors(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield torch.stack([model(each).mean() for each in x]).sum()


def with_a_backward_pass_each(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    return (model(x[index : index + 1]).mean() for index in range(len(x)))


def at_once(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield model(x).mean()


def in_halves(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield sum((model(half).mean() for half in x.chunk(2)), torch.zeros(()))


def of_different_sizes(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield torch.stack([model(each.expand(1, index + 1, -1)).mean() for index, each in enumerate(x)]).sum()


def step_by_step(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """As a recurrent network reads a sequence of another length than the batch."""
    state = x[:1]
    for _ in range(len(x) + 1):
        state = model(state).expand_as(state)

    yield state.mean()


def mapped(model: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield torch.func.vmap(lambda each: model(each).mean())(x).sum()


@pytest.mark.parametrize(
    ("losses", "calls"),
    [
        (one_by_one, [4]),
        (as_vectors, [4]),
        (with_a_backward_pass_each, [4]),
        (at_once, []),
        (in_halves, []),
        (of_different_sizes, []),
        (step_by_step, []),
        (mapped, []),
    ],
)
def test_calls_with_single_samples_are_reported(
    traced: Traced, losses: Callable[[nn.Module, torch.Tensor], Iterator[torch.Tensor]], calls: list[int]
) -> None:
    """As many as the loader's batch has samples, of one size."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(20, 4):
        optimizer.zero_grad()
        for loss in losses(model, x):
            loss.backward()

        optimizer.step()

    traced.finish()
    assert [row["calls"] for row in traced.info if row["kind"] == "single_calls"] == calls


class Precise(nn.Module):
    """A model that turns autocast on inside its call, as Fabric's wrapper does."""

    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self.inner, self.enabled = net(), enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.inner(x)


def inside(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def around(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def beside_evaluation(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)

    return model(x)


def beside_another_thread(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    thread = Thread(target=around, args=(copy.deepcopy(model), x))
    thread.start()
    thread.join()
    return model(x)


@pytest.mark.parametrize(
    ("enabled", "call", "reported"),
    [
        (True, inside, True),
        (False, around, True),
        (False, inside, False),
        (False, beside_evaluation, False),
        (False, beside_another_thread, False),
    ],
)
def test_autocast_inside_the_model_is_reported(
    traced: Traced, enabled: bool, call: Callable[[nn.Module, torch.Tensor], torch.Tensor], reported: bool
) -> None:
    """Libraries turn it on around `forward`; in evaluation, or on another thread, it is none of the training's."""
    model = Precise(enabled=enabled)
    optimizer = sgd(model)
    for (x,) in data(6):
        call(model, x).square().mean().backward()
        optimizer.step()

    traced.finish()
    rows = [row for row in traced.info if row["kind"] == InfoKind.INPUT]
    assert rows[-1]["autocast"] is reported


def test_autocast_in_compiled_code_is_reported(traced: Traced) -> None:
    """It is entered when the code is traced, without a break of the graph."""
    torch._dynamo.reset()  # of the other form's hooks
    model = Precise(enabled=True)
    optimizer = sgd(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for (x,) in data(6):
        compiled(x).square().mean().backward()
        optimizer.step()

    traced.finish()
    assert [row for row in traced.info if row["kind"] == InfoKind.INPUT][-1]["autocast"]
