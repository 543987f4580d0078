"""Simulated loading: what workers gain on the cores that there are."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import MS, Job, adds, window_of
from tests.diagnosis.facts.watched_workers import watched
from tests.diagnosis.rules.test_cpu_contention import samples
from traceml.database.schema import EPOCHS, FINGERPRINTS, LINE_PHASES, LINE_WORKERS
from traceml.diagnosis.facts.blamed_lines import BlamedLine
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.rules.loading_advice import WORTHWHILE, for_input
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.loading import TAKE_NS, Pipeline, RareWaits, pipeline_of
from traceml.diagnosis.steps.own_work import own_work_of

ALONE = Job(ranks=1, grouped=False)
FOLDER = LoaderFacts(dataset="Folder", num_workers=0, batch_size=8)
FIRST = RareWaits(first_share=0.9, are_whole_epochs=False, gain_with_overlap=1.0, prefetch_factor=12)
SINGLE = replace(FIRST, first_share=0.1)
EPOCH = 50
WHOLE = np.zeros(4, EPOCHS.dtype)
WHOLE["step"], WHOLE["ns"], WHOLE["first"] = np.arange(4) * EPOCH, 1000 * MS, [1, 0, 0, 0]


def pipeline(fetch: float, rest: float, cpu: float = 1.0, cores: int | None = 2, workers: int = 0) -> Pipeline:
    return Pipeline(fetch_ns=fetch * MS, fetch_cpu=cpu, rest_ns=rest * MS, cores=cores, workers=workers)


def test_one_worker_cannot_be_faster_than_its_decoding():
    """One worker for 298 ms of decoding: 393 to 298 ms, and not to 95."""
    assert pipeline(298, 95).gain(1) == pytest.approx(1.32, abs=0.01)


def test_workers_that_compute_share_the_cores():
    """Two cores have 393 ms of work per step, however many workers there are."""
    assert pipeline(298, 95).gain(2) == pytest.approx(2.0, abs=0.01)
    assert pipeline(298, 95).gain(16) == pytest.approx(2.0, abs=0.01)
    assert pipeline(298, 95).best_workers() == 2


@pytest.mark.parametrize(("batches", "gain"), [(None, 1.38), (1000, 1.38), (2, 1.16), (1, 1.0)])
def test_the_first_batch_of_an_epoch_is_waited_for_with_workers_too(batches, gain):
    """Workers begin when the loop begins: of two batches of 11 ms next to 29 ms only one is made meanwhile."""
    short = replace(pipeline(11.4, 29, cores=8), epoch_steps=batches)

    assert short.gain(1) == pytest.approx(gain, abs=0.02)


@pytest.mark.parametrize(("batches", "told"), [(3, "3 batches"), (1.4, "1 batch"), (300, ""), (None, "")])
def test_workers_are_not_ahead_in_short_epochs(batches, told):
    """Of three batches of 13 ms two workers have made none when the epoch begins: more of them gain little there."""
    short = replace(pipeline(26, 2.5, cpu=0.1, workers=2), epoch_steps=batches)

    advised = for_input(JobFacts(loader=FOLDER), short)

    assert f"and it has {told}: in longer epochs (" in advised.text or not told
    assert ("in longer epochs" in advised.text) is bool(told)


def test_an_epoch_has_the_batches_of_all_its_steps():
    """Of accumulated gradients a step has several."""
    short = replace(pipeline(26, 2.5, cpu=0.1, workers=2), epoch_steps=3)

    assert "it has 12 batches" in for_input(JobFacts(loader=FOLDER, read_micro_batches=lambda: 4.0), short).text


def test_no_advice_gains_more_than_no_waiting_at_all():
    """The first batch of each short epoch is part of what the workers were measured by already."""
    starts = np.zeros(40, EPOCHS.dtype)
    starts["step"] = np.arange(40) * 3
    loader = replace(FOLDER, num_workers=2)
    work = own_work_of(window_of(ALONE, adds("input_wait", 30)), JobFacts())
    most = work.step_ns / (work.step_ns - 30 * MS)

    found = pipeline_of(work, JobFacts(loader=loader, epochs=starts), 30 * MS)

    assert found is not None
    assert replace(found, wait_ns=np.inf).gain(8, epoch_steps=None) > 1.05 * most
    assert found.gain(8, epoch_steps=None) == pytest.approx(most)
    assert 1.0 < replace(found, wait_ns=np.inf).gain_with(0.9) == found.gain_with(0.9)


@pytest.mark.parametrize(
    ("line", "library", "named"),
    [
        (None, None, False),
        (BlamedLine("/me/data.py", 7, "Digits.__getitem__", 0.8, 90), None, True),
        (BlamedLine("/me/data.py", 7, "Digits.__getitem__", 0.8, 90), "/torch/nn/functional.py:4 interpolate", True),
        (BlamedLine("/me/train.py", 30, "main", 0.9, 90), "/torch/utils/data/dataset.py:206 __getitem__", False),
    ],
)
def test_samples_in_memory_that_code_makes_are_made_for_a_batch_at_once(line, library, named):
    """A tensor of them can be indexed; code that makes each of them has to be written for several."""
    in_memory = LoaderFacts(dataset="Digits", num_workers=0, batch_size=256, in_memory=True)
    seen = () if line is None else (SampledLine(0, "input_wait", line.file, line.line, line.function, library, 90),)

    advised = for_input(JobFacts(loader=in_memory, lines=seen), pipeline(8, 12), line)

    assert "take whole batches by indexing its tensors (data[indices])" in advised.text
    assert ("data.py:7 Digits.__getitem__ for all samples of a batch at once; at most" in advised.text) is named
    assert ("single samples; about" in advised.text) is not named


def test_the_length_of_epochs_is_known_by_their_starts():
    """Steps that waited for the first batch of an iterator, every fifth here."""
    starts = np.zeros(40, EPOCHS.dtype)
    starts["step"] = np.arange(40) * 5
    work = own_work_of(window_of(ALONE, adds("input_wait", 30)), JobFacts())

    for epochs, known in ((starts, 5.0), (starts[:1], None), (starts[:0], None)):
        found = pipeline_of(work, JobFacts(loader=FOLDER, epochs=epochs), 30 * MS)
        assert found is not None
        assert found.epoch_steps == known


@pytest.mark.parametrize(("last", "known"), [(-1, 1.0), (299, 150.0)])
def test_loaders_that_are_read_in_turns_have_no_epochs_of_one_step(last, known):
    """Two tasks, each with an endless iterator that begins in the first steps: workers gain what they do in one."""
    starts = np.zeros(2, EPOCHS.dtype)
    starts["step"], starts["ns"], starts["first"] = [0, 1], 40 * MS, [1, 0]
    work = own_work_of(window_of(ALONE, adds("input_wait", 40, every=2)), JobFacts())
    facts = JobFacts(loader=FOLDER, epochs=starts, latest=(last,), hosts={0: "h"}, cores={"h": 2})

    found = pipeline_of(work, facts, float(work.parts["input_wait"].mean()))

    assert found is not None
    assert found.epoch_steps == known
    assert ("num_workers=" in for_input(facts, found).text) == (known > 1)


@pytest.mark.parametrize(
    ("first", "says", "never", "gain"),
    [(800, "first batch of an epoch, 8", "num_workers", 2.05), (60, "num_workers=", "first batch", 1.13)],
)
def test_a_first_batch_that_takes_long_is_not_made_sooner_by_workers(first, says, never, gain):
    """A shuffle buffer is filled at the start of each epoch of 50 steps: the others have to gain by workers."""
    starts = np.zeros(4, EPOCHS.dtype)
    starts["step"], starts["ns"] = np.arange(4) * 50 + 25, (first + 2) * MS
    work = own_work_of(window_of(ALONE, adds("input_wait", 2), adds("input_wait", first, every=50)), JobFacts())
    wait_ns = float(work.parts["input_wait"].mean())

    found = pipeline_of(work, JobFacts(loader=FOLDER, epochs=starts), wait_ns)
    advised = for_input(JobFacts(loader=FOLDER, epochs=starts), found)

    assert found is not None
    assert found.step_ns(0) == pytest.approx(work.step_ns, rel=0.01)
    assert says in advised.text
    assert never not in advised.text
    assert advised.gain == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize(
    ("workers", "undivided", "told"), [(0, True, True), (1, True, True), (2, True, False), (1, False, False)]
)
def test_a_stream_has_to_be_divided_among_workers(workers, undivided, told):
    """Each worker of an iterable data set reads all of it, unless its code asks which worker runs it."""
    facts = JobFacts(loader=replace(FOLDER, is_undivided=undivided, num_workers=workers))

    text = for_input(facts, pipeline(298, 30, cores=8, workers=workers)).text

    assert "num_workers=" in text
    assert ("get_worker_info" in text) == told


def test_several_workers_that_read_the_same_are_told_to_divide_it():
    """More of them would read it more often, and not sooner."""
    fingerprints, epochs, batches = np.zeros(3, FINGERPRINTS.dtype), np.zeros(1, EPOCHS.dtype), BatchHistory()
    fingerprints["step"], fingerprints["fingerprint"] = range(3), (5, 5, 6)
    batches.add(0, fingerprints)
    facts = JobFacts(loader=replace(FOLDER, num_workers=2), batches=batches, epochs=epochs)

    assert "get_worker_info" in for_input(facts, pipeline(298, 30, cores=8, workers=2)).text


@pytest.mark.parametrize(
    ("samples", "iterable", "says", "gain"),
    [
        ((100, 100), True, "Only 2 of the 4 workers have samples of Folder to make. Give all", 2.0),
        ((0, 0, 90), True, "Only 1 of the 4 workers has samples of Folder to make. Give all", 4.0),
        ((6, 5, 8, 120), True, "Folder divides its samples unevenly: one of the 4 workers does 86 % of their wo", 3.45),
        ((30, 33, 28, 31), True, "num_workers=", None),
        ((100, 100), False, "num_workers=", None),  # batches of a data set with an index go to the workers in turns
        ((25, 25), True, "num_workers=", None),
    ],
)
def test_workers_without_samples_are_told_and_no_more_of_them(samples, iterable, says, gain):
    """An iterable data set with fewer shards than workers, or with one that is far longer."""
    loader = replace(FOLDER, num_workers=4, is_iterable=iterable, worker_samples=samples)

    advised = for_input(JobFacts(loader=loader), pipeline(298, 3, cpu=0.1, cores=8, workers=4))

    assert says in advised.text
    assert ("num_workers=" in advised.text) is (gain is None)
    assert gain is None or advised.gain == pytest.approx(gain, rel=0.01)


def test_work_of_workers_is_added_up_over_the_loaders_of_the_training():
    """A script may make its loader anew for each epoch; that of the evaluation has another length."""
    builder = JobFactsBuilder(1)
    for number, length in enumerate((600, 50, 600)):
        builder.info(0, {"kind": "loader", "number": number, "num_workers": 4, "length": length})

    for number, seen in ((0, [3, 1]), (1, [9, 9, 9, 9]), (0, [6, 2]), (2, [0, 0, 5]), (2, [True, "x"])):
        builder.info(0, {"kind": "worker_samples", "number": number, "samples": seen})

    builder.info(0, {"kind": "training_loader", "number": 2})
    loader = builder.build().loader
    assert loader is not None
    assert loader.worker_samples == (6, 2, 5)


@pytest.mark.parametrize(("method", "told"), [("__getitem__", True), ("__getitems__", False)])
def test_threads_are_not_advised_to_a_data_set_that_has_them(method: str, told: bool) -> None:
    """It fetches the samples of a batch at once already."""
    line = BlamedLine("/x/data.py", 9, f"Folder.{method}", 0.99, 60)
    facts = JobFacts(loader=replace(FOLDER, length=640))

    assert ("threads in __getitems__" in for_input(facts, pipeline(64, 8, cpu=0.1), line).text) is told


def test_workers_that_wait_may_exceed_the_cores():
    """A fetch that sleeps needs no core."""
    slow = pipeline(64, 8, cpu=0.0)

    assert slow.best_workers() == 8
    assert slow.gain(8) == pytest.approx(72 / 8.3, abs=0.01)


@pytest.mark.parametrize(("cpu", "most"), [(0.8, 2), (0.1, 16)])
def test_only_workers_that_wait_hide_slow_batches_on_a_busy_host(cpu, most):
    """Batches that take eight times the mean, as beside other programs: workers without a core make none of them."""
    uneven = replace(pipeline(20, 4, cpu=cpu), batches=((12 / 19,) * 19 + (8.0,)) * 20)

    assert 2 <= uneven.best_workers() <= most
    assert (uneven.best_workers() > 2) == (most > 2)


def test_slow_batches_that_workers_wait_for_together_cost_one_wait():
    """A download in 16 % of the batches, at random: 16 workers made real steps of 71 ms 4.1 times as fast."""
    slow = np.random.default_rng(0).random(500) < 0.16
    downloads = replace(pipeline(65, 6, cpu=0.006), batches=tuple((slow / slow.mean()).tolist()))

    assert downloads.gain(16) == pytest.approx(4.1, rel=0.15)
    assert downloads.gain(4) == pytest.approx(1.7, rel=0.15)


@pytest.mark.parametrize(("is_divided", "gain"), [(False, 1.8), (True, 3.9)])
def test_workers_of_a_divided_data_set_are_slow_together(is_divided, gain):
    """A shard that is opened after each 32 batches: each worker opens one, while the others do."""
    shards = replace(pipeline(40, 8, cpu=0.01), batches=((0.5,) * 31 + (16.5,)) * 8, is_divided=is_divided)

    assert shards.gain(4) == pytest.approx(gain, rel=0.1)


def test_a_single_core_gains_nothing_by_workers():
    """The work stays on that core."""
    assert pipeline(20, 10, cores=1).gain(4) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("loading", "loader", "says", "never"),
    [
        (pipeline(298, 95), FOLDER, "num_workers=2", "wait"),
        (pipeline(298, 95), FOLDER, "made once and cached, at most 4.1x", "more workers than cores"),
        (pipeline(64, 8, cpu=0.1), FOLDER, "A fetch spends 90 % of its time waiting", "cached"),
        (pipeline(64, 8, cpu=0.1), FOLDER, "more workers than cores; they", "__getitems__"),
        (pipeline(64, 8, cpu=0.1), replace(FOLDER, length=640), "or threads in __getitems__ that", "cached"),
        (
            pipeline(640, 5, cpu=0.02, workers=16),
            replace(FOLDER, length=640, num_workers=16),
            "or have more fetches at once (threads in __getitems__ that fetch the samples of a batch at once, or 32 w",
            "will not help",
        ),
        (
            pipeline(640, 5, cpu=0.02, workers=16),
            replace(FOLDER, is_undivided=True, num_workers=16),
            "or have more fetches at once (32 workers: at most 2.0x faster)",
            "__getitems__",
        ),
        (pipeline(640, 5, workers=16), replace(FOLDER, num_workers=16), "more workers will not help", "at once"),
        (
            pipeline(640, 5, cores=64, workers=16),
            replace(FOLDER, length=640, num_workers=16),
            "or have more fetches at once (32 workers: at most 2.0x faster)",
            "will not help",
        ),
        (
            pipeline(640, 5, cores=20, workers=16),
            replace(FOLDER, num_workers=16),
            "or have more fetches at once (20 workers: at most 1.24x faster)",
            "will not help",
        ),
        (pipeline(20, 10, cores=1), FOLDER, "cheaper", "num_workers="),
        (pipeline(40, 5, cpu=0.1, cores=None, workers=16), FOLDER, "local disk", "decode"),
        (
            pipeline(4, 10),
            LoaderFacts(dataset="Digits", in_memory=True, num_workers=0, batch_size=256),
            "data[indices]",
            "num_workers",
        ),
        (
            pipeline(40, 10),
            LoaderFacts(dataset="Photos", in_memory=True, num_workers=0, batch_size=8),
            "num_",
            "in memo",
        ),
        (FIRST, LoaderFacts(num_workers=2, persistent_workers=False), "persistent_workers=True", "num_workers"),
        (FIRST, LoaderFacts(num_workers=2, persistent_workers=True), "samples of the steps that wait", "persistent"),
        (FIRST, LoaderFacts(num_workers=2, persistent_workers=True, made=3), "Make the DataLoader once", "Set pers"),
        (SINGLE, LoaderFacts(num_workers=2, persistent_workers=False), "prefetch_factor=12", "persistent"),
        (SINGLE, LoaderFacts(num_workers=2, in_order=False), "prefetch_factor=12", "in_order"),
        (
            replace(SINGLE, prefetch_factor=None),
            LoaderFacts(num_workers=2),
            "No usual prefetch_factor",
            "prefetch_factor=",
        ),
        (
            replace(SINGLE, short_epoch=40),
            LoaderFacts(num_workers=2),
            "an epoch of 40 batches is too short for them to get ahead of such a wait: in longer epochs",
            "in_order",
        ),
        (replace(SINGLE, short_epoch=1), LoaderFacts(num_workers=2), "an epoch of 1 batch is too short", "1 batches"),
        (SINGLE, LoaderFacts(num_workers=2, made=3), "samples of the steps that wait", "Make the DataLoader once"),
        (
            pipeline(298, 95),
            replace(FOLDER, made=3),
            "num_workers=2 and persistent_workers=True in one DataL",
            "wait",
        ),
    ],
)
def test_advice_fits_the_loading(loading, loader, says, never):
    """Each advice where it is true, and not where another is."""
    text = for_input(JobFacts(loader=loader), loading).text

    assert says in text
    assert never not in text


@pytest.mark.parametrize(
    ("dataset", "function", "kept"),
    [
        ("Folder", "Folder.__getitem__", "samples"),
        ("Folder", "pad_and_collate", "batches (what collate_fn returns)"),
        ("TensorDataset", "pad", "batches (what collate_fn returns)"),  # its samples are slices
    ],
)
def test_a_cache_is_told_of_what_takes_the_time(dataset: str, function: str, kept: str) -> None:
    """A cache of samples would save nothing of what makes batches of them."""
    loader = LoaderFacts(dataset=dataset, num_workers=0, batch_size=8)
    line = BlamedLine("/x/data.py", 9, function, 0.99, 60)

    text = for_input(JobFacts(loader=loader), pipeline(298, 95), line).text

    assert f"With {kept} that are the same in each epoch, made once and cached, at most" in text


@pytest.mark.parametrize(
    ("in_memory", "says"),
    [
        (True, "Make what is done with the samples of Rows cheaper (transforms, "),
        (None, "Make the samples of Rows cheaper (decode once "),
    ],
)
def test_samples_in_memory_are_not_told_to_be_cached(in_memory, says):
    """Where more workers do not help: what takes the time is not reading them."""
    loader = LoaderFacts(dataset="Rows", in_memory=in_memory, num_workers=2, persistent_workers=True, batch_size=16)
    text = for_input(JobFacts(loader=loader), pipeline(30, 10, workers=2, cores=2)).text

    assert text.startswith(says)
    assert ("decode once and cache" in text) == (not in_memory)


def slow_samples(ms: float = 250):
    """Return a window of steps of 13.6 ms, of which each tenth waits for a slow sample."""
    window = window_of(ALONE, adds("input_wait", 1), adds("input_wait", ms, every=10))
    return own_work_of(window, JobFacts())


def taken_at_once(ms: float = 1000):
    """Return a window in which the first step of each epoch takes all batches of it, and no other step asks for one."""

    def fault(own, _) -> None:
        own["input_wait"][:] = 0
        own["input_wait"][:, ::EPOCH] = ms

    return own_work_of(window_of(ALONE, fault), JobFacts())


@pytest.mark.parametrize(("epochs", "share"), [(WHOLE[:1], 0.0), (WHOLE, 0.75)])
def test_slow_samples_are_no_restarts_of_workers(epochs, share):
    """Also with a loader for each epoch: the first batches are a part of the waiting, or none."""
    facts = JobFacts(loader=LoaderFacts(num_workers=1, made=4), epochs=epochs)

    pauses = RareWaits.of(slow_samples(), facts)

    assert pauses.first_share == pytest.approx(share, rel=0.1)
    assert not pauses.are_whole_epochs
    assert pauses.prefetch_factor == pytest.approx(2 + 250 / 12.6, abs=2)


@pytest.mark.parametrize("ahead", [None, 2, 8])
def test_a_wait_beyond_the_batches_that_are_ahead_is_covered_by_more_of_them(ahead: int | None) -> None:
    """The script may have set a prefetch_factor: workers waited for so long with it."""
    loader = LoaderFacts(num_workers=1, persistent_workers=True, prefetch_factor=ahead)

    pauses = RareWaits.of(slow_samples(150), JobFacts(loader=loader))

    assert pauses.prefetch_factor == pytest.approx((ahead or 2) + 150 / 12.6, abs=1)


@pytest.mark.parametrize(
    ("ms", "every", "short"), [(300, 44, 44), (250, 110, None), (1000, 110, 110), (250, None, None)]
)
def test_nobody_is_ahead_of_a_wait_as_long_as_half_an_epoch(ms: float, every: int | None, short: int | None) -> None:
    """With 16 workers and a prefetch_factor of 7, in epochs of 40 batches, a step took 23 ms, as before (22 ms)."""
    rows = np.repeat(WHOLE[:1], 1 if every is None else 220 // every)
    rows["step"] = np.arange(len(rows)) * (every or 0)
    facts = JobFacts(loader=LoaderFacts(num_workers=1), epochs=rows, latest=(219,))

    assert RareWaits.of(slow_samples(ms), facts).short_epoch == short


@pytest.mark.parametrize(("workers", "may_pass"), [(2, True), (1, False)])
def test_the_line_of_slow_samples_is_named(workers: int, may_pass: bool) -> None:
    """Also of workers that are idle for most of the time: they are awaited in few steps only."""
    part = LINE_PHASES[LINE_WORKERS]
    lines = (
        SampledLine(0, part, "/x/data.py", 8, "Images.__getitem__", None, 60),
        SampledLine(0, part, None, None, None, None, 140),
    )
    loader = LoaderFacts(num_workers=workers, persistent_workers=True)
    facts = JobFacts(loader=loader, lines_of_workers={0: lines}, epochs=WHOLE[:1])
    window = window_of(ALONE, adds("input_wait", 1), adds("input_wait", 250, every=10))
    verdict = diagnose(window, facts)[0]

    assert "most of the waiting is in 10 % of the steps; of the time in which the worker" in verdict.summary
    assert verdict.summary.endswith("batches, all is in data.py:8 Images.__getitem__.")
    assert "Look at what data.py:8 Images.__getitem__ does for the samples" in verdict.next
    assert ("in_order=False" in verdict.next) is may_pass


@pytest.mark.parametrize(("idle", "keep_up"), [(3, False), (60, True)])
def test_workers_that_always_make_batches_do_not_keep_up(idle: int, keep_up: bool) -> None:
    """A loop that draws from two loaders by chance waits for the slow one in few steps."""
    part = LINE_PHASES[LINE_WORKERS]
    lines = (
        SampledLine(0, part, "/x/data.py", 8, "Images.__getitem__", None, 60),
        SampledLine(0, part, None, None, None, None, idle),
    )
    facts = JobFacts(loader=LoaderFacts(num_workers=2, persistent_workers=True), lines_of_workers={0: lines})
    verdict = diagnose(window_of(ALONE, adds("input_wait", 1), adds("input_wait", 250, every=10)), facts)[0]

    assert ("2 workers do not keep up: set num_workers=" in verdict.next) is not keep_up
    assert ("prefetch_factor=" in verdict.next) is keep_up


def test_no_prefetch_is_advised_that_would_fill_the_memory():
    """A wait of hundreds of steps: each worker would have as many batches in advance."""
    assert RareWaits.of(slow_samples(5000), JobFacts(loader=LoaderFacts(num_workers=1))).prefetch_factor is None


def test_batches_that_are_taken_at_once_are_loaded_like_others():
    """`for batch in list(loader)`: workers gain what they gain for a loop over the loader, which the advice has too."""
    work, facts = taken_at_once(), JobFacts(loader=FOLDER, epochs=WHOLE, hosts={0: "h"}, cores={"h": 2})
    wait_ns = float(work.parts["input_wait"].mean())

    found = pipeline_of(work, facts, wait_ns)
    assert found is not None
    text = for_input(facts, found).text

    assert found.is_taken_ahead
    assert found.first_ns == 0
    assert found.fetch_ns == pytest.approx(wait_ns)
    assert "set num_workers=" in text
    assert "iterate over the loader in the training loop, not before it" in text
    assert "first batch" not in text


@pytest.mark.parametrize("every", [1, 2, 4])
def test_steps_that_share_a_batch_take_none_ahead(every):
    """Several steps on a batch ask for one at times, which is no epoch."""
    window = window_of(ALONE, adds("input_wait", 30, every=every))
    facts = JobFacts(loader=FOLDER, epochs=WHOLE)

    found = pipeline_of(own_work_of(window, facts), facts, 30 * MS / every)

    assert found is not None
    assert not found.is_taken_ahead


@pytest.mark.parametrize(("cores", "gain"), [(None, 1.72), (8, 1.72), (2, 1.2)])
def test_workers_of_batches_that_are_taken_at_once_could_work_beside_the_training(cores, gain):
    """21 ms of each 34 ms step: it waits for none of them with cores for all, and for some on two."""
    known = {} if cores is None else {"h": cores}
    facts = JobFacts(loader=replace(FOLDER, num_workers=2), epochs=WHOLE, hosts={0: "h"}, cores=known)

    pauses = RareWaits.of(taken_at_once(), facts)
    advised = for_input(facts, pauses)

    assert pauses.are_whole_epochs
    assert advised.gain == pytest.approx(gain, rel=0.07)
    assert "as list(loader) does" in advised.text
    assert "persistent" not in advised.text


def test_workers_that_start_once_are_not_blamed_for_pauses():
    """A run of one epoch starts them once, whether they stay or not."""
    once = JobFacts(loader=LoaderFacts(num_workers=2, persistent_workers=False), epochs=WHOLE[:1])

    assert "persistent" not in for_input(once, RareWaits.of(slow_samples(), once)).text


@pytest.mark.parametrize(("waited", "says"), [(0.83, "in memory"), (0.0, "num_workers=1"), (0.3, "num_workers=1")])
def test_samples_are_in_memory_on_a_crowded_host_too(waited, says):
    """86 us for a sample, of which a thread without a core computes for 15."""
    loader = LoaderFacts(dataset="Subset", in_memory=True, num_workers=0, batch_size=32)

    assert says in for_input(JobFacts(loader=loader, wait_of_ready_time={0: waited}), pipeline(2.74, 13)).text


@pytest.mark.parametrize(("batches", "says"), [(16.0, "data[indices]"), (1.0, "num_workers=")])
def test_samples_of_accumulated_batches_are_in_memory(batches: float, says: str) -> None:
    """A fetch of 4 ms is for 16 batches of 32 samples, 8 us each."""
    loader = LoaderFacts(dataset="Subset", in_memory=True, num_workers=0, batch_size=32)

    assert says in for_input(JobFacts(loader=loader, read_micro_batches=lambda: batches), pipeline(4, 13)).text


@pytest.mark.parametrize("batches", [1.0, 4.0])
def test_each_accumulated_batch_is_handed_over(batches: float) -> None:
    """Workers share and the training process receives all batches of a step."""
    work = own_work_of(window_of(ALONE, adds("input_wait", 30)), JobFacts())
    found = pipeline_of(work, JobFacts(loader=FOLDER, batch_tensors=9, read_micro_batches=lambda: batches), 30 * MS)
    one = pipeline_of(work, JobFacts(loader=FOLDER, batch_tensors=9), 30 * MS)

    assert found is not None
    assert one is not None
    assert (found.take_ns, found.share_ns) == (batches * one.take_ns, batches * one.share_ns)


def test_the_fetch_is_what_the_training_waits_for():
    """Without workers its CPU share is that of the training thread in the wait."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "read", None, 40, watched_ns=100_000_000, cpu_ns=20_000_000)]
    work = own_work_of(window_of(ALONE, adds("input_wait", 30)), JobFacts())
    found = pipeline_of(work, JobFacts(loader=FOLDER, lines=lines), 30 * MS)

    assert found is not None
    assert (found.fetch_ns, found.fetch_cpu) == (30 * MS, pytest.approx(0.2))
    assert found.rest_ns == pytest.approx(14 * MS, rel=0.1)


