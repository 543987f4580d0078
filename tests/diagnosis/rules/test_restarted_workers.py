"""Loader workers that are restarted in each epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import MS, Job, window_of
from traceml.database.schema import EPOCHS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.restarted_workers import keeping_workers
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
EPOCH = 20
LOADER = LoaderFacts(num_workers=2, persistent_workers=False)


def waits(ms: float, every: int = EPOCH):
    """Return a fault: the first step of an epoch waits longer for its batch."""

    def fault(own, _) -> None:
        own["input_wait"][:, ::every] += ms

    return fault


def findings(
    ms: float,
    *,
    every: int = EPOCH,
    loader: LoaderFacts | None = LOADER,
    create_ms: float = 0.0,
    drain_ms: float = 0.0,
    lines: Sequence[SampledLine] = (),
):
    window = window_of(ALONE, waits(ms, every))
    rows = np.zeros(-(-ALONE.steps // every), EPOCHS.dtype)
    rows["step"] = np.arange(len(rows)) * every
    rows["ns"], rows["create_ns"] = (ms + 0.3) * MS, create_ms * MS
    rows["drain_ns"] = drain_ms * MS
    return diagnose(window, JobFacts(loader=loader, epochs=rows, lines=lines))


def restarts(found) -> list:
    return [each for each in found if each.evidence.get("restart_ms")]


def test_workers_that_start_in_each_epoch_are_reported():
    """200 ms before each 20 steps of 14 ms: without them steps would be 1.6x faster."""
    (found,) = restarts(findings(200, create_ms=150))

    assert (found.kind, found.phase) == (Kind.INPUT_BOUND, "input_wait")
    assert found.headline.startswith("Training waits for new loader workers in each epoch: ")
    assert "at the start of an epoch" in found.summary
    assert "persistent_workers=True" in found.next
    assert found.speedup_if_fixed == pytest.approx(1.6, rel=0.1)


@pytest.mark.parametrize("restarted", [True, False])
def test_two_first_batches_of_seconds_are_restarts_not_single_pauses(restarted):
    """A data set that reads all it has at the first access does so in each new worker: of three epochs two are seen."""

    def loads(own, _) -> None:
        own["input_wait"][:, [80, 160]] += 6000.0

    rows = np.zeros(3, EPOCHS.dtype)
    rows["step"], rows["ns"], rows["create_ns"] = np.arange(3) * (80 if restarted else 70), 6000 * MS, 100 * MS

    found = diagnose(window_of(ALONE, loads), JobFacts(loader=replace(LOADER, length=1280), epochs=rows))

    assert bool(restarts(found)) is restarted
    assert any("pauses" in each.evidence for each in found) is not restarted


@pytest.mark.parametrize(("ms", "told"), [(200, True), (60, False)])
def test_short_epochs_may_do_without_workers(ms, told):
    """A batch that takes 0.4 ms to make was waited for 12 ms: the restarts of its workers, by their steps."""
    (found,) = restarts(findings(ms, create_ms=0.75 * ms))

    assert ("(num_workers=0) none has to start" in found.next) == told
    assert (f"if a batch takes less than {found.cost_share * found.evidence['step_ms']:.1f}" in found.next) == told


def test_batches_that_are_taken_at_once_are_no_restart():
    """`for batch in list(loader)` waits for all batches of an epoch, whether its workers are kept or not."""

    def all_at_once(own, _) -> None:
        own["input_wait"][:] = 0
        own["input_wait"][:, ::EPOCH] = 200

    rows = np.zeros(ALONE.steps // EPOCH, EPOCHS.dtype)
    rows["step"], rows["ns"], rows["create_ns"] = np.arange(len(rows)) * EPOCH, 200 * MS, 2 * MS

    found = diagnose(window_of(ALONE, all_at_once), JobFacts(loader=LOADER, epochs=rows))

    assert restarts(found) == []
    assert "as list(loader) does" in found[0].next


@pytest.mark.parametrize(("method", "gain"), [("fork", 1.87), ("spawn", 1.42)])
def test_memory_that_is_copied_after_a_fork_goes_with_the_restart(method, gain):
    """The first step of an epoch writes to pages that the new workers share, and computes 100 ms longer."""

    def copies(own, random) -> None:
        waits(200)(own, random)
        own["backward"][:, ::EPOCH] += 60
        own["optimizer"][:, ::EPOCH] += 40

    rows = np.zeros(ALONE.steps // EPOCH, EPOCHS.dtype)
    rows["step"] = np.arange(len(rows)) * EPOCH
    rows["ns"], rows["create_ns"] = 200.3 * MS, 150 * MS
    loader = LoaderFacts(num_workers=2, persistent_workers=False, start_method=method)

    (found,) = restarts(diagnose(window_of(ALONE, copies), JobFacts(loader=loader, epochs=rows)))

    assert found.speedup_if_fixed == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize(("workers", "words"), [(1, "The worker of the data loader is"), (2, "The 2 workers of the")])
def test_one_worker_is_one(workers, words):
    """With the number of workers that the loader has."""
    (found,) = restarts(findings(200, create_ms=150, loader=LoaderFacts(num_workers=workers)))

    assert found.summary.startswith(words)


def test_the_same_waiting_is_reported_once():
    """What the workers' start explains is no other finding."""
    kinds = [each.kind for each in findings(200, create_ms=200)]

    assert kinds == [Kind.INPUT_BOUND]


