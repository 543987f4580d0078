"""Which line a finding names, and when it names none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from msgspec import structs

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.blamed_lines import BlamedLine, blamed_line, is_waiting, outside_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
TOKENIZER = "/lib/transformers/tokenization_utils_fast.py:500 _batch_encode_plus"


def line(part: str, function: str, samples: int, rank: int = 0, number: int = 7) -> SampledLine:
    return SampledLine(rank, part, "/home/me/train.py", number, function, None, samples)


def found(kind: Kind, *lines: SampledLine, part: str = "other", job: Job = ALONE, **facts):
    window = window_of(job, adds(part, 10))
    facts = JobFacts(world_size=job.ranks, lines=lines, **facts)
    return next(each for each in diagnose(window, facts) if each.kind is kind)


def test_the_line_of_other_code_is_named():
    """10.3 of 24.1 ms are other code, so 43 of 100 samples are."""
    finding = found(Kind.RESIDUAL_HEAVY, line("other", "update_metric", 43), line("forward", "forward", 57))

    evidence = finding.evidence
    assert (evidence["file"], evidence["line"], evidence["function"]) == ("/home/me/train.py", 7, "update_metric")
    assert evidence["line_share"] == pytest.approx(0.43, abs=0.03)
    assert finding.headline == "43 % of step time is spent in train.py:7 update_metric"
    assert "train.py:7 update_metric" in finding.summary
    assert "train.py:7 update_metric" in finding.next


@pytest.mark.parametrize(("share", "says"), [(0.5, "98 % of it in"), (0.8, "at least 61 % of it in")])
def test_the_share_of_a_line_that_samples_miss_is_its_least(share: float, says: str) -> None:
    """On busy cores code that holds the GIL is seen less often than it runs."""
    lines = [line("other", "spin", 98), line("other", "log", 2), line("forward", "forward", 100)]

    named = blamed_line(lines, "other", share)

    assert named is not None
    assert named.of_it.startswith(f", {says} ")


def test_waiting_inside_a_phase_does_not_hide_a_late_rank_s_line() -> None:
    """Ranks wait for each other in backward, which the hooks count as communication: a gradient's hook is late."""
    usual = [line("backward", "train", 85, rank=0), line("forward", "forward", 15, rank=0)]
    late = [line("backward", "train", 40, rank=1), line("forward", "forward", 15, rank=1)]
    hook = line("backward", "slow_gradient", 45, rank=1, number=9)

    named = blamed_line([*usual, *late, hook], "backward", 0.6, [1], [0], waiting=0.25)
    assert named is not None
    assert (named.place, named.share) == ("train.py:9 slow_gradient", 0.75)
    assert blamed_line([*usual, *late, hook], "backward", 0.6, [1], [0]) is None

    slow = [line("backward", "train", 85, rank=1), line("forward", "forward", 15, rank=1)]
    less = [line("backward", "train", 30, rank=0), line("forward", "forward", 70, rank=0)]
    all_of_it = blamed_line([*less, *slow], "backward", 0.6, [1], [0], waiting=0.25)
    assert all_of_it is not None
    assert all_of_it.share == 1.0


def test_imports_inside_steps_are_not_blamed():
    """A library that imports modules in the first steps, which are not judged, hides no line of the others."""
    importing = "<frozen importlib._bootstrap>:1165 _find_and_load"
    imports = SampledLine(0, "other", "/home/me/train.py", 9, "main", importing, 60)
    finding = found(Kind.RESIDUAL_HEAVY, imports, line("other", "update_metric", 43), line("forward", "forward", 57))

    assert finding.evidence["function"] == "update_metric"
    assert finding.evidence["line_share"] == pytest.approx(0.43, abs=0.03)

    trainer = [SampledLine(0, part, "/home/me/train.py", 9, "main", None, 30) for part in ("backward", "optimizer")]
    finding = found(Kind.RESIDUAL_HEAVY, imports, line("forward", "forward", 57), *trainer)
    assert "_find_and_load" not in finding.summary