def with_one_worker(fetches_ms, rest_ms: float) -> float:
    """Return the mean step of a training with a worker that has two batches in advance at most."""
    begun, made, ended = [0.0] * 3, 0.0, 0.0
    for fetch_ms in fetches_ms:
        made = max(made, begun[-3]) + fetch_ms
        begun.append(max(made, ended))
        ended = begun[-1] + rest_ms

    return ended / len(fetches_ms)


@pytest.mark.parametrize("row", [1, 20, 400])
def test_a_worker_does_not_make_up_for_slow_batches_in_a_row(row):
    """A tenth of the batches takes 100 ms more: single ones, or 20 at a time; or all of them do."""

    def reads(own, _) -> None:
        own["input_wait"] += np.where(np.arange(410) % (10 * row) < row, 100.0, 0.0)

    work = own_work_of(window_of(Job(ranks=1, steps=410, grouped=False), reads), JobFacts())
    fetches_ms = work.parts["input_wait"][0] / MS
    fetch_ms = float(fetches_ms.mean())
    found = pipeline_of(work, JobFacts(loader=FOLDER), fetch_ms * MS)

    assert found is not None
    rest_ms = work.step_ns / MS - fetch_ms
    assert found.gain(1) == pytest.approx((fetch_ms + rest_ms) / with_one_worker(fetches_ms, rest_ms), rel=0.15)


