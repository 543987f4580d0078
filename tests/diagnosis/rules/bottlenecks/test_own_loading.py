"""Loading that the training process does by itself: no number of workers helps."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import MS, Job, adds, window_of
from tests.diagnosis.facts.watched_workers import watched
from traceml.database.schema import EPOCHS, LINE_PHASES, LINE_WORKERS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
DRAWS = "/lib/torch/utils/data/sampler.py:163 RandomSampler.__iter__"
WAITS = "/lib/torch/utils/data/dataloader.py:1252 _MultiProcessingDataLoaderIter._try_get_data"


IN_LOOP = SampledLine(0, "backward", "/me/train.py", 11, "main", None, 9)


def seen(function: str, library: str | None, *, busy: float = 1.0) -> tuple[SampledLine, ...]:
    """Return samples of the waiting for data, in which the training thread is on a core for a share of the time."""
    watched = 200_000_000
    rest = SampledLine(0, "forward", "/me/train.py", 5, "forward", None, 30)
    return SampledLine(0, "input_wait", "/me/train.py", 9, function, library, 70, watched, int(busy * watched)), rest


def epochs(every: int = 1, drain_ns: int = 0) -> np.ndarray:
    rows = np.zeros(-(-ALONE.steps // every), EPOCHS.dtype)
    rows["step"] = np.arange(len(rows)) * every
    rows["ns"], rows["drain_ns"] = 30 * MS, drain_ns
    return rows


def found(
    lines: tuple[SampledLine, ...],
    rows: np.ndarray,
    workers: int = 0,
    *,
    of_rank_1: int | None = None,
    of_workers: tuple[SampledLine, ...] = (),
) -> Finding:
    """Return what is said of a run whose steps of 14 ms wait 30 ms for data."""
    loader = LoaderFacts(
        dataset="Rows", length=1_000_000, num_workers=workers, batch_size=16, persistent_workers=True,
        samplers=["Weighted"], number=0,
    )  # fmt: skip
    loaders = {0: [loader]} if of_rank_1 is None else {0: [loader], 1: [replace(loader, num_workers=of_rank_1)]}
    window = window_of(ALONE, adds("input_wait", 30))
    sampled = {"lines": lines, "lines_of_workers": {0: of_workers}}
    return next(
        each
        for each in diagnose(window, JobFacts(loader=loader, loaders=loaders, epochs=rows, **sampled))
        if each.kind is Kind.INPUT_BOUND
    )


def test_an_iterator_in_each_step_is_reported_with_its_gain() -> None:
    """`next(iter(loader))` orders a million samples for one batch: without it 44 ms become 14."""
    finding = found(seen("main", DRAWS), epochs())

    assert finding.next.startswith("Keep one iterator of the loader: ")
    assert "all 1,000,000 samples" in finding.next
    assert "num_workers" not in finding.next
    assert finding.speedup_if_fixed == pytest.approx(3.1, rel=0.1)


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        (seen("main", DRAWS), epochs(every=20)),  # epochs of 20 steps
        (seen("main", DRAWS), epochs(drain_ns=3000)),  # epochs of one batch, which end
        (seen("Rows.__getitem__", None), epochs()),  # reading samples takes the time
        ((), epochs()),  # not known
    ],
)
def test_other_waits_are_told_to_use_workers(lines: tuple[SampledLine, ...], rows: np.ndarray) -> None:
    """Only an order that is drawn for each batch is an iterator's fault."""
    assert "Keep one iterator" not in found(lines, rows).next


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("function", "is_told"), [("collate_float_fn", True), ("collate_int_fn", True), ("collate_tensor_fn", False)]
)
def test_samples_that_are_lists_of_numbers_are_to_be_tensors(function: str, is_told: bool, workers: int) -> None:
    """A tensor is made for each position of the list; samples that are tensors are stacked by one call."""
    library = f"/lib/torch/utils/data/_utils/collate.py:299 {function}"
    part = LINE_PHASES[LINE_WORKERS]
    of_workers = (SampledLine(0, part, "/me/train.py", 9, "main", library, 70),)

    if workers:
        finding = found((), epochs(every=110), workers, of_workers=of_workers)
    else:
        finding = found(seen("main", library), epochs(every=110))

    assert finding.next.startswith("Keep each sample of Rows as one tensor or NumPy array") is is_told
    assert ("workers_advised" in finding.evidence) is not is_told