UNFED = Job(ranks=1, steps=220, grouped=False, own={"forward": 4.0, "backward": 8.0, "optimizer": 1.5, "other": 0.3})


def test_an_iterator_that_is_no_loader_is_waited_for():
    """Its time is measured as other code; its samples tell that the training waits for data."""
    lines = [line("input_wait", "read_shard", 43), line("forward", "forward", 57)]
    finding = found(Kind.INPUT_BOUND, *lines, job=UNFED)

    assert (finding.phase, finding.evidence["function"]) == ("input_wait", "read_shard")
    assert "train.py:7 read_shard" in finding.summary
    window = window_of(UNFED, adds("other", 10))
    assert [each.kind for each in diagnose(window, JobFacts(world_size=1, lines=lines))] == [Kind.INPUT_BOUND]


@pytest.mark.parametrize(("cpu_ms", "unless"), [(10, False), (90, True)])
def test_a_thread_is_for_batches_that_are_waited_for(cpu_ms: int, *, unless: bool):
    """Code that makes batches in Python, and that of the model, take turns in one process."""
    times = {"watched_ns": 100_000_000, "cpu_ns": cpu_ms * 1_000_000}
    read = msgspec.structs.replace(line("input_wait", "read_shard", 43), **times)
    finding = found(Kind.INPUT_BOUND, read, line("forward", "forward", 57), job=UNFED)

    assert "fetch the next batch in a thread while the model computes" in finding.next
    assert ("if making a batch waits" in finding.next) is unless


@pytest.mark.parametrize(
    "library",
    [
        "/lib/python3.11/threading.py:295 Condition.wait",
        "/lib/python3.11/multiprocessing/connection.py:390 Connection._recv",
    ],
)
def test_a_queue_that_runs_empty_is_not_told_to_use_a_thread(library):
    """Another thread or process fills it already: batches in half the time, and no more, halve the step."""
    waits = SampledLine(0, "input_wait", "/home/me/train.py", 7, "main", library, 43)
    finding = found(Kind.INPUT_BOUND, waits, line("forward", "forward", 57), job=UNFED)
    read = found(Kind.INPUT_BOUND, line("input_wait", "read", 43), line("forward", "forward", 57), job=UNFED)

    assert finding.next.startswith("The threads or processes that make the batches do not keep up: make batches cheap")
    assert "other threads" not in finding.next
    assert "Or, if making a batch waits (for a disk, a network), fetch the next batch in a thread while" in read.next
    assert "train.py:7 main" in finding.summary
    assert "without any of it steps would be" not in finding.summary  # it gains no more than half the time does
    assert "Half the time for a batch makes the run at most 1.77x faster" in finding.next
    assert "num_workers=1; at most 1.7" in read.next
    assert finding.speedup_if_fixed == pytest.approx(1.77, abs=0.01)


def test_an_iterator_that_takes_most_of_the_time_gains_what_cores_give():
    """Batches of 100 ms beside 14 ms: two cores make them twice as fast, and no more."""
    window = window_of(UNFED, adds("other", 100))
    lines = [line("input_wait", "read", 88), line("forward", "forward", 12)]
    finding = diagnose(window, JobFacts(world_size=1, lines=lines, hosts={0: "h"}, cores={"h": 2}))[0]

    assert "without any of it steps would be 8.5x faster" in finding.summary
    assert "num_workers=2; at most 2.0x faster on 2 cores." in finding.next
    assert finding.speedup_if_fixed == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("forward", "number", "trains", "runs_model"),
    [
        ("collect", 7, "main", True),
        ("collect", 8, "main", True),
        ("collect", 8, "collect", False),
        ("main", 7, "main", False),
    ],
)
def test_an_iterator_that_calls_the_model_is_not_moved_to_workers(forward, number, trains, *, runs_model):
    """As one that collects experience: a loader worker has no model that learns."""
    calls, step = line("forward", forward, 57, number=number), line("backward", trains, 20, number=9)
    finding = found(Kind.INPUT_BOUND, line("input_wait", "collect", 43), calls, step, job=UNFED)

    assert finding.next.startswith("The iterator calls a model.") is runs_model
    assert ("num_workers" in finding.next) is not runs_model