def with_workers(fetches_ms, rest_ms: float, workers: int) -> float:
    """Return the mean step of a training whose workers make batches in turns, each two in advance at most."""
    begun, made, ended = [0.0] * (2 * workers), [0.0] * workers, 0.0
    for number, fetch_ms in enumerate(fetches_ms):
        at = number % workers
        made[at] = max(made[at], begun[-2 * workers]) + fetch_ms
        begun.append(max(made[at], ended))
        ended = begun[-1] + rest_ms

    return ended / len(fetches_ms)


@pytest.mark.parametrize("workers", [2, 8, 16])
def test_workers_do_not_make_up_for_a_rare_long_batch(workers):
    """One of 100 batches waits for a file server for 2 s: the other workers are ahead of it by two batches each."""
    work = own_work_of(
        window_of(Job(ranks=1, steps=410, grouped=False), adds("input_wait", 2000, every=100)), JobFacts()
    )
    fetches_ms = work.parts["input_wait"][0] / MS
    fetch_ms = float(fetches_ms.mean())
    found = pipeline_of(work, JobFacts(loader=FOLDER), fetch_ms * MS)

    assert found is not None
    rest_ms = work.step_ns / MS - fetch_ms
    played_ms = with_workers(fetches_ms, rest_ms, workers)
    assert found.gain(workers) == pytest.approx((fetch_ms + rest_ms) / played_ms, rel=0.1)


