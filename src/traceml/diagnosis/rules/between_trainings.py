"""Set-up between the trainings of a run: each fold or trial loads data and makes a model before its first step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import LINE_OUTSIDE, LINE_PHASES
from traceml.diagnosis.facts.blamed_lines import TORCH, BlamedLine, calls_code, outside_line, own_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.rules.jitter import LONG_NS, excess_over_usual
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import LINE_SHARE, OwnWork
from traceml.diagnosis.steps.speedup import saved_ns, speedup
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import gain_text, ns_text, percent_text, phase_words

__all__ = ["set_up_between"]

MIN_BEGINS = 2
"""One training after another is no series: the second may be another phase of it."""
MIN_TRAINING_STEPS = 20
"""Fewer steps with an optimizer of their own are the inner loop of one training, as in meta-learning."""
MIN_SETUP_SHARE = 0.6
"""Trainings with a set-up are at least this share of those that begin."""
_PART = "other"
_OUTSIDE = LINE_PHASES[LINE_OUTSIDE]


def set_up_between(
    window: AlignedSteps, work: OwnWork, facts: JobFacts, step_ns: float
) -> tuple[list[Finding], dict[str, Floats]]:
    """Return the finding about set-up between trainings, and other code as it would be without.

    It is counted for the step before, which ends when the next one begins, or for that one after an evaluation. It has
    no part in how steps vary, however regular the trainings are.
    """
    begins = np.intersect1d(facts.trainings_begin, window.steps)
    if len(begins) < MIN_BEGINS or facts.collects or _PART not in work.parts:
        return [], {}

    if np.median(np.diff(facts.trainings_begin)) < MIN_TRAINING_STEPS:
        return [], {}

    at, values = np.searchsorted(window.steps, begins), work.parts[_PART]
    columns = np.unique(np.concatenate([at - 1, at]))
    excess = np.zeros_like(values)
    excess[:, columns] = excess_over_usual(values, columns)
    longest = excess.max(axis=0)
    each_ns = np.asarray(longest[at - 1] + longest[at], np.float64)
    usually: dict[str, Floats] = {_PART: values - excess}
    saved = saved_ns(work, usually)
    is_usual = (each_ns >= LONG_NS).sum() >= max(MIN_SETUP_SHARE * len(begins), MIN_BEGINS)
    if not is_usual or saved < least_cost_ns(step_ns):
        return [], {}

    return [_finding(work, facts, each_ns, saved, step_ns)], usually


def _finding(work: OwnWork, facts: JobFacts, each_ns: NDArray[np.float64], saved: float, step_ns: float) -> Finding:
    """Return the finding.

    Args:
        each_ns: time of each set-up.
        saved: time by which the mean step would be shorter.
    """
    share, gain = saved / step_ns, speedup(step_ns, saved)
    phase_share = float(work.parts[_PART].mean()) / step_ns
    held = saved >= LINE_SHARE * phase_share * step_ns
    own = own_line(facts.lines, _PART, phase_share) if held else None
    line = own or _line_after_evaluation(facts, float(each_ns.sum()))
    trainings, each = len(facts.trainings_begin) + 1, ns_text(float(each_ns.mean()))
    what = line.place if line else "what the script does there"
    see = "" if line else " `traceml report --lines` shows the lines."
    return Finding.of(
        Kind.RESIDUAL_HEAVY,
        phase=_PART,
        summary=(
            f"{trainings} trainings follow each other, and {each} pass before each of the next ones, in "
            f"{line.place if line else phase_words(_PART)}: {percent_text(share)} of step time."
        ),
        next=(
            f"If its result is the same for all trainings, run {what} once, before the first one, or keep its result: "
            f"{gain_text(gain, 'at most')}. The steps themselves do not take longer because of it.{see}"
        ),
        evidence={
            "trainings": trainings,
            "set_up_ms": float(each_ns.mean()) / 1e6,
            "steps": len(work.step),
            "usual_ms": float(np.median(work.step)) / 1e6,
            **(line.evidence(phase_share if own else share) if line else {}),
        },
        cost_share=share,
        speedup_if_fixed=gain,
    )


def _line_after_evaluation(facts: JobFacts, set_up_ns: float) -> BlamedLine | None:
    """Return the line of set-up that follows an evaluation, which ends where the next training begins, for samples."""
    if facts.time is None or set_up_ns / 1e9 < facts.time.seconds.get("evaluation", 0.0):
        return None  # the samples may be of evaluations

    line = outside_line(facts.lines, _OUTSIDE)
    return None if line is None or calls_code(facts.lines, _OUTSIDE, line, TORCH) else line