def test_a_loop_of_one_line_that_waits_for_a_queue_is_not_told_to_use_processes() -> None:
    """Its actors are processes already; the line, in which all else runs too, is not named."""
    receives = "/lib/python3.11/multiprocessing/connection.py:390 Connection._recv"
    libraries = {
        "input_wait": receives,
        "backward": "/torch/autograd/graph.py:9 f",
        "optimizer": "/torch/optim/adam.py:9 f",
    }
    lines = [
        SampledLine(0, part, "/home/me/train.py", 7, "<module>", library, 43) for part, library in libraries.items()
    ]
    finding = found(Kind.INPUT_BOUND, *lines, job=UNFED)

    assert finding.next.startswith("The threads or processes that make the batches do not keep up: ")
    assert "train.py" not in finding.summary


def test_what_the_thread_that_fills_a_queue_does_is_named():
    """The line that waits says nothing about why."""
    library = "/lib/python3.11/threading.py:295 Condition.wait"
    waits = SampledLine(0, "input_wait", "/home/me/train.py", 7, "main", library, 43)
    usual = (waits, line("forward", "forward", 57))

    finding = found(Kind.INPUT_BOUND, *usual, job=UNFED, thread_lines=(line("threads", "unpack", 40),))
    several = [line("threads", name, 20) for name in ("unpack", "write_log", "watch")]
    unknown = found(Kind.INPUT_BOUND, *usual, job=UNFED, thread_lines=several)

    assert "make batches cheaper (other threads of the process are mostly in train.py:7 unpack), or" in finding.next
    assert "other threads" not in unknown.next


@pytest.mark.parametrize(("function", "is_loss"), [("triplet_loss", True), ("Contrastive.loss", True), ("crop", False)])
def test_a_loss_is_not_told_to_leave_the_training_loop(function, is_loss):
    """It loops over pairs in Python, and backward takes as long for the graph of it."""
    finding = found(Kind.RESIDUAL_HEAVY, line("other", function, 43), line("forward", "forward", 57))

    assert ("out of the training loop" in finding.next) is not is_loss
    assert ("backward follows these operations" in finding.next) is is_loss


@pytest.mark.parametrize(
    ("samples", "others", "may_be_loss"),
    [
        (9, (), True),
        (1, (), False),
        (9, ("backward",), False),  # the training loop, whose other lines compute no loss
    ],
)
def test_a_function_that_calls_a_loss_is_not_told_to_leave_the_training_loop(samples, others, may_be_loss):
    """A contrastive one compares with a memory bank before it does."""
    parts = [line(part, "nce", 57) for part in others]
    loss = SampledLine(0, "other", "/home/me/train.py", 9, "nce", "/torch/nn/functional.py:3472 cross_entropy", samples)
    finding = found(Kind.RESIDUAL_HEAVY, line("other", "nce", 43), loss, line("forward", "forward", 57), *parts)

    assert finding.next.startswith("Make train.py:7 nce cheaper. If it computes the loss, use fewer") is may_be_loss
    assert ("out of the training loop" in finding.next) is not may_be_loss


@pytest.mark.parametrize(("forward", "is_of_model"), [("Bayes.forward", True), ("Net.forward", False), ("main", False)])
def test_a_method_of_a_layer_is_not_told_to_leave_the_training_loop(forward: str, is_of_model: bool) -> None:
    """The divergence that a layer adds to the loss: its class is a model's, as its `forward` runs."""
    finding = found(Kind.RESIDUAL_HEAVY, line("other", "Bayes.kl", 43), line("forward", forward, 57))

    assert ("If it computes the loss, use fewer operations" in finding.next) is is_of_model
    assert ("out of the training loop" in finding.next) is not is_of_model


