"""Samples and tokens of a job's mean step, and their rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from tests.runs.fabricated_store import add_info, add_rank, run_facts
from traceml.database.schema import FINGERPRINTS
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report
from traceml.runs.report.report_types import StepsSection

TEXT = {"dtype": "torch.int64", "dimensions": 2, "tokens": True}
IMAGES = {"dtype": "torch.float32", "dimensions": 4, "tokens": False}
STAGE = {"dtype": "torch.float32", "dimensions": 3, "tokens": False}
DDP = {"parallel": "ddp", "gradient_size": 2}
PAIRS = {"parallel": "ddp", "gradient_size": 2, "gradient_ranks": [0, 2]}


def steps_of(
    folder: Path,
    *,
    ranks: int = 2,
    samples: int | np.ndarray[Any, Any] = 16,
    loader: dict[str, Any] | None = None,
    inputs: tuple[dict[str, Any], ...] = (IMAGES,),
    later: dict[str, Any] | None = None,
    batches: tuple[list[int], ...] = (),
    model: dict[str, Any] = DDP,
    steps: int = 120,
    last_rank_steps: int | None = None,
    most_rows: int = 100_000,
) -> StepsSection:
    """Return the section on the steps of a stored run, each of whose ranks trains on 16 samples of 32 numbers."""
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=folder.name, world_size=ranks))
        for rank, rows in enumerate(rows_of(Job(ranks=ranks, steps=steps))):
            rows["samples"], rows["elements"] = samples, samples * 32
            rows = rows[: last_rank_steps if rank == ranks - 1 else None]
            stream = add_rank(writer, rank, rows)
            add_info(writer, stream, kind="model", t_ns=1, **model)
            if loader is not None:
                add_info(writer, stream, kind="loader", t_ns=1, **loader)

            if inputs:
                add_info(writer, stream, kind="input", t_ns=2, **inputs[rank % len(inputs)])

            if later is not None:
                add_info(writer, stream, kind="input", t_ns=3, **later)

            if batches:
                prints = np.zeros(len(batches[rank]), FINGERPRINTS.dtype)
                prints["step"], prints["fingerprint"] = range(len(prints)), batches[rank]
                writer.append(stream, "fingerprints", 0, len(prints), prints.tobytes())

    return build_report(folder, most_rows).steps


def test_images_have_samples_only(tmp_path):
    """Two ranks with 16 images each train on 32 a step; images are no tokens."""
    steps = steps_of(tmp_path / "run")

    assert (steps.samples_per_step, steps.tokens_per_step, steps.data_ranks) == (32, None, 2)
    assert steps.per_second is not None
    assert steps.samples_per_second == pytest.approx(32 * steps.per_second, rel=1e-4)
    assert steps.tokens_per_second is None


def test_steps_without_a_known_batch_do_not_count(tmp_path):
    """In 4 of 120 steps no batch was seen: the others' mean is 32, not 30.9."""
    samples = np.full(120, 16)
    samples[[0, 30, 60, 90]] = 0

    assert steps_of(tmp_path / "run", samples=samples).samples_per_step == pytest.approx(32)


def test_a_rank_that_ends_early_adds_no_samples_then(tmp_path):
    """One of two ranks has data for 60 of 120 steps, as under `Join`: a mean step has 24 samples."""
    assert steps_of(tmp_path / "run", last_rank_steps=60).samples_per_step == pytest.approx(24)


def test_text_has_tokens_too(tmp_path):
    """Integers by sample and position are counted as tokens."""
    steps = steps_of(tmp_path / "run", inputs=(TEXT,))

    assert (steps.samples_per_step, steps.tokens_per_step) == (32, 1024)
    assert steps.per_second is not None
    assert steps.tokens_per_second == pytest.approx(1024 * steps.per_second, rel=1e-4)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(np.full(9, 8), 8), (np.array([8, 8, 8, 8, 8, 8, 8, 8, 6]), 7.67), (np.arange(300, 1200, 100), None)],
)
def test_few_steps_of_an_accumulation_are_counted(tmp_path, samples, expected):
    """Nine steps of two batches each have one size, or two with the end of an epoch; those of graphs have nine."""
    found = steps_of(tmp_path / "run", ranks=1, samples=samples, steps=9, loader={"batch_size": 4, "training": True})

    assert found.samples_per_step == (None if expected is None else pytest.approx(expected, rel=0.02))