@pytest.mark.parametrize("wait_share", [0.0, 0.4])
def test_a_fetch_that_uses_all_cores_gains_nothing_by_workers(wait_share):
    """Threads of a library, as of a tokenizer, compute for the training thread, which waits for them."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "read", None, 40, watched_ns=100_000_000, cpu_ns=190_000_000)]
    work = own_work_of(window_of(ALONE, adds("input_wait", 300)), JobFacts())
    facts = JobFacts(loader=FOLDER, lines=lines, wait_of_ready_time={0: wait_share}, hosts={0: "h"}, cores={"h": 2})
    found = pipeline_of(work, facts, 300 * MS)

    assert found is not None
    assert found.fetch_cpu == pytest.approx(1.9)
    assert found.gain(found.best_workers()) < 1.1
    assert found.best_workers() <= 2


@pytest.mark.parametrize(("ready", "share"), [(0.98, 0.97), (0.4, 0.33)])
def test_a_fetch_that_is_over_in_milliseconds_waits_for_no_longer_than_its_thread_sleeps(ready, share):
    """Samples watched the few fetches that lost their core: by the kernel the thread was asleep for 2 % of the time."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "read", None, 40, watched_ns=40_000_000, cpu_ns=1_600_000)]
    lacks = {"wait_of_ready_time": {0: 0.5}, "wait_of_wall_time": {0: ready / 2}}
    lines = [replace(lines[0], cpu_ns=6_600_000)] if ready < 0.5 else lines
    work = own_work_of(window_of(ALONE, adds("input_wait", 30)), JobFacts())
    found = pipeline_of(work, JobFacts(loader=FOLDER, lines=lines, **lacks), 30 * MS)

    assert found is not None
    assert found.fetch_cpu == pytest.approx(share, abs=0.01)


