"""Samples, tokens and the loss for trackers: of the whole job, and the same however the frames come."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from tests.track.delivery.test_derived import derive, frames, named, stream
from traceml.database.schema import FINGERPRINTS, INFO, LOSSES, STEPS
from traceml.database.store.reader import Frame, StreamRecord
from traceml.track.delivery.training_values import TrainingValues

TEXT = {"kind": "input", "dtype": "torch.int64", "dimensions": 2, "tokens": True}
Given = list[tuple[Frame, StreamRecord]]


def steps(ranks: int, count: int = 300) -> Given:
    """Return steps of 8 samples of 64 numbers on each rank."""
    found: Given = []
    for rank, rows in enumerate(rows_of(Job(ranks=ranks, steps=count))):
        rows["samples"], rows["elements"] = 8, 512
        found += frames(STEPS, rows, 100, rank)

    return found


def info(rank: int, *rows: dict[str, Any]) -> Given:
    packed = b"".join(msgpack.packb(row) for row in rows)
    return [
        (
            Frame(
                id=1,
                stream=stream(rank).id,
                table=INFO.name,
                seq=0,
                n=len(rows),
                first_step=-1,
                last_step=-1,
                data=packed,
            ),
            stream(rank),
        )
    ]


def prints(rank: int, values: list[int]) -> Given:
    rows = np.zeros(len(values), FINGERPRINTS.dtype)
    rows["step"], rows["fingerprint"] = range(len(values)), values
    return frames(FINGERPRINTS, rows, 2, rank)


def losses(rank: int, values: list[float], first: int = 0) -> Given:
    rows = np.zeros(len(values), LOSSES.dtype)
    rows["step"], rows["loss"] = range(first, first + len(values)), values
    return frames(LOSSES, rows, 2, rank)


def test_rates_are_of_the_whole_job_at_the_speed_beside_them() -> None:
    """Two ranks with 8 samples each train on 16 a step."""
    found = derive([*info(0, TEXT), *info(1, TEXT), *steps(2)], interval_s=1000)

    [speed] = named(found, "traceml/steps_per_s")
    assert named(found, "traceml/samples_per_s") == [pytest.approx(16 * speed)]
    assert named(found, "traceml/tokens_per_s") == [pytest.approx(1024 * speed)]


def test_images_are_no_tokens_and_unknown_sizes_no_samples() -> None:
    image = {**TEXT, "dtype": "torch.float32", "tokens": False}
    known = derive([*info(0, image), *steps(1)], interval_s=1000)
    unknown = derive(frames(STEPS, rows_of(Job(ranks=1))[0], 100), interval_s=1000)

    assert len(named(known, "traceml/samples_per_s")) == 1
    assert [row.name for row in (*known, *unknown) if "tokens" in row.name] == []
    assert named(unknown, "traceml/samples_per_s") == []


@pytest.mark.parametrize("count", [300, 3000])
def test_positions_first_are_no_samples(count: int) -> None:
    """Tokens are counted where samples are not known, also after the facts were dropped."""
    found = derive([*info(0, {**TEXT, "batch_first": False}), *steps(1, count)], interval_s=1)

    assert named(found, "traceml/samples_per_s") == []
    assert named(found, "traceml/tokens_per_s")


def test_the_newest_facts_of_the_input_say_what_is_counted() -> None:
    """A batch that is read in parts has neither known samples nor tokens."""
    parts = info(0, {**TEXT, "tokens": False, "batch_first": False})
    found = derive([*info(0, TEXT), *parts, *steps(1)], interval_s=1000)

    assert [row.name for row in found if "samples" in row.name or "tokens" in row.name] == []


@pytest.mark.parametrize("count", [300, 3000])
def test_ranks_with_equal_batches_count_once(count: int) -> None:
    """Also after the facts of the ranks were dropped, and whatever was forgotten between frames."""
    split = {"kind": "model", "parallel": "dtensor"}
    facts = [frame for rank in (0, 1) for frame in (*info(rank, split, TEXT), *prints(rank, [5, 6, 7, 8]))]
    found = derive([*facts, *steps(2, count)], interval_s=1000)

    assert named(found, "traceml/samples_per_s") == [pytest.approx(8 * named(found, "traceml/steps_per_s")[0])]


def test_a_split_model_without_fingerprints_has_no_rate() -> None:
    split = {"kind": "model", "parallel": "dtensor"}
    found = derive([*info(0, split, TEXT), *info(1, split, TEXT), *steps(2)], interval_s=1000)

    assert named(found, "traceml/samples_per_s") == []


def test_the_loss_is_the_mean_over_the_ranks_of_a_step() -> None:
    """A step that one rank read has its loss; the value is the mean of the steps."""
    found = derive([*losses(1, [9.0, 8.0]), *losses(0, [3.0, 2.0, 1.0]), *steps(1)], interval_s=1000)

    assert named(found, "traceml/loss") == [pytest.approx((6.0 + 5.0 + 1.0) / 3)]


def test_a_rank_that_is_behind_delays_the_loss_of_a_step() -> None:
    """A value is made of the same steps of all ranks, not of the newest of one and the oldest of another."""
    values = TrainingValues({})
    for frame, of in losses(0, [1.0, 2.0, 3.0]):
        values.take(frame, of)
    for frame, of in losses(1, [5.0]):
        values.take(frame, of)

    first = values.close(None, 2, [0, 1])
    values.take(*losses(1, [6.0], 1)[0])

    assert first == {"traceml/loss": 3.0}
    assert values.close(None, 3, [0, 1]) == {"traceml/loss": pytest.approx((4.0 + 3.0) / 2)}
    assert values.close(None, 4, [0, 1], last=True) == {}


def test_a_loss_that_is_not_finite_is_no_mean() -> None:
    """One bad loss in the interval must not look like a good one."""
    [loss] = named(derive([*losses(0, [3.0, math.inf, 1.0]), *steps(1)], interval_s=1000), "traceml/loss")

    assert math.isnan(loss)
    assert named(derive(steps(1), interval_s=1000), "traceml/loss") == []
