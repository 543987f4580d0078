"""Advice on what torch raises for usual mistakes: the messages are those of the installed torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from traceml.diagnosis.deaths.end_advice import for_exit
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.recorder.exits import describe


def label() -> None:
    nn.functional.cross_entropy(torch.randn(2, 3), torch.tensor([0, 3]))


def token() -> None:
    nn.Embedding(3, 2)(torch.tensor([3]))


def graph_twice() -> None:
    loss = torch.ones(1, requires_grad=True).exp().sum()
    loss.backward()
    loss.backward()


def changed_in_place() -> None:
    x = torch.ones(1, requires_grad=True).exp()
    y = x.exp().sum() + x.square().sum()
    x += 1
    y.backward()


def no_gradient() -> None:
    torch.ones(1).sum().backward()


def sizes_of_samples() -> None:
    default_collate([torch.ones(2), torch.ones(3)])


def pickled() -> None:
    import pickle

    pickle.dumps(lambda: None)


def other_model() -> None:
    nn.Linear(2, 3).load_state_dict(nn.Linear(3, 2).state_dict())


def dtypes() -> None:
    nn.Linear(2, 3)(torch.ones(1, 2, dtype=torch.float64))


def to_numpy() -> None:
    torch.ones(1, requires_grad=True).numpy()


def no_module() -> None:
    import a_module_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401


def debugger() -> None:
    import bdb

    raise bdb.BdbQuit


def features() -> None:
    nn.Linear(256, 10)(torch.ones(64, 512))


def one_sample() -> None:
    nn.BatchNorm1d(3)(torch.ones(1, 3))


def relative_path() -> None:
    Path("data/train.bin").read_text()


def end_of(script: Callable[[], None], **facts: object) -> RankExit:
    """Return the end of a rank by what a function raises."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - of several kinds
        script()

    facts_of_it = describe(raised.value)
    exception = f"{facts_of_it['exception']}: {facts_of_it['message']}"
    return RankExit(rank=0, state="failed", exception=exception, file="a.py", line=3, function="train", **facts)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (label, "A label is 3"),
        (token, "resize_token_embeddings"),
        (graph_twice, "detach() what is kept from step to step"),
        (changed_in_place, "set_detect_anomaly(True)"),
        (no_gradient, "its parameters are frozen"),
        (other_model, "The checkpoint is of another model"),
        (dtypes, "Convert one of the tensors"),
        (to_numpy, ".detach().cpu().numpy()"),
        (debugger, "PYTHONBREAKPOINT=0"),
        (no_module, "Install it for the Python that runs the ranks"),
        (features, "The left matrix has 512 columns, the right one 256 rows"),
        (relative_path, "data/train.bin is a relative path"),
        (lambda: Path("/missing/train.bin").read_text(), "Read a.py:3 train; the full traceback"),
    ],
)
def test_a_usual_mistake_has_its_advice(script: Callable[[], None], words: str) -> None:
    assert words in for_exit(end_of(script), JobFacts())


@pytest.mark.parametrize(("script", "words"), [(sizes_of_samples, "differ in size"), (pickled, "gets the data set by")])
def test_what_is_wrong_with_samples_is_told_of_the_loader_alone(script: Callable[[], None], words: str) -> None:
    assert words in for_exit(end_of(script, open_phase="input_wait"), JobFacts())
    assert words not in for_exit(end_of(script), JobFacts())


@pytest.mark.parametrize(
    ("samples", "world_size", "is_last"),
    [(20, 1, True), (64, 1, False), (30, 1, False), (10, 2, True), (None, 1, False)],
)
def test_a_smaller_last_batch_is_named_where_sizes_differ(samples: int | None, world_size: int, is_last: bool) -> None:
    """Of 6,420 samples the last batch has 20; two ranks have 3,210 each."""
    facts = JobFacts(world_size=world_size, loader=LoaderFacts(length=6420, batch_size=64))

    told = for_exit(end_of(lambda: torch.ones(20, 10) + torch.ones(64, 10), samples=samples), facts)

    assert (f"had {samples} samples in place of 64" in told) is is_last
    assert "drop_last=True" in told or not is_last


def test_a_last_batch_of_one_sample_has_no_statistics() -> None:
    facts = JobFacts(world_size=1, loader=LoaderFacts(length=129, batch_size=64))

    told = for_exit(end_of(one_sample, samples=1), facts)

    assert told == "The last batch of the epoch had 1 sample in place of 64: pass drop_last=True to the loader."