def test_waiting_for_a_core_is_work():
    """A thread that waited for a core a third of the time would compute more on a core of its own."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "read", None, 40, watched_ns=100_000_000, cpu_ns=60_000_000)]
    work = own_work_of(window_of(ALONE, adds("input_wait", 30)), JobFacts())
    found = pipeline_of(work, JobFacts(loader=FOLDER, lines=lines, wait_of_ready_time={0: 0.4}), 30 * MS)

    assert found is not None
    assert found.fetch_cpu == pytest.approx(1.0)


def test_busy_workers_make_a_batch_per_step_each():
    """Three workers, each three steps long: with six the step is half as long if they wait."""
    work = own_work_of(window_of(ALONE, adds("input_wait", 86)), JobFacts())
    facts = JobFacts(loader=LoaderFacts(num_workers=3), workers=watched(3, busy=0.05), hosts={0: "h"}, cores={"h": 4})
    found = pipeline_of(work, facts, 86 * MS)

    assert found is not None
    assert found.fetch_ns == pytest.approx(300 * MS, rel=0.05)
    assert found.gain(6) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("library", "says", "never"),
    [
        ("Connection._recv", "Set num_workers=0: a step's data takes", "do not keep up"),
        ("_PollLikeSelector.select", "num_workers=8", "The workers keep"),
    ],
)
def test_more_workers_are_not_advised_where_batches_are_ready(library, says, never):
    """Workers that are idle for most of the time are not late if the training process is seen receiving."""
    starts = SampledLine(0, "input_wait", "a.py", 1, "train", "/lib/multiprocessing/a.py:1 SemLock.__init__", 45)
    lines = [SampledLine(0, "input_wait", "a.py", 1, "train", f"/lib/multiprocessing/a.py:1 {library}", 40), starts]
    work = own_work_of(window_of(ALONE, adds("input_wait", 14)), JobFacts())
    loader = LoaderFacts(dataset="Sums", num_workers=4, batch_size=64)
    usual = {"loader": loader, "lines": lines, "hosts": {0: "h"}, "cores": {"h": 2}}
    facts = JobFacts(workers=watched(4, busy=0.03), **usual)
    found = pipeline_of(work, facts, 14 * MS)

    assert found is not None
    assert found.step_ns(4) == pytest.approx(work.step_ns, rel=0.02)
    text = for_input(facts, found).text
    assert says in text
    assert never not in text


@pytest.mark.parametrize(
    ("tensors", "size", "most"),
    [(0, 0, 11.5), (2, 1e5, 11.3), (60, 1e5, 5.2), (2, 60e6, 3.4)],
    ids=["unknown", "two small tensors", "many tensors", "large tensors"],
)
def test_workers_gain_no_more_than_handing_over_their_batches_leaves(tensors, size, most):
    """On two cores that have hardly other work: workers share each tensor, and the training process receives it."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "read", None, 40, 1000 * MS, 20 * MS)]
    work = own_work_of(window_of(ALONE, adds("input_wait", 150)), JobFacts())
    usual = {"loader": FOLDER, "hosts": {0: "h"}, "cores": {"h": 2}, "lines": lines}
    facts = JobFacts(batch_tensors=tensors, batch_bytes=int(size), samples=samples(busy=0.1), **usual)
    found = pipeline_of(work, facts, work.step_ns - 14 * MS)

    assert found is not None
    assert 0.9 * most < found.gain(found.best_workers()) <= most