def test_waiting_besides_the_restarts_names_them():
    """Its bar has both."""

    def slow(own, random) -> None:
        waits(200)(own, random)
        own["input_wait"] += 12

    window = window_of(ALONE, slow)
    rows = np.zeros(ALONE.steps // EPOCH, EPOCHS.dtype)
    rows["step"], rows["ns"], rows["create_ns"] = np.arange(len(rows)) * EPOCH, 212.3 * MS, 200 * MS
    found = diagnose(window, JobFacts(loader=LOADER, epochs=rows))

    (other,) = (each for each in found if each.kind is Kind.INPUT_BOUND and "restart_ms" not in each.evidence)
    assert ", not counting restarts of workers)" in other.summary


@pytest.mark.parametrize(
    "loader",
    [None, LoaderFacts(num_workers=0), LoaderFacts(num_workers=2, persistent_workers=True)],
)
def test_a_loader_without_restarts_is_not_blamed(loader):
    """No workers, or workers that stay."""
    assert not restarts(findings(200, loader=loader, create_ms=150))


@pytest.mark.parametrize(("ms", "create_ms"), [(200, 150), (400, 0)])
def test_nobody_is_told_to_keep_workers_that_cannot_be_kept(ms, create_ms):
    """Each epoch of fastai makes an iterator, whose workers are new."""
    found = findings(ms, loader=replace(LOADER, trainer="fastai"), create_ms=create_ms)

    assert found[0].kind is not Kind.HEALTHY
    assert all("persistent_workers" not in each.next for each in found)


def test_a_batch_that_takes_long_is_no_restart():
    """The first batch is fetched while nothing else runs: two workers may need two steps for it."""
    assert not restarts(findings(25))


@pytest.mark.parametrize(
    ("ms", "length", "method", "create_ms", "begins_anew"),
    [
        (600, None, "fork", 2, True),
        (200, None, "fork", 2, False),
        (600, 1000, "fork", 2, False),
        (600, None, "spawn", 2, False),
        (600, None, "fork", 250, False),
    ],
)
def test_a_data_set_that_begins_anew_is_no_restart(ms, length, method, create_ms, begins_anew):
    """A shuffle buffer fills in kept workers, too; forked ones have no imports to repeat."""
    loader = LoaderFacts(dataset="Shards", length=length, num_workers=2, start_method=method)

    found = findings(ms, loader=loader, create_ms=create_ms)

    assert len(restarts(found)) == (not begins_anew)
    first = [each for each in found if "first_batch_ms" in each.evidence]
    assert len(first) == begins_anew
    assert all(each.headline.startswith("Training waits for data: ") for each in first)
    assert all("Look at what Shards does before its first batch" in each.next for each in first)


@pytest.mark.parametrize(("drawing", "restarted"), [(80, False), (0, True)])
@pytest.mark.parametrize(
    ("function", "library"),
    [
        ("main", "/lib/torch/utils/data/sampler.py:276 WeightedRandomSampler.__iter__"),
        ("ByLength.measure", None),
    ],
)
def test_an_order_that_each_epoch_draws_is_no_restart(drawing, restarted, function, library):
    """A weighted sampler draws a million numbers in the training process, for kept workers, too."""
    waiting = "/lib/selectors.py:402 _PollLikeSelector.select"
    lines = [
        SampledLine(0, "input_wait", "/me/train.py", 12, function, library, drawing),
        SampledLine(0, "input_wait", "/me/train.py", 12, "main", waiting, 100 - drawing),
        SampledLine(0, "forward", "/me/train.py", 13, "main", None, 130),
    ]

    found = findings(200, create_ms=150, loader=replace(LOADER, length=10**6, samplers=("ByLength",)), lines=lines)

    assert any(each.cost_share > 0.2 for each in restarts(found)) is restarted
    told = [each for each in found if each.next.startswith("The sampler runs in the training process")]
    assert len(told) == (function != "main" and not restarted)
    assert all("it in train.py:12 ByLength.measure" in each.summary for each in told)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_loader_that_each_epoch_makes_is_to_be_made_once(keeps):
    """Workers that stay end with their loader: to keep them changes nothing there."""
    renewed = replace(LOADER, persistent_workers=keeps, made=8)
    (found,) = restarts(findings(200, loader=renewed, create_ms=150))

    assert found.next.startswith("Make the DataLoader once, before the loop over epochs")
    assert "Set persistent_workers" not in found.next


def test_a_loader_for_some_epochs_is_not_made_for_each():
    """Three folds with a loader each, of four epochs."""
    (found,) = restarts(findings(200, loader=replace(LOADER, made=3), create_ms=150))

    assert "Make the DataLoader once" not in found.next


def test_two_loaders_of_one_epoch_are_not_made_for_each():
    """Their batches are read side by side: labelled and unlabelled ones of the same class."""
    one, two = (JobFacts(loader=replace(LOADER, made=2), epochs=np.zeros(n, EPOCHS.dtype)) for n in (1, 2))

    assert "for each epoch" not in keeping_workers(one).because
    assert "for each epoch" in keeping_workers(two).because


def test_loaders_that_were_made_are_counted_by_their_data():
    """The evaluation's loader, of other length, is none of them."""
    facts = JobFactsBuilder(1)
    for length in (100, 20):
        facts.info(0, {"kind": "loader", "dataset": "Rows", "length": length, "num_workers": 2})

    facts.info(0, {"kind": "loaders_made", "dataset": "Rows", "length": 100, "num_workers": 2, "made": 4})
    facts.info(0, {"kind": "loaders_made", "dataset": "Rows", "length": 20, "num_workers": 2, "made": 7})
    loader = facts.build().loader

    assert loader is not None
    assert (loader.length, loader.made) == (100, 4)


def test_an_iterator_in_each_step_gets_its_own_advice():
    """`next(iter(loader))` starts the workers again and again."""
    (found,) = restarts(findings(60, every=1, create_ms=50))

    assert "for each step" in found.summary
    assert "Keep one iterator" in found.next
    assert found.headline.startswith("Training waits for new loader workers for each step: ")


@pytest.mark.parametrize(("length", "each_step"), [(20_000, True), (64, False), (None, False)])
def test_an_iterator_that_is_dropped_is_no_epoch_of_one_batch(length: int | None, each_step: bool) -> None:
    """Its workers end, too. One iterator would save all of the wait, as its workers have batches ahead."""
    loader = replace(LOADER, length=length, batch_size=64)
    (found,) = restarts(findings(60, every=1, create_ms=15, drain_ms=15, loader=loader))

    assert ("for each step" in found.summary) is each_step
    assert ("Keep one iterator" in found.next) is each_step
    assert ("with one iterator, steps would be at most" in found.summary) is each_step
    assert (found.speedup_if_fixed > 4) is each_step


def test_epochs_of_one_batch_keep_their_workers():
    """Each iterator ends, so the script makes the next one on purpose."""
    (found,) = restarts(findings(60, every=1, create_ms=50, drain_ms=2))

    assert "at the start of an epoch" in found.summary
    assert "persistent_workers=True" in found.next


def test_epochs_of_the_lowest_rank_are_kept():
    """All ranks begin epochs alike."""
    facts = JobFactsBuilder(2)
    rows = np.zeros(3, EPOCHS.dtype)
    for rank, first in ((1, 0), (0, 100), (1, 200)):
        rows["step"] = first + np.arange(3)
        facts.epoch_rows(rank, rows)

    assert facts.build().epochs["step"].tolist() == [100, 101, 102]