SEMAPHORE = "/lib/multiprocessing/synchronize.py:94 SemLock.__enter__"


@pytest.mark.parametrize(
    ("workers", "locked", "others", "is_told"),
    [
        (4, SEMAPHORE, "/lib/selectors.py:402 _PollLikeSelector.select", True),
        (4, "/lib/filelock/_api.py:1203 BaseFileLock._poll_until_acquired", None, True),
        (1, SEMAPHORE, "/lib/selectors.py:402 _PollLikeSelector.select", False),
        (4, SEMAPHORE, "/lib/multiprocessing/connection.py:390 Connection._recv", False),  # the lock of a queue
    ],
)
def test_workers_that_share_a_lock_are_no_reason_for_more_of_them(
    workers: int, locked: str, others: str | None, is_told: bool
) -> None:
    """They read one at a time: as a file that one lock guards."""
    part = LINE_PHASES[LINE_WORKERS]
    of_workers = (
        SampledLine(0, part, "/me/train.py", 9, "Rows.__getitem__", locked, 75),
        SampledLine(0, part, "/me/train.py", 10, "Rows.__getitem__", others, 25),
    )

    finding = found((), epochs(every=110), workers, of_workers=of_workers)

    assert ("wait for each other: 75 % of the time" in finding.next) is is_told
    assert ("More workers will not help before." in finding.next) is is_told
    assert ("workers_advised" not in finding.evidence) is is_told


@pytest.mark.parametrize(
    ("library", "is_pool"),
    [
        ("/lib/threading.py:327 Condition.wait", True),
        ("/lib/PIL/Image.py:3245 open", False),
        (None, False),
    ],
)
def test_a_batch_that_a_pool_makes_is_not_moved_to_workers(library: str | None, is_pool: bool) -> None:
    """A forked worker has the pool without the threads that serve it, and would hang."""
    finding = found(seen("collate", library), epochs(every=110))

    assert finding.next.startswith("train.py:9 collate waits for other threads or processes") is is_pool
    assert ("cannot use a pool of the training process" in finding.next) is is_pool
    assert ("workers_advised" in finding.evidence) is not is_pool
    assert finding.speedup_if_fixed == pytest.approx(44 / (14 + 15) if is_pool else 3.1, rel=0.1)


def test_a_sampler_that_computes_has_a_line_and_no_advice_on_workers() -> None:
    """It runs in the training process, whatever the number of workers."""
    finding = found(seen("Balanced.draw", None), epochs(every=110), workers=1)

    assert finding.evidence["function"] == "Balanced.draw"
    assert "train.py:9 Balanced.draw" in finding.next
    assert "more workers will not help" in finding.next
    assert "workers_advised" not in finding.evidence


@pytest.mark.parametrize("of_rank_1", [0, 2])
def test_a_rank_without_workers_has_the_code_of_its_data_set(of_rank_1: int) -> None:
    """Where the other rank has workers, that code is no sampler."""
    finding = found(seen("Rows.decode", None), epochs(every=110), 2, of_rank_1=of_rank_1)

    assert finding.next.startswith("The sampler runs in the training process") is (of_rank_1 > 0)


@pytest.mark.parametrize(
    ("lines", "told"), [((*seen("main", DRAWS), IN_LOOP), True), ((*seen("main", None), IN_LOOP), False)]
)
def test_a_sampler_of_torch_is_known_by_its_function(lines: tuple[SampledLine, ...], told: bool) -> None:
    """The line is that of the loop, or of the call of a trainer, whose other code may compute, too."""
    finding = found(lines, epochs(every=110), workers=1)

    assert finding.next.startswith("The sampler runs in the training process") is told