@pytest.mark.parametrize(
    ("others", "updates", "called", "role"),
    [
        (("forward",), (), None, "is a part of the model"),  # a method of a flow, which calls its networks
        (("forward",), (), TOKENIZER, ""),  # it makes what it calls the model with
        ((), ("/home/me/train.py", "precondition"), None, "changes gradients or weights"),
        (("forward", "backward"), (), None, ""),  # the training loop
    ],
)
def test_what_a_step_needs_is_not_told_to_leave_the_training_loop(
    others: Sequence[str], updates: tuple[str, ...], called: str | None, role: str
) -> None:
    """It computes by the model's layers, or with the gradients."""
    parts = [line(part, "precondition", 28) for part in others]
    own_updates = frozenset({updates} if updates else ())

    finding = found(
        Kind.RESIDUAL_HEAVY, structs.replace(line("other", "precondition", 43), library=called),
        line("forward", "forward", 57), *parts, own_updates=own_updates,
    )  # fmt: skip

    assert f"cheaper. If it {role}," in finding.next if role else "out of the training loop" in finding.next


@pytest.mark.parametrize(("backward_ms", "may_be_loss"), [(9.0, True), (4.0, False)])
def test_code_that_backward_follows_may_be_the_loss(backward_ms: float, may_be_loss: bool) -> None:
    """A soft alignment of sequences loops over operations of torch; no gradient flows through a metric."""
    job = replace(ALONE, own={**ALONE.own, "forward": 1.0, "backward": backward_ms})

    finding = found(Kind.RESIDUAL_HEAVY, line("other", "soft_dtw", 43), line("forward", "forward", 57), job=job)

    assert ("If it computes the loss, use fewer operations" in finding.next) is may_be_loss
    assert ("out of the training loop" in finding.next) is not may_be_loss
    assert ("steps would be at least" in finding.summary) is may_be_loss  # backward takes less time without it, too


@pytest.mark.parametrize(
    ("lines", "job"),
    [
        ([line("input_wait", "read_shard", 20), line("other", "update_metric", 23)], UNFED),  # more is other code
        ([line("input_wait", "read_shard", 20)], UNFED),  # too few
        ([line("input_wait", "__getitem__", 40), line("other", "update_metric", 3)], ALONE),  # a loader's own wait
    ],
)
def test_other_code_that_is_no_iterators(lines, job):
    """It stays other code."""
    assert found(Kind.RESIDUAL_HEAVY, *lines, job=job).phase == "other"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line("other", "update_metric", 9), line("forward", "forward", 12)],  # too few
        [line("other", "update_metric", 90), line("forward", "forward", 10)],  # more than the hooks measured
        [line("other", "update_metric", 40), line("forward", "forward", 160)],  # less than half of what they measured
        [*(line("other", f"part_{n}", 5) for n in range(9)), line("forward", "forward", 60)],  # none stands out
        [SampledLine(0, "other", None, None, None, None, 43), line("forward", "forward", 57)],  # not the user's code
    ],
)
def test_no_line_is_named_where_samples_do_not_tell(lines):
    """The phase is told, without a line."""
    finding = found(Kind.RESIDUAL_HEAVY, *lines)

    assert "file" not in finding.evidence
    assert "code outside the known phases" in finding.headline
    assert "train.py" not in finding.summary + finding.next


def test_the_most_frequent_line_of_the_function_is_named():
    """A function's lines count together."""
    lines = [line("other", "f", 10, number=3), line("other", "f", 30, number=4), line("other", "g", 20)]

    blamed = blamed_line(lines, "other", 1.0)

    assert (blamed.function, blamed.line) == ("f", 4)
    assert blamed.share == pytest.approx(40 / 60)