@pytest.mark.parametrize(("receiving", "gain"), [(0, 3.0), (30, 2.2)])
def test_more_workers_do_not_shorten_the_receiving(receiving, gain):
    """Of the samples in which the training waits, some are in taking a batch over: that time stays."""
    seen = ((100 - receiving, "_PollLikeSelector.select"), (receiving, "Connection._recv"))
    lines = [
        SampledLine(0, "input_wait", "a.py", 1, "train", f"/lib/multiprocessing/a.py:1 {name}", count)
        for count, name in seen
    ]
    work = own_work_of(window_of(ALONE, adds("input_wait", 86)), JobFacts())
    usual = {"loader": LoaderFacts(num_workers=3), "hosts": {0: "h"}, "cores": {"h": 4}}
    found = pipeline_of(work, JobFacts(workers=watched(3, busy=0.05), lines=lines, **usual), 86 * MS)

    assert found is not None
    assert found.gain(9) == pytest.approx(gain, rel=0.15)


def test_the_handover_of_workers_is_no_work_of_a_process_without_them() -> None:
    """A batch of 600 tensors took 3 ms without workers, and 146 with two, whose threads handed its tensors over."""
    part = LINE_PHASES[LINE_WORKERS]
    made = (
        SampledLine(0, part, None, None, None, None, 120),
        SampledLine(0, part, "/me/train.py", 4, "main", None, 8),
    )
    taken = SampledLine(0, "input_wait", "/me/train.py", 4, "main", "/lib/multiprocessing/a.py:1 Connection._recv", 100)
    work = own_work_of(window_of(ALONE, adds("input_wait", 130)), JobFacts())
    loader = replace(FOLDER, num_workers=2)
    usual = {"lines": [taken], "lines_of_workers": {0: made}, "hosts": {0: "h"}, "cores": {"h": 2}}

    found = pipeline_of(work, JobFacts(loader=loader, workers=watched(2, busy=0.3), **usual), 130 * MS)

    assert found is not None
    assert found.is_handover
    assert found.fetch_ns == pytest.approx(2 * work.step_ns * 8 / 128)


@pytest.mark.parametrize(("unpickling", "is_told"), [(60, True), (5, False)])
def test_objects_that_the_training_unpickles_are_no_tensors(unpickling: int, is_told: bool) -> None:
    """A collate function that returns lists of dictionaries: they are unpickled within `Queue.get`."""
    functions = {"queues.py:98 Queue.get": unpickling, "connection.py:390 Connection._recv": 40}
    lines = [
        SampledLine(0, "input_wait", "/me/train.py", 4, "main", f"/lib/multiprocessing/{name}", count)
        for name, count in functions.items()
    ]
    work = own_work_of(window_of(ALONE, adds("input_wait", 3)), JobFacts())
    loader = replace(FOLDER, num_workers=1)
    facts = JobFacts(loader=loader, workers=watched(1, busy=0.9), lines=lines, hosts={0: "h"}, cores={"h": 2})

    found = pipeline_of(work, facts, 3 * MS)

    assert found is not None
    text = for_input(facts, replace(found, is_handover=True, take_ns=found.wait_ns)).text
    assert ("Return tensors in place of many Python objects" in text) is is_told
    assert ("tensor by tensor" in text) is not is_told


@pytest.mark.parametrize(
    ("making", "busy", "keeps_up"), [(15, 0.1, True), (60, 0.1, False), (5, 0.1, None), (15, 0.6, False)]
)
def test_a_worker_that_is_idle_keeps_up(making, busy, keeps_up):
    """Seen waiting for orders, and not in a fetch that sleeps: the training waits for a core, or for the handover."""
    part, idle = LINE_PHASES[LINE_WORKERS], 80 if keeps_up is not None else 20
    lines = [
        SampledLine(0, part, None, 0, None, None, idle),
        SampledLine(0, part, "/me/train.py", 4, "pack", None, making),
    ]
    work = own_work_of(window_of(ALONE, adds("input_wait", 3)), JobFacts())
    usual = {"lines_of_workers": {0: lines}, "hosts": {0: "h"}, "cores": {"h": 2}}
    facts = JobFacts(loader=replace(FOLDER, num_workers=1), workers=watched(1, busy=busy), **usual)

    found = pipeline_of(work, facts, 3 * MS)

    assert found is not None
    text = for_input(facts, found).text
    assert ("The worker keeps up" in text) == bool(keeps_up)
    assert ("do not keep up" in text or "does not keep up" in text) != bool(keeps_up)


@pytest.mark.parametrize(("making", "idle", "keeps_up"), [(2, 20, True), (0, 0, False), (4, 18, False), (2, 3, False)])
def test_few_samples_suffice_of_a_worker_that_is_hardly_ever_at_work(making: int, idle: int, keeps_up: bool) -> None:
    """It is seen in few batches, and its use is not known, as it was started by a fork server."""
    part = LINE_PHASES[LINE_WORKERS]
    lines = [
        SampledLine(0, part, None, 0, None, None, idle),
        SampledLine(0, part, None, 0, None, "/a.py:1 get", making),
    ]
    work = own_work_of(window_of(ALONE, adds("input_wait", 3)), JobFacts())
    facts = JobFacts(loader=replace(FOLDER, num_workers=1), lines_of_workers={0: lines}, hosts={0: "h"}, cores={"h": 2})

    found = pipeline_of(work, facts, 3 * MS)

    assert found is not None
    assert ("The worker keeps up" in for_input(facts, found).text) is keeps_up