def test_a_sampler_without_workers_is_known_by_its_class() -> None:
    """Workers would not draw its indices either."""
    finding = found(seen("Weighted.draw", None), epochs(every=110))

    assert "so workers will not help: make train.py:9 Weighted.draw cheaper" in finding.next
    assert "num_workers" not in finding.next


@pytest.mark.parametrize(
    ("lines", "workers"),
    [
        (seen("Balanced.draw", None), 0),  # without workers it is the data set's line, as before
        (seen("main", WAITS, busy=0.02), 1),  # the loop's own line, which waits
        (seen("main", WAITS), 1),  # batches are taken from the workers
        (seen("main", None, busy=0.02), 1),
        ((*seen("main", "/lib/accelerate/data_loader.py:560 send_to_device"), IN_LOOP), 1),  # what a trainer adds
    ],
)
def test_waiting_for_workers_blames_no_sampler(lines: tuple[SampledLine, ...], workers: int) -> None:
    """The training process has to compute, and not in receiving batches."""
    finding = found(lines, epochs(every=110), workers)

    assert "sampler" not in finding.next
    assert ("function" in finding.evidence) == (not workers)


RECEIVES = "/lib/python3.11/selectors.py:402 _PollLikeSelector.select"
FETCHES = "/lib/torch/utils/data/_utils/fetch.py:54 _MapDatasetFetcher.fetch"
LABELED = LoaderFacts(dataset="Labeled", length=640, num_workers=0, batch_size=16, number=1)
UNLABELED = LoaderFacts(dataset="Unlabeled", length=3200, num_workers=1, batch_size=64, number=2)
CHECKED_FIRST = LoaderFacts(dataset="Test", length=640, num_workers=4, batch_size=64, number=0)


def two_loaders(*libraries: str, evaluation: float = 0.0, second: LoaderFacts = UNLABELED) -> Finding:
    """Return what is said of steps that take a batch of each of two loaders; samples are in library functions."""
    facts = JobFacts(
        loader=LABELED,
        loaders={0: (CHECKED_FIRST, LABELED, second)},
        lines=tuple(line for library in libraries for line in seen("main", library, busy=0.1)),
        time=RunTime.of(100.0, {"steps": 90.0 - 10 * evaluation, "evaluation": 10 * evaluation}),
    )
    found = diagnose(window_of(ALONE, adds("input_wait", 30)), facts)
    return next(each for each in found if each.kind is Kind.INPUT_BOUND)


@pytest.mark.parametrize("evaluation", [0.0, 1.0])
def test_the_loader_that_is_waited_for_is_told(evaluation: float) -> None:
    """The first loader of a step is read without workers, and the training waits for those of the second."""
    finding = two_loaders(RECEIVES, evaluation=evaluation)

    assert "num_workers=0" not in finding.next
    assert "Labeled is read by the training process" not in finding.next
    assert finding.evidence["num_workers"] == 1


@pytest.mark.parametrize(
    ("function", "evaluation", "dataset"),
    [
        ("Labels.__getitem__", 0.0, "Labels"),
        ("main", 0.0, "Images"),
        ("Labels.__getitem__", 4.0, "Images"),  # the first batches of evaluations
    ],
)
def test_a_loader_without_workers_beside_one_with_them_is_told(function: str, evaluation: float, dataset: str) -> None:
    """The training process makes its batches, while the workers of the first loader are ready."""
    images = LoaderFacts(dataset="Images", num_workers=1, batch_size=8, number=0)
    labels = LoaderFacts(dataset="Labels", num_workers=0, batch_size=8, number=1)
    facts = JobFacts(
        loader=images,
        loaders={0: (images, labels)},
        lines=(*seen(function, None, busy=0.1), *(seen("main", RECEIVES) if evaluation else ())),
        time=RunTime.of(100.0, {"steps": 90.0 - 10 * evaluation, "evaluation": 10 * evaluation}),
    )
    told = diagnose(window_of(ALONE, adds("input_wait", 30)), facts)
    finding = next(each for each in told if each.kind is Kind.INPUT_BOUND)

    assert finding.evidence["dataset"] == dataset
    assert ("Labels is read by the training process itself" in finding.next) is (dataset == "Labels")