@pytest.mark.parametrize(
    ("of_it", "besides", "named"),
    [(9, 0, False), (10, 0, True), (7, 3, False), (18, 4, True), (14, 8, False), (28, 17, False), (31, 14, True)],
)
def test_few_samples_name_a_line_if_half_of_the_phase_is_certain(of_it, besides, named):
    """A training of a second has 20 to 30 samples."""
    lines = [line("other", "decode", of_it), line("other", "main", besides), line("forward", "forward", 10)]

    share = (of_it + besides) / (of_it + besides + 10)
    assert (blamed_line(lines, "other", share) is not None) is named


def test_from_35_samples_on_a_function_that_leads_is_named():
    """Half of the phase, twice any other: 55 % is not certainly more than half, but nothing else may be the most."""
    rest = [line("other", f"part_{n}", 5) for n in range(4)]
    second = [line("other", "second", 17), line("other", "third", 3)]

    assert blamed_line([line("other", "tokenize", 25), *rest], "other", 1.0).share_text == "56 %"
    assert blamed_line([line("other", "tokenize", 25), *second], "other", 1.0) is None
    assert blamed_line([line("other", "tokenize", 17), *rest[:3]], "other", 1.0) is None  # fewer than 35


def test_of_two_functions_with_45_percent_none_is_named():
    """By chance one of them has half of the samples, more often where these are few."""
    random = np.random.default_rng(0)
    named = 0
    for _ in range(2000):
        counts = random.multinomial(int(random.integers(10, 200)), [0.45, 0.45, 0.1])
        functions = zip(("first", "second", "third"), counts.tolist(), strict=True)
        named += blamed_line([line("other", *each) for each in functions], "other", 1.0) is not None

    assert named <= 0.03 * 2000


def test_few_samples_give_no_percentage():
    """18 of 22 samples are 82 % with an error of 16: the sentences say "most"."""
    lines = [line("other", "decode", 18), line("other", "main", 4), line("forward", "forward", 29)]
    finding = found(Kind.RESIDUAL_HEAVY, *lines)

    assert finding.evidence["function"] == "decode"
    assert "line_share" not in finding.evidence
    assert finding.headline == (
        "43 % of step time is spent in code outside the known phases, mostly in train.py:7 decode"
    )
    assert ", most of it in train.py:7 decode" in finding.summary


TORCH = "/lib/torch/optim/optimizer.py:1023 Optimizer.zero_grad"


@pytest.mark.parametrize(
    "clearing",
    [
        SampledLine(0, "other", "/home/me/train.py", 7, "train", TORCH, 40),
        SampledLine(0, "other", "/home/me/optim.py", 9, "Optimizer.zero_grad", None, 40),
    ],
)
def test_clearing_gradients_is_no_code_of_the_loop(clearing):
    """By torch's optimizer or an own one; it stays a finding where it is the smaller part."""
    forward = line("forward", "forward", 60)
    window, kinds = window_of(ALONE, adds("other", 3)), {}
    for rest in (4, 400):
        lines = (clearing, line("other", "update_metric", rest), forward)
        kinds[rest] = [each.kind for each in diagnose(window, JobFacts(lines=lines))]

    assert Kind.RESIDUAL_HEAVY not in kinds[4]
    assert Kind.RESIDUAL_HEAVY in kinds[400]


def test_a_name_that_only_ends_like_it_counts():
    """`my_zero_grad` is the user's own function."""
    lines = (line("other", "my_zero_grad", 40), line("forward", "forward", 60))

    assert Kind.RESIDUAL_HEAVY in [
        each.kind for each in diagnose(window_of(ALONE, adds("other", 10)), JobFacts(lines=lines))
    ]


def test_lines_of_a_module_are_not_added():
    """A script without functions: one line has most of the phase, or none does and none is named."""
    forward = line("forward", "forward", 57)
    most = [line("other", "<module>", 30, number=8), line("other", "<module>", 13, number=9), forward]
    halves = [line("other", "<module>", 21, number=8), line("other", "<module>", 22, number=9), forward]

    named = blamed_line(most, "other", 0.43)

    assert named is not None
    assert (named.line, named.share) == (8, pytest.approx(30 / 43))
    assert blamed_line(halves, "other", 0.48) is None
    assert outside_line([line("startup", "<module>", 40, number=n) for n in (1, 2, 3)], "startup") is None


