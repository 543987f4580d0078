"""Shares of a step in the words of a finding: those of its bar, or the finding names what they leave out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.formatting import percent_text

OWN = {"input_wait": 0.5, "forward": 10.0, "backward": 20.0, "optimizer": 2.0, "other": 0.5}
NOISY = Job(ranks=1, steps=220, grouped=False, own=OWN, sigma=0.4)


def found(kind: Kind, *faults, facts: JobFacts | None = None) -> tuple[Finding, str]:
    """Return the finding, and the share of its phase as the bars show it."""
    window = window_of(NOISY, *faults)
    (finding,) = (each for each in diagnose(window, facts or JobFacts()) if each.kind is kind)
    phase = finding.phase or ""
    return finding, percent_text(float(window.times[phase].mean() / window.total.mean()))


@pytest.mark.parametrize(
    ("kind", "phase"), [(Kind.RESIDUAL_HEAVY, "other"), (Kind.INPUT_BOUND, "input_wait"), (Kind.H2D_BOUND, "h2d")]
)
def test_a_finding_has_the_share_of_its_bar(kind, phase):
    """Not one point less, for steps that vary."""
    finding, share = found(kind, adds(phase, 12.0), adds(phase, 12.0, chance=0.1))

    assert f"step ({share})" in finding.summary
    assert percent_text(finding.cost_share) == share


def test_rare_long_steps_are_not_counted():
    """They are jitter, and much of the time."""
    finding, share = found(Kind.RESIDUAL_HEAVY, adds("other", 12.0), adds("other", 400.0, chance=0.03))

    assert ", not counting rare long steps)" in finding.summary
    assert share not in finding.summary


def test_clearing_gradients_is_not_counted():
    """It is in the bar, and no code of the user."""
    lines = [
        SampledLine(0, "other", "a.py", 3, "train", None, 80),
        SampledLine(0, "other", "a.py", 4, "train", "zero_grad", 20),
    ]
    finding, _ = found(Kind.RESIDUAL_HEAVY, adds("other", 20.0), facts=JobFacts(lines=lines))

    assert ", not counting clearing gradients)" in finding.summary


@pytest.mark.parametrize("function", ["train", "<module>"])
def test_the_line_is_of_what_counts(function: str) -> None:
    """The line of `zero_grad` was named, which does not count; in a module's own code none was."""
    lines = [
        SampledLine(0, "other", "a.py", 3, function, "/lib/torch/optim/swa_utils.py:30 update_parameters", 35),
        SampledLine(0, "other", "a.py", 4, function, "/lib/torch/optim/optimizer.py:9 Optimizer.zero_grad", 45),
        SampledLine(0, "other", "a.py", 9, function, None, 20),
        SampledLine(0, "backward", "a.py", 2, function, None, 80),
    ]
    finding, _ = found(Kind.RESIDUAL_HEAVY, adds("other", 20.0), facts=JobFacts(lines=tuple(lines)))

    assert ", not counting clearing gradients)" in finding.summary
    assert (finding.evidence["line"], finding.evidence["function"]) == (3, function)


@pytest.mark.parametrize(("name", "is_loss"), [("cross_entropy", True), ("mse_loss", True), ("interpolate", False)])
def test_a_loss_is_not_counted(name: str, is_loss: bool) -> None:
    """It is computation of the model, as where it is a module; without it there is no training."""
    lines = [
        SampledLine(0, "other", "a.py", 3, "train", None, 80),
        SampledLine(0, "other", "a.py", 4, "train", f"/lib/torch/nn/functional.py:3472 {name}", 20),
    ]
    finding, _ = found(Kind.RESIDUAL_HEAVY, adds("other", 20.0), facts=JobFacts(lines=lines))

    assert (", not counting the loss)" in finding.summary) is is_loss


@pytest.mark.parametrize(("elsewhere", "share"), [("log", 97), ("train", 75)])
def test_the_line_has_its_share_of_what_counts(elsewhere: str, share: int) -> None:
    """The loss is no part of the cost, wherever it is called: the shares of headline, sentence and gain agree."""
    lines = [
        SampledLine(0, "other", "a.py", 3, "log", None, 60),
        SampledLine(0, "other", "a.py", 9, "train", None, 20 if elsewhere == "train" else 0),
        SampledLine(0, "forward", "a.py", 2, "train", None, 130),
        SampledLine(0, "other", "a.py", 4, elsewhere, "/lib/torch/nn/functional.py:3472 cross_entropy", 20),
    ]
    finding, _ = found(Kind.RESIDUAL_HEAVY, adds("other", 20.0), facts=JobFacts(lines=lines))

    assert f"{share} % of it in a.py:3 log" in finding.summary
    assert finding.evidence["line_share"] == pytest.approx(finding.cost_share * share / 100, rel=0.02)
    assert finding.speedup_if_fixed == pytest.approx(1 / (1 - finding.evidence["line_share"]), rel=0.02)