@pytest.mark.parametrize(
    ("busy", "own", "others", "dataset"),
    [
        (0.05, 0, 60, "Audio"),
        (0.9, 0, 60, "Text"),  # the workers of the first one do not keep up either
        (0.05, 0, 5, "Text"),  # those of an evaluation, which are seen for a part of the waiting only
        (0.05, 200, 60, "Text"),
    ],
)
def test_the_loader_whose_workers_do_not_keep_up_is_told(busy: float, own: int, others: int, dataset: str) -> None:
    """A step takes a batch of each of two loaders with workers, and waits for the slow one."""
    loaders = [LoaderFacts(dataset=name, num_workers=1, number=at) for at, name in enumerate(("Text", "Audio"))]
    seen_in = {0: own, 1: others}
    work = {at: (SampledLine(0, "workers", "/me/a.py", 9, "load", None, count),) for at, count in seen_in.items()}
    facts = JobFacts(
        loader=loaders[0],
        loaders={0: loaders},
        lines=seen("main", RECEIVES, busy=0.1),
        lines_of_workers={at: lines for at, lines in work.items() if lines[0].samples},
        workers=watched(1, busy=busy),
    )
    finding = diagnose(window_of(ALONE, adds("input_wait", 30)), facts)[0]

    assert (finding.kind, finding.evidence["dataset"]) == (Kind.INPUT_BOUND, dataset)
    assert ("1 worker of Audio does not keep up" in finding.next) is (dataset == "Audio")


def test_a_loader_that_a_data_set_reads_is_told() -> None:
    """TorchIO's queue starts its workers as it is made, and only a loader without workers may read it."""
    views = LoaderFacts(dataset="Views", length=3200, num_workers=0, batch_size=64, number=2)

    assert "num_workers=0" not in two_loaders(RECEIVES, second=views).next


@pytest.mark.parametrize(
    ("libraries", "evaluation"), [((FETCHES,), 0.0), ((FETCHES, RECEIVES, RECEIVES, RECEIVES), 6.0)]
)
def test_a_loader_without_workers_that_is_waited_for_stays(libraries: tuple[str, ...], evaluation: float) -> None:
    """The samples are in the fetch, or the workers may be those of an evaluation."""
    assert two_loaders(*libraries, evaluation=evaluation).evidence["num_workers"] == 0


@pytest.mark.parametrize(
    ("function", "dataset"),
    [("Views.__getitem__", "Views"), ("main.<locals>.Views.load", "Views"), ("Labeled.__getitem__", "Labeled")],
)
def test_the_loader_whose_data_set_takes_the_time_is_told(function: str, dataset: str) -> None:
    """Of two without workers."""
    views = LoaderFacts(dataset="Views", length=3200, num_workers=0, batch_size=64, number=2)
    facts = JobFacts(loader=LABELED, loaders={0: (LABELED, views)}, lines=seen(function, None))
    found = diagnose(window_of(ALONE, adds("input_wait", 30)), facts)

    advice = next(each.next for each in found if each.kind is Kind.INPUT_BOUND)
    assert advice.startswith(f"{dataset} is read by the training process itself")


@pytest.mark.parametrize(("dataset", "name"), [("Views", "Views"), ("list", "The dataset"), (None, "The dataset")])
def test_a_plain_list_is_no_name_of_a_data_set(dataset: str | None, name: str) -> None:
    """PyTorch Geometric's loaders are given one: 'list is read by the training process itself'."""
    facts = JobFacts(loader=LoaderFacts(dataset=dataset, length=3200, num_workers=0, batch_size=64))
    found = diagnose(window_of(ALONE, adds("input_wait", 30)), facts)

    assert next(each.next for each in found if each.kind is Kind.INPUT_BOUND).startswith(f"{name} is read by")