@pytest.mark.parametrize(
    ("first", "second", "rest", "told"),
    [(54, 38, 8, True), (54, 38, 80, False), (20, 10, 0, False)],
)
def test_two_lines_that_have_most_of_it_together_are_advised_on(first, second, rest, told):
    """Two histograms in each step of a notebook: neither line has certainly half of the time."""
    seen = [line("other", "<module>", first, number=41), line("other", "<module>", second, number=42)]
    others = [line("other", f"part_{n}", rest // 8) for n in range(8)]
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30))
    forward = line("forward", "forward", (first + second + rest) // 2)
    found = next(each for each in diagnose(window, JobFacts(lines=(*seen, *others, forward))) if each.phase == "other")

    assert "file" not in found.evidence
    assert found.next.startswith("Look at train.py:41 and train.py:42, which have ") == told


def test_two_lines_are_advised_on_where_one_of_them_runs_in_rare_steps_only():
    """Samples do not tell which: both have most of the time in every step and in every tenth."""
    seen = (line("other", "metric", 51, number=41), line("other", "log", 47, number=42), line("forward", "forward", 90))
    window = window_of(Job(ranks=1, grouped=False), adds("other", 6), adds("other", 60, every=10))
    found = [each for each in diagnose(window, JobFacts(lines=seen)) if each.phase == "other"]
    usual = next(each for each in found if "every_n_steps" not in each.evidence)

    assert "not counting rare long steps" in usual.summary
    assert "file" not in usual.evidence
    assert "train.py:41 metric and train.py:42 log, which have 100 % of it and the rare long steps: make" in usual.next


def test_a_share_is_what_the_function_has_at_least():
    """Half of the step is in the phase, but only 40 of 100 samples: the rest of it was not seen."""
    blamed = blamed_line([line("other", "f", 40), line("forward", "forward", 60)], "other", 0.5)

    assert blamed.share == pytest.approx(0.8)


def test_a_dataset_in_the_training_process_has_a_line_and_workers_have_none():
    """With workers the training thread waits in the loop's own line."""
    lines = (line("input_wait", "Files.__getitem__", 43), line("forward", "forward", 57))

    without = found(Kind.INPUT_BOUND, *lines, part="input_wait", loader=LoaderFacts(num_workers=0))
    with_workers = found(Kind.INPUT_BOUND, *lines, part="input_wait", loader=LoaderFacts(num_workers=4))

    assert without.evidence["function"] == "Files.__getitem__"
    assert "file" not in with_workers.evidence


def test_a_straggler_is_blamed_for_what_the_others_do_not_do():
    """Both ranks run `common`, mostly; rank 1 alone runs `extra`."""
    window = window_of(Job(), adds("other", 20), adds("other", 15, (1,)))
    lines = [
        line("other", "common", 100), line("backward", "step", 100),
        line("other", "common", 100, rank=1), line("other", "extra", 75, rank=1), line("backward", "step", 70, rank=1),
    ]  # fmt: skip

    findings = diagnose(window, JobFacts(world_size=2, lines=tuple(lines)))
    blame = next(each for each in findings if each.kind is Kind.STRAGGLER)

    assert blame.ranks == (1,)
    assert blame.evidence["function"] == "extra"
    assert "train.py:7 extra" in blame.summary


def test_a_straggler_is_blamed_for_the_line_that_the_others_are_not_in():
    """Both ranks are in line 7 of one function most of the time; rank 1 alone is in its line 9."""
    window = window_of(Job(), adds("other", 20), adds("other", 15, (1,)))
    lines = [
        line("other", "train", 100), line("backward", "step", 100), line("backward", "step", 60, rank=1),
        line("other", "train", 100, rank=1), line("other", "train", 95, rank=1, number=9),
    ]  # fmt: skip

    findings = diagnose(window, JobFacts(world_size=2, lines=tuple(lines)))
    blame = next(each for each in findings if each.kind is Kind.STRAGGLER)

    assert "train.py:9 train" in blame.summary


@pytest.mark.parametrize(
    ("on_core", "waited", "waits"),
    [(0.02, 0.0, True), (0.4, 0.0, True), (0.6, 0.0, False), (0.02, 0.44, True), (0.2, 0.44, False)],
)
def test_code_that_lacks_a_core_does_not_sleep(on_core: float, waited: float, waits: bool) -> None:
    """Beside other programs a line may be on a core for a fifth of its time, and compute all the while."""
    second = 1_000_000_000
    seen = SampledLine(
        0, "other", "/x/train.py", 12, "append", None, 50, watched_ns=second, cpu_ns=int(on_core * second)
    )
    append = BlamedLine("/x/train.py", 12, "append", 1.0, 50)

    assert is_waiting([seen], "other", append, waited) is waits


@pytest.mark.parametrize(
    ("called", "on_core", "waits"),
    [
        ("/lib/multiprocessing/connection.py:390 Connection._recv", 0.2, True),
        ("/lib/multiprocessing/connection.py:390 Connection._recv", 0.5, False),
        ("/lib/json/decoder.py:353 JSONDecoder.raw_decode", 0.2, False),
    ],
    ids=["receives answers", "receives large ones", "computes"],
)
def test_what_only_waits_does_so_beside_other_programs(called: str, on_core: float, waits: bool) -> None:
    """A fifth of its time on a core is that of the calls before and after it."""
    second = 1_000_000_000
    seen = SampledLine(
        0, "other", "/x/ppo.py", 21, "VecEnv.step", called, 50, watched_ns=second, cpu_ns=int(on_core * second)
    )

    assert is_waiting([seen], "other", BlamedLine("/x/ppo.py", 21, "VecEnv.step", 1.0, 50), 0.44) is waits


@pytest.mark.parametrize(("run", "waits"), [(0.89, False), (0.4, True)])
def test_a_thread_that_is_hardly_asleep_does_not_wait(run: float, waits: bool) -> None:
    """Where forward is called hundreds of times, samples watch only the calls that lost their core for long."""
    sample = SampledLine(0, "forward", "/x/train.py", 9, "sample", None, 95, watched_ns=25_000_000, cpu_ns=1_000_000)
    rest = SampledLine(0, "backward", "/x/train.py", 20, "main", None, 235)
    facts = JobFacts(lines=(sample, rest), wait_of_wall_time={0: 0.1}, wait_of_ready_time={0: 0.1 / (0.1 + run)})

    assert facts.waits_in("forward", BlamedLine("/x/train.py", 9, "sample", 0.8, 95)) is waits


@pytest.mark.parametrize(("function", "is_of_loop"), [("main", True), ("crop", False)])
def test_a_line_of_the_loop_itself_may_compute_the_loss(function, is_of_loop):
    """The function of the line calls backward, too: its samples are in no function with a name of its own."""
    lines = (line("other", function, 43), line("forward", "forward", 17), line("backward", "main", 40))
    finding = found(Kind.RESIDUAL_HEAVY, *lines)

    assert (
        "cheaper, or, unless it computes the loss or updates weights, take it out of the training" in finding.next
    ) is is_of_loop
    assert ("cheaper, or take it out of the training loop" in finding.next) is not is_of_loop


@pytest.mark.parametrize(
    ("library", "ran", "waits"),
    [
        ("/lib/threading.py:295 Condition.wait", 0.1, True),
        ("/lib/threading.py:295 Condition.wait", 0.95, False),
        ("/lib/json/encoder.py:200 JSONEncoder.encode", 0.1, False),
        (None, 0.1, False),
    ],
)
def test_a_wait_that_is_too_short_to_be_watched_is_known_by_its_function(library, ran, waits) -> None:
    """The result of a future after some milliseconds, in a thread that hardly runs."""
    seen = [SampledLine(0, "other", "/x/train.py", 13, "main", library, 83), line("forward", "forward", 17)]

    assert is_waiting(seen, "other", BlamedLine("/x/train.py", 13, "main", 0.83, 83), asleep=1.0 - ran) is waits


@pytest.mark.parametrize(
    ("called", "threads", "is_named"),
    [
        ("/lib/threading.py:295 Condition.wait", ("decode",), True),
        ("/lib/threading.py:295 Condition.wait", (), False),
        (None, ("decode",), False),
    ],
    ids=["for a pool of threads", "for other processes", "for a sleep"],
)
def test_what_other_threads_do_is_named_where_the_training_waits_for_them(called, threads, is_named) -> None:
    """The batches of each step are decoded in threads, whose lines are sampled, too."""
    second = 1_000_000_000
    waits = SampledLine(0, "other", "/x/train.py", 13, "main", called, 43, watched_ns=second, cpu_ns=0)
    others = [line("threads", name, 40) for name in threads]

    finding = found(Kind.RESIDUAL_HEAVY, waits, line("forward", "forward", 57), thread_lines=others)

    assert "without it steps would be at most 1.75x faster" in finding.summary  # others may take as long
    assert finding.next.startswith("train.py:13 main waits there ")
    assert ("Other threads of the process are mostly in train.py:7 decode: if it waits for them" in finding.next) is (
        is_named
    )
    assert ("find out for what" in finding.next) is not is_named


@pytest.mark.parametrize(("cpu", "told"), [(0.7, True), (0.01, False)])
def test_threads_that_compute_are_named_where_the_training_polls(cpu: float, told: bool) -> None:
    """`while not batches: time.sleep(0.001)`, until a thread has made one. One of a progress bar sleeps, too."""
    second = 1_000_000_000
    polls = SampledLine(0, "other", "/x/train.py", 13, "take", None, 43, watched_ns=second, cpu_ns=0)
    threads = [structs.replace(line("threads", "decode", 40), watched_ns=second, cpu_ns=int(cpu * second))]

    finding = found(Kind.RESIDUAL_HEAVY, polls, line("forward", "forward", 57), thread_lines=threads)

    assert "find out for what" in finding.next
    assert ("Meanwhile other threads of the process are mostly in train.py:7 decode" in finding.next) is told
    assert ("in a thread." in finding.next) is not told


@pytest.mark.parametrize(
    ("shares", "within"),
    [
        ({20: 90, 60: 10}, ""),
        ({20: 60, 21: 25, 60: 15}, " (lines 20-21)"),
        ({14: 25, 20: 60, 60: 15}, " (lines 14-20)"),
        ({14: 20, 20: 30, 21: 25, 22: 25}, " (lines 20-22)"),
        ({3: 30, 20: 40, 60: 30}, " (lines 3-60)"),
    ],
)
def test_a_line_of_the_training_loop_is_told_with_those_around_it(shares: dict[int, int], within: str) -> None:
    """All code of a script may be in one function: its main line does not have all that the function takes."""
    loop = [line("other", "main", samples, number=number) for number, samples in shares.items()]
    finding = found(Kind.RESIDUAL_HEAVY, *loop, line("backward", "main", 60, number=18), line("forward", "f", 70))

    assert finding.headline.endswith(f"% of step time is spent in train.py:20 main{within}")
    assert f"all of it in train.py:20 main{within};" in finding.summary
    assert finding.evidence.get("lines") == ([int(n) for n in within[8:-1].split("-")] if within else None)


def test_lines_of_a_function_of_one_part_belong_together() -> None:
    """It is named, with the line that it is in most."""
    lines = [line("other", "update", samples, number=number) for number, samples in ((20, 60), (21, 40))]
    finding = found(Kind.RESIDUAL_HEAVY, *lines, line("backward", "main", 60, number=18), line("forward", "f", 70))

    assert "all of it in train.py:20 update;" in finding.summary
    assert "lines" not in finding.evidence