def test_the_line_has_its_share_of_what_a_step_loses() -> None:
    """Ranks that wait for a lock, one after the other, spend less in it on average than the last one does."""
    uneven = Job(ranks=2, steps=220, own={**OWN, "other": 12.0}, sigma=0.5)
    lines = [
        SampledLine(rank, part, "a.py", 3, name, None, count)
        for rank in range(2)
        for part, name, count in (("other", "read", 50), ("backward", "train", 100))
    ]
    said = diagnose(window_of(uneven), JobFacts(world_size=2, lines=lines))
    finding = next(each for each in said if each.kind is Kind.RESIDUAL_HEAVY)

    assert finding.cost_share > 1.02 * finding.evidence["phase_ms"] / finding.evidence["step_ms"]
    assert finding.evidence["line_share"] == pytest.approx(finding.cost_share, rel=0.02)


def test_a_line_that_is_mostly_the_loss_is_not_named() -> None:
    """Half of the rest is elsewhere."""
    lines = [
        SampledLine(0, "forward", "a.py", 2, "main", None, 130),
        SampledLine(0, "other", "a.py", 3, "log", None, 42),
        SampledLine(0, "other", "a.py", 4, "train", "/lib/torch/nn/functional.py:3472 cross_entropy", 20),
        SampledLine(0, "other", "a.py", 5, "train", None, 38),
    ]
    finding, _ = found(Kind.RESIDUAL_HEAVY, adds("other", 20.0), facts=JobFacts(lines=lines))

    assert ", most of it in" not in finding.summary
    assert "of it in a.py:5 train" not in finding.summary


def test_a_loss_that_takes_longer_than_the_model_counts() -> None:
    """It is called more than once, as for each sample: less than forward takes is not counted."""
    lines = [SampledLine(0, "other", "a.py", 4, "train", "/lib/torch/nn/functional.py:3472 cross_entropy", 100)]
    finding, _ = found(Kind.RESIDUAL_HEAVY, adds("other", 60.0), facts=JobFacts(lines=lines))

    assert 0.3 < finding.cost_share < 0.9


def test_a_save_at_the_end_is_not_counted():
    """Scripts save and end: the window's last step is in the bar alone."""

    def saves(own, _) -> None:
        own["checkpoint"][:, [50, 100, 150, 219]] = 600

    finding, _ = found(Kind.CHECKPOINT_STALLS, saves)

    assert "not counting the one in the last step" in finding.summary
    assert "not counting" not in found(Kind.CHECKPOINT_STALLS, adds("checkpoint", 600.0, every=50))[0].summary


def test_a_little_clearing_of_gradients_counts():
    """Else the finding would have a point less than its bar, and not say why."""
    lines = [
        SampledLine(0, "other", "a.py", 3, "train", None, 985),
        SampledLine(0, "other", "a.py", 4, "train", "zero_grad", 15),
    ]
    finding, share = found(Kind.RESIDUAL_HEAVY, adds("other", 60.0), facts=JobFacts(lines=lines))

    assert f"step ({share})" in finding.summary
    assert percent_text(finding.cost_share) == share


@pytest.mark.parametrize(("cores", "is_told"), [(2, True), (8, False)])
def test_advice_that_gains_less_than_the_waiting_costs_says_so(cores, is_told):
    """On two cores a second worker takes part of what the training computes with: 60 % of a step, but 2x faster."""
    facts = JobFacts(loader=LoaderFacts(num_workers=0), hosts={0: "h"}, cores={"h": cores})
    window = window_of(Job(ranks=1, grouped=False), adds("input_wait", 20))
    waiting = next(each for each in diagnose(window, facts) if each.kind is Kind.INPUT_BOUND)

    assert ("(60 %); without any of it steps would be 2.5x faster." in waiting.summary) is is_told
    assert (waiting.speedup_if_fixed < 0.9 / (1 - waiting.cost_share)) is is_told