def test_positions_first_have_tokens_only(tmp_path):
    """Where the first dimension may count positions, samples are not known."""
    steps = steps_of(tmp_path / "run", inputs=({**TEXT, "batch_first": False},))

    assert (steps.samples_per_step, steps.tokens_per_step) == (None, 1024)


def test_the_newest_facts_of_the_input_say_what_is_counted(tmp_path):
    """A text that turned out to be read position by position has known samples, but no known tokens."""
    steps = steps_of(tmp_path / "run", inputs=(TEXT,), later={**TEXT, "tokens": False})

    assert (steps.samples_per_step, steps.tokens_per_step) == (32, None)


def test_a_long_run_is_counted_from_its_sums(tmp_path):
    """Where only some rows are read, all of them count."""
    steps = steps_of(tmp_path / "run", inputs=(TEXT,), steps=1000, most_rows=200)

    assert steps.cut
    assert (steps.samples_per_step, steps.tokens_per_step) == (32, 1024)


def test_equal_batches_count_once(tmp_path):
    """Ranks 0 and 1 split a model, as do 2 and 3: each pair has the same batches."""
    batches = ([1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6])
    steps = steps_of(tmp_path / "run", ranks=4, batches=batches, model=PAIRS)

    assert (steps.samples_per_step, steps.data_ranks) == (32, 2)


@pytest.mark.parametrize("model", [PAIRS, {"parallel": "dtensor"}])
def test_a_split_model_without_fingerprints_is_not_counted(tmp_path, model):
    """How many ranks share a batch is not known, so no number is given."""
    steps = steps_of(tmp_path / "run", ranks=4, model=model)

    assert (steps.samples_per_step, steps.samples_per_second) == (None, None)


@pytest.mark.parametrize("stage", [STAGE, {**TEXT, "requires_grad": True}])
def test_the_stages_of_a_pipeline_count_once(tmp_path, stage):
    """The input of the later stages is no batch, but what the first stage made of it."""
    steps = steps_of(tmp_path / "run", inputs=({**TEXT, "requires_grad": False}, stage), model={})

    assert (steps.samples_per_step, steps.tokens_per_step, steps.data_ranks) == (16, 512, 1)


def test_a_benchmark_on_one_batch_counts_all_ranks(tmp_path):
    """One batch forever says nothing about who has the same data."""
    steps = steps_of(tmp_path / "run", batches=([7, 7, 7], [7, 7, 7]))

    assert (steps.samples_per_step, steps.data_ranks) == (32, 2)


def test_unknown_sizes_are_no_rate(tmp_path):
    """A model whose input is no tensor has neither samples nor tokens."""
    steps = steps_of(tmp_path / "run", samples=0, inputs=())

    assert (steps.samples_per_step, steps.samples_per_second, steps.tokens_per_second) == (None, None, None)


NODES = 320 + np.arange(120) * 7 % 113
"""Nodes in 32 graphs of different sizes."""


@pytest.mark.parametrize(
    ("samples", "batch_size", "expected"),
    [
        (NODES, 32, None),  # nodes are no samples
        (NODES, None, 2 * NODES.mean()),  # batches that a sampler makes as large as they fit
        (np.where(np.arange(120) % 15 == 14, 100, 128), 32, 2 * (14 * 128 + 100) / 15),  # accumulation of 4
        (np.where(np.arange(120) % 15 == 14, 9, 32), 32, 2 * (14 * 32 + 9) / 15),  # the last batch of each epoch
    ],
)
def test_parts_of_samples_are_not_counted(tmp_path, samples, batch_size, expected):
    """The first dimension of the input tells the samples only where it is the batch."""
    steps = steps_of(tmp_path / "run", samples=samples, loader={"batch_size": batch_size, "training": True})

    assert steps.samples_per_step == (None if expected is None else pytest.approx(expected, rel=0.02))
