"""Shares of a step in the words of a finding: those of its bar, or the finding names what they leave out."""

from __future__ import annotations

import pytest

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
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