def test_a_handover_that_costs_less_than_making_the_batch_keeps_the_workers():
    """Each of two workers computes for most of the time: without them the step would be longer."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "train", "/lib/multiprocessing/a.py:1 Connection._recv", 40)]
    work = own_work_of(window_of(ALONE, adds("input_wait", 4)), JobFacts())
    usual = {"loader": LoaderFacts(num_workers=2), "lines": lines, "hosts": {0: "h"}, "cores": {"h": 8}}
    workers = JobFacts(workers=watched(2, busy=0.6), **usual)
    found = pipeline_of(work, workers, 4 * MS)

    assert found is not None
    advised = for_input(workers, found)
    assert "Put a batch into fewer tensors" in advised.text
    assert advised.gain == pytest.approx(found.gain(take_ns=TAKE_NS))


@pytest.mark.parametrize(
    ("watched_s", "ready", "says"),
    [
        (2, 0.95, "; about 1.84x faster on 2 cores. With samples that are the same in each epoch"),
        (2, 0.2, "num_workers=6 and persistent_workers=True; at most 5.9x faster on 2 cores. A fetch spends 80 %"),
        (0, 0.0, "; about 1.76x faster on 2 cores. With samples that are the same in each epoch, made once and "),
    ],
)
def test_workers_of_short_epochs_compute_or_wait_as_they_were_sampled(watched_s: int, ready: float, says: str) -> None:
    """They are gone before their use of cores is known. Where neither is, nothing is said of it."""
    times = {"watched_ns": watched_s * 10**9, "cpu_ns": int(ready * watched_s * 1e9)}
    lines = [SampledLine(0, LINE_PHASES[LINE_WORKERS], "/me/train.py", 4, "fetch", None, 80, **times)]
    loader = replace(FOLDER, num_workers=1, number=0)
    facts = JobFacts(loader=loader, loaders={0: (loader,)}, lines_of_workers={3: lines}, hosts={0: "h"}, cores={"h": 2})
    work = own_work_of(window_of(ALONE, adds("input_wait", 86)), JobFacts())

    found = pipeline_of(work, facts, 86 * MS)

    assert found is not None
    assert says in for_input(facts, found).text


@pytest.mark.parametrize("in_memory", [True, False])
def test_workers_only_add_copies_to_samples_in_memory(in_memory: bool) -> None:
    """Eight workers for a TensorDataset keep up, but handing batches over takes longer than making them."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "train", "/lib/multiprocessing/a.py:1 Connection._recv", 40)]
    work = own_work_of(window_of(ALONE, adds("input_wait", 4)), JobFacts())
    loader = LoaderFacts(num_workers=8, dataset="TensorDataset", in_memory=in_memory, batch_size=1024)
    usual = {"loader": loader, "lines": lines, "hosts": {0: "h"}, "cores": {"h": 2}}
    facts = JobFacts(workers=watched(8, busy=0.1), **usual)
    found = pipeline_of(work, facts, 4 * MS)

    assert found is not None
    advised = for_input(facts, found)
    assert ("is in memory: use no workers" in advised.text) is in_memory
    assert ("The workers keep up" in advised.text) is not in_memory
    assert advised.gain is not None
    assert advised.gain > WORTHWHILE


@pytest.mark.parametrize(("fetching", "instead"), [(60, False), (5, True)])
def test_a_fetch_that_waits_takes_as_long_in_the_training_process(fetching, instead):
    """Workers hardly compute: they were seen in a fetch that waits for a server, or waiting for orders."""
    library = "/lib/multiprocessing/a.py:1 Connection._recv"
    made = [
        SampledLine(0, LINE_PHASES[LINE_WORKERS], None, 0, None, None, 100 - fetching),
        SampledLine(0, LINE_PHASES[LINE_WORKERS], "/me/train.py", 4, "fetch", None, fetching),
    ]
    work = own_work_of(window_of(ALONE, adds("input_wait", 86)), JobFacts())
    facts = JobFacts(
        loader=LoaderFacts(num_workers=2),
        lines=[SampledLine(0, "input_wait", "a.py", 1, "train", library, 40)],
        lines_of_workers={0: made},
        workers=watched(2, busy=0.05),
        hosts={0: "h"},
        cores={"h": 8},
    )
    found = pipeline_of(work, facts, 86 * MS)

    assert found is not None
    assert ("Set num_workers=0" in for_input(facts, found).text) is instead


@pytest.mark.parametrize(
    ("workers", "says"), [(8, "Try num_workers=0, or 1: there are 8 workers for 2 cores."), (2, "Try num_workers=0.")]
)
def test_workers_whose_batches_cost_nothing_are_to_be_left_out(workers: int, says: str) -> None:
    """Workers that start anew in each epoch are not watched; fewer tensors would gain nothing."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "train", "/lib/multiprocessing/a.py:1 Connection._recv", 40)]
    work = own_work_of(window_of(ALONE, adds("input_wait", 60)), JobFacts())
    loader = LoaderFacts(num_workers=workers)
    facts = JobFacts(loader=loader, lines=lines, hosts={0: "h"}, cores={"h": 2})
    found = pipeline_of(work, facts, 60 * MS)

    assert found is not None
    assert found.gain(take_ns=TAKE_NS) < WORTHWHILE
    advised = for_input(facts, found)
    assert says in advised.text
    assert advised.gain is None


def test_workers_that_answer_late_because_they_compute_do_not_keep_up():
    """Two workers compute all the time, on cores enough: the step would be as long without waits for answers."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "train", "/lib/multiprocessing/a.py:1 Connection._recv", 40)]
    work = own_work_of(window_of(ALONE, adds("input_wait", 14)), JobFacts())
    usual = {"loader": LoaderFacts(dataset="Rows", num_workers=2), "lines": lines, "hosts": {0: "h"}, "cores": {"h": 8}}
    facts = JobFacts(workers=watched(2, busy=0.97), **usual)

    found = pipeline_of(work, facts, 14 * MS)

    assert found is not None
    advised = for_input(facts, found)
    assert "2 workers do not keep up" in advised.text
    assert advised.gain == pytest.approx(found.step_ns(2) / found.step_ns(advised.workers))


def test_workers_bound_to_one_core_gain_by_all_of_them():
    """Four workers that share a core of four: each computes for a quarter of the time and waits for the rest."""
    work = own_work_of(window_of(ALONE, adds("input_wait", 86)), JobFacts())
    usual = {"loader": LoaderFacts(num_workers=4), "hosts": {0: "h"}, "cores": {"h": 8}}
    bound = JobFacts(workers=watched(4, busy=0.25, waited=0.75, cores=1), **usual)
    found = pipeline_of(work, bound, 86 * MS)
    free = pipeline_of(work, JobFacts(workers=watched(4, busy=0.95, cores=8), **usual), 86 * MS)

    assert found is not None
    assert free is not None
    assert found.step_ns(4) == pytest.approx(work.step_ns, rel=0.02)
    assert found.gain(worker_cores=None) == pytest.approx(4.0, rel=0.05)
    assert found.gain(16) == pytest.approx(1.0)
    assert (found.worker_cores, free.worker_cores) == (1, None)
    assert "may use only 1 core of 8" in for_input(bound, found).text
    assert "may use only" not in for_input(bound, free).text