@pytest.mark.parametrize(
    ("part", "kind"), [("input_wait", Kind.INPUT_BOUND), ("other", Kind.INPUT_BOUND), ("h2d", Kind.H2D_BOUND)]
)
def test_a_cost_is_what_steps_lose_also_where_ranks_have_it_longer(part: str, kind: Kind) -> None:
    """In each step another rank waits 12 ms less and computes 12 ms more: without any waiting that one remains."""

    def one_is_short(own, random) -> None:
        steps = np.arange(400)
        ranks = random.integers(0, 4, len(steps))
        own[part] += 20.0
        own[part][ranks, steps] -= 12.0
        own["forward"][ranks, steps] += 12.0

    lines = [
        SampledLine(rank, name, "a.py", 9, "main", "/lib/x.py:3 read", count)
        for rank in range(4)
        for name, count in (("input_wait", 70), ("backward", 30))
    ]  # of an iterator: no loader waits
    loading = {"loader": LoaderFacts(num_workers=0)} if part == "input_wait" else {"lines": lines}
    job = Job(ranks=4, steps=400, own={**OWN, "input_wait": 0.0, "forward": 4.0, "backward": 8.0})
    said = diagnose(window_of(job, one_is_short), JobFacts(world_size=4, **loading))
    finding = next(each for each in said if each.kind is kind)

    lost_ms = finding.cost_share * finding.evidence["step_ms"]
    assert lost_ms < 0.6 * finding.evidence["phase_ms"]
    assert f"{lost_ms:.3g} ms of each " in finding.summary
    assert finding.speedup_if_fixed == pytest.approx(1 / (1 - finding.cost_share), rel=0.02)


def test_the_gain_beside_another_cause_is_that_of_the_run():
    """A late rank is not fixed with the loading: its time stays in the step."""
    window = window_of(Job(ranks=4), adds("forward", 20, (2,)), adds("input_wait", 10))
    by_kind = {each.kind: each for each in diagnose(window, JobFacts(world_size=4))}

    waiting = by_kind[Kind.INPUT_BOUND]
    assert by_kind[Kind.COMPUTE_STRAGGLER].ranks == (2,)
    assert waiting.speedup_if_fixed == pytest.approx(1 / (1 - waiting.cost_share), rel=0.03)


def test_a_late_rank_that_hides_another_says_why_it_gains_less():
    """With the first one fixed, the others wait for the second."""
    window = window_of(Job(ranks=4), adds("forward", 30, (1,)), adds("other", 12, (2,)))
    late = diagnose(window, JobFacts(world_size=4))[0]

    assert late.speedup_if_fixed < 0.9 / (1 - late.cost_share)
    assert late.summary.endswith("steps would be 1.66x faster, not more, as other differences between ranks remain.")


@pytest.mark.parametrize(("samples", "ms", "is_told"), [(30, 6.0, False), (200, 6.0, True), (30, 12.0, True)])
def test_a_small_cost_without_a_place_is_told_if_enough_samples_looked_for_it(samples, ms, is_told):
    """A trainer of a library takes 10-16 % of short steps itself: its user has no line to look at."""
    places = [
        SampledLine(0, "other", f"/me/{at}.py", 5, "act", "/lib/trainer.py:9 call", samples // 10) for at in range(10)
    ]
    rest = SampledLine(0, "backward", "/me/train.py", 8, "main", "/lib/torch/autograd/graph.py:9 run", 6 * samples)
    facts = JobFacts(lines=(*places, rest))
    findings = diagnose(window_of(NOISY, adds("other", ms)), facts)

    assert (Kind.RESIDUAL_HEAVY in [each.kind for each in findings]) is is_told


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "make it cheaper (torch.compile); otherwise"),
        ({"accelerator": "cuda"}, "make it cheaper (torch.compile, a lower precision); otherwise"),
        ({"accelerator": "cuda", "autocast": True, "compile_s": 4.0}, "make it cheaper; otherwise"),
    ],
)
def test_a_forward_without_modules_is_told_what_it_does_not_do_yet(facts: dict[str, object], says: str) -> None:
    """On a CPU fewer bits take longer, as a rule."""
    plain = replace(NOISY, own={**OWN, "forward": 0.0, "other": 30.0, "optimizer": 1.0})

    finding = next(each for each in diagnose(window_of(plain), JobFacts(**facts)) if each.phase == "other")

    assert "so the model's forward is in this time, too" in finding.next
    assert says in finding.next
