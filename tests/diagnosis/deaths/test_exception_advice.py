"""Advice on what torch raises for usual mistakes: the messages are those of the installed torch."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

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


def missing_sample() -> None:
    default_collate([None, None])


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


def classes_of_two_dimensions() -> None:
    nn.functional.cross_entropy(torch.zeros(4, 3), torch.zeros(4, 1).long())


def classes_as_floats() -> None:
    nn.functional.cross_entropy(torch.zeros(4, 3), torch.zeros(4))


def classes_as_one_hot() -> None:
    nn.functional.cross_entropy(torch.zeros(4, 3), torch.zeros(4, 3).long())


def binary_shapes() -> None:
    nn.functional.binary_cross_entropy_with_logits(torch.zeros(4, 1), torch.zeros(4))


def binary_types() -> None:
    nn.functional.binary_cross_entropy_with_logits(torch.zeros(4, requires_grad=True), torch.zeros(4).long())


def no_probability() -> None:
    nn.functional.binary_cross_entropy(torch.tensor([2.0]), torch.ones(1))


def float_tokens() -> None:
    nn.Embedding(3, 2)(torch.zeros(2))


def channels_last() -> None:
    nn.Conv2d(3, 4, 3)(torch.zeros(1, 8, 8, 3))


def double_images() -> None:
    nn.Conv2d(3, 4, 3)(torch.zeros(1, 3, 8, 8, dtype=torch.float64))


def small_image() -> None:
    nn.MaxPool2d(4)(torch.zeros(1, 3, 2, 2))


def smaller_than_its_kernel() -> None:
    nn.Conv2d(3, 4, 7)(torch.zeros(1, 3, 4, 4))


def empty_data_set() -> None:
    DataLoader([], 4, shuffle=True)  # type: ignore[var-annotated]


def no_parameters() -> None:
    torch.optim.SGD([], 0.1)


def no_leaf() -> None:
    torch.optim.SGD([torch.ones(2, requires_grad=True) * 2], 0.1)


def loss_made_of_tensors() -> None:
    nn.CrossEntropyLoss(torch.zeros(4, 3), torch.zeros(4))  # type: ignore[arg-type]


def objects_in_a_checkpoint() -> None:
    torch.load(saved(nn.Linear(2, 2)))


def cut_checkpoint() -> None:
    torch.load(io.BytesIO(saved(torch.zeros(1000)).getvalue()[:1000]))


def other_optimizer() -> None:
    one, two = (torch.optim.SGD([torch.ones(1)] * count, 0.1) for count in (1, 2))
    one.load_state_dict(two.state_dict())


def scaled_16_bits() -> None:
    scaler, weight = torch.amp.GradScaler("cpu"), nn.Parameter(torch.ones(1).half())
    scaler.scale((weight * 2).sum()).backward()
    scaler.unscale_(torch.optim.SGD([weight], 0.1))


def steps_beyond_the_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 2)
    for _ in range(3):
        optimizer.step()
        schedule.step()


def rows_of_objects() -> None:
    torch.from_numpy(np.array(["a", None]))


def saved(what: object) -> io.BytesIO:
    """Return a file with what torch saves."""
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


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
        (classes_of_two_dimensions, "numbers of the classes as int64"),
        (classes_as_floats, "numbers of the classes as int64"),
        (classes_as_one_hot, "numbers of the classes as int64"),
        (binary_shapes, "in the shape and type of the output"),
        (binary_types, "in the shape and type of the output"),
        (no_probability, "binary_cross_entropy_with_logits"),
        (float_tokens, "Tokens and indices are integers"),
        (channels_last, "permute(0, 3, 1, 2)"),
        (double_images, "Convert one of the tensors"),
        (small_image, "The image is too small"),
        (smaller_than_its_kernel, "The image is too small"),
        (empty_data_set, "The data set is empty"),
        (no_parameters, "nn.ModuleList"),
        (no_leaf, "nn.Parameter"),
        (loss_made_of_tensors, "nn.CrossEntropyLoss()(output, target)"),
        (objects_in_a_checkpoint, "weights_only=False"),
        (cut_checkpoint, "The file is not complete"),
        (other_optimizer, "an optimizer with other parameters"),
        (scaled_16_bits, "GradScaler is for weights of 32 bits"),
        (steps_beyond_the_schedule, "made for fewer steps"),
        (rows_of_objects, "holds objects"),
        (features, "The left matrix has 512 columns, the right one 256 rows"),
        (relative_path, "data/train.bin is a relative path"),
        (lambda: Path("/missing/train.bin").read_text(), "Read a.py:3 train; the full traceback"),
    ],
)
def test_a_usual_mistake_has_its_advice(script: Callable[[], None], words: str) -> None:
    assert words in for_exit(end_of(script), JobFacts())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RuntimeError: operator torchvision::nms does not exist", "versions that belong together"),
        ("ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda", "versions that belong together"),
        ("RuntimeError: Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
         "Move them to one device"),
        ("RuntimeError: Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be the same or",
         "Move them to one device"),
        ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", "HF_HUB_OFFLINE=1"),
    ],
)  # fmt: skip
def test_what_other_libraries_and_devices_say_has_its_advice(text: str, words: str) -> None:
    """Without such a library, a GPU or a server the messages cannot be had here."""
    assert words in for_exit(RankExit(rank=0, state="failed", exception=text), JobFacts())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (sizes_of_samples, "differ in size"),
        (pickled, "gets the data set by"),
        (missing_sample, "left out in a collate_fn"),
    ],
)
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