def test_workers_that_wait_for_cores_gain_nothing_by_more_of_them():
    """On cores that other programs use as well, more workers would wait, too."""
    work = own_work_of(window_of(ALONE, adds("input_wait", 86)), JobFacts())
    facts = JobFacts(
        loader=LoaderFacts(num_workers=2),
        workers=watched(2, busy=0.3, waited=0.65, cores=2),
        hosts={0: "h"},
        cores={"h": 2},
    )
    found = pipeline_of(work, facts, 86 * MS)

    assert found is not None
    assert found.gain(8) == pytest.approx(1.0, abs=0.1)


def test_waiting_of_workers_for_a_core_is_no_waiting_for_files():
    """Four workers on two cores that other programs take: what they lack is cores, and more of them have no more."""
    facts = JobFacts(
        loader=LoaderFacts(dataset="Digits", num_workers=4),
        workers=watched(4, busy=0.1, waited=0.85, cores=2),
        hosts={0: "h"},
        cores={"h": 2},
    )
    found = pipeline_of(own_work_of(window_of(ALONE, adds("input_wait", 86)), facts), facts, 86 * MS)

    assert found is not None
    assert found.takes_cpu
    assert "A fetch spends" not in for_input(facts, found).text


def test_waits_at_the_starts_of_epochs_are_pauses():
    """One long wait in 50 steps tells nothing about a usual batch; one in three is that of three workers."""

    def pauses(own: dict[str, np.ndarray], _random: np.random.Generator) -> None:
        own["input_wait"][:, ::50] += 500

    facts = JobFacts(loader=LoaderFacts(num_workers=3))
    assert pipeline_of(own_work_of(window_of(ALONE, pauses), facts), facts, 10 * MS) is None
    every_third = own_work_of(window_of(ALONE, adds("input_wait", 60, every=3)), facts)
    assert pipeline_of(every_third, facts, 20 * MS) is not None


def test_a_crowded_host_promises_no_more_than_its_own_cores_give():
    """Four fifths of the time the thread waits for a core: with cores of its own, two of them give at most 2x."""
    lines = [SampledLine(0, "input_wait", "a.py", 1, "read", None, 40, watched_ns=100_000_000, cpu_ns=20_000_000)]
    made = samples(busy=0.2)
    facts = JobFacts(
        loader=FOLDER,
        lines=lines,
        samples=made,
        wait_of_ready_time={0: 0.8},
        wait_of_wall_time={0: 0.8},
        hosts={0: "h"},
        cores={"h": 2},
    )
    work = own_work_of(window_of(ALONE, adds("input_wait", 30)), facts)

    found = pipeline_of(work, facts, 30 * MS)

    assert found is not None
    assert found.rest_cores == pytest.approx(1.0, abs=0.1)
    assert found.gain(8) == pytest.approx(2.0, abs=0.1)
    assert "x faster if the run has 2 cores to itself" in for_input(facts, found).text


def test_the_training_uses_no_more_cores_than_torch_has_threads():
    """Samples of a short run contain its start: 1.9 cores of a process with one thread."""
    work = own_work_of(window_of(ALONE, adds("input_wait", 30)), JobFacts())

    for threads, cores in ((1, 1.0), (4, 2.9), (None, 2.9)):
        found = pipeline_of(work, JobFacts(loader=FOLDER, samples=samples(busy=1.6), threads=threads), 30 * MS)
        assert found is not None
        assert found.rest_cores == pytest.approx(cores, abs=0.2)


IN_WORKERS = tuple(
    SampledLine(0, "workers", "/x/data.py", line, function, None, samples)
    for line, function, samples in ((7, "Photos.decode", 60), (8, "Photos.augment", 30))
)


@pytest.mark.parametrize(
    ("lines", "workers", "says", "gain"),
    [
        (IN_WORKERS, 2, "Make data.py:7 Photos.decode cheaper", 1.5),
        (IN_WORKERS[1:], 2, "Make data.py:8 Photos.augment cheaper", 2.0),  # all of the time
        ((), 2, "Make the samples of Photos cheaper", 2.0),
        (IN_WORKERS, 0, "Make the samples of Photos cheaper", 2.0),  # of workers that evaluate
    ],
)
def test_the_line_of_the_workers_is_named_with_its_share(lines, workers, says, gain):
    """A third of the time in which workers make batches is not in that line: it is no part of the gain."""
    loader = LoaderFacts(dataset="Photos", num_workers=workers, batch_size=1)
    facts = JobFacts(loader=loader, lines_of_workers={0: lines}, hosts={0: "h"}, cores={"h": 1})
    (found, *_) = diagnose(window_of(ALONE, adds("input_wait", 500)), facts)

    assert says in found.next
    assert found.speedup_if_fixed == pytest.approx(gain, rel=0.1)
    named = workers and bool(lines)
    assert ("; of the time in which the workers make batches, " in found.summary) == named
    assert ("file" in found.evidence) == named


@pytest.mark.parametrize(("waiting", "keep_up"), [(180, True), (4, False)])
def test_no_line_of_workers_is_named_where_they_keep_up(waiting, keep_up):
    """Training waits to receive their batches. If they make batches all the time, they only answer late, too."""
    idle = SampledLine(0, "workers", None, None, None, None, waiting)
    loader = LoaderFacts(dataset="Photos", num_workers=2, batch_size=8)
    receives = SampledLine(
        0, "input_wait", None, None, None, "/python/multiprocessing/connection.py:1 Connection._recv", 90
    )
    facts = JobFacts(
        loader=loader, lines=(receives,), lines_of_workers={0: (*IN_WORKERS, idle)}, hosts={0: "h"}, cores={"h": 2}
    )
    (found, *_) = diagnose(window_of(ALONE, adds("input_wait", 8)), facts)

    assert ("The workers keep up" in found.next) == keep_up
    assert ("data.py" in found.summary + found.next) != keep_up


def test_no_line_of_another_loader_or_of_idle_workers_is_named():
    """An evaluation has a loader of its own; workers that mostly wait make nobody wait."""
    loader = LoaderFacts(dataset="Photos", num_workers=2, batch_size=1, number=1)
    idle = SampledLine(0, "workers", None, None, None, None, 300)
    for lines in ({0: IN_WORKERS}, {1: (*IN_WORKERS, idle)}):
        facts = JobFacts(loader=loader, lines_of_workers=lines, hosts={0: "h"}, cores={"h": 1})
        (found, *_) = diagnose(window_of(ALONE, adds("input_wait", 500)), facts)

        assert "data.py" not in found.summary + found.next
