"""One or two long pauses that took much of a run's steps: no pattern, and no part of what a step takes as a rule."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.facts.blamed_lines import BlamedLine, importing_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import NAMED_SHARE
from traceml.diagnosis.facts.trainings.trainer_calls import own_line
from traceml.diagnosis.findings import Explanation
from traceml.diagnosis.stalls.recompiles import compiled_in
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.long_steps import LINE_SHARE
from traceml.diagnosis.steps.own_work import OwnWork
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import count_text, ns_text, phase_words

__all__ = ["SinglePauses", "imports_in", "single_pauses", "usual_steps"]

PAUSE_NS, PAUSE_SHARE = 5e8, 0.25
"""One or two steps are reported from this time each on, if they are this share of all steps."""
OVERSUBSCRIBED_PAUSE_NS = 5e9
"""With too few cores from this time on: other programs cause shorter ones."""
MOST_PAUSES = 2
"""So many are no rare long steps yet."""
PART_SHARE = 0.7
"""If no line is known, the part of the step is named if it took at least this share of it."""


class SinglePauses(NamedTuple):
    """The steps with a pause, and the sentence about them."""

    columns: NDArray[np.intp]
    explanation: Explanation

    def left_out_of(self, window: AlignedSteps, work: OwnWork) -> AlignedSteps:
        """Return the window without these steps."""
        kept = np.ones(len(window), bool)
        kept[_with_next(self.columns, work)] = False
        return window.select(kept)


def single_pauses(window: AlignedSteps, work: OwnWork, facts: JobFacts) -> SinglePauses | None:
    """Return one or two long pauses of a run; None if they are too short to matter, or more."""
    step = max(float(work.step[usual_steps(work)].mean()), 1.0)
    # Of a group, the others wait in this step or in the next one: the mean over ranks has a part of it.
    times = np.maximum(work.step, work.longest(work.own))
    from_ns = OVERSUBSCRIBED_PAUSE_NS if facts.oversubscribed else PAUSE_NS
    least = max(from_ns, 2 * step, float(times.max()) / 2)  # the mean of a longer and a shorter one tells of neither
    at = np.flatnonzero(times >= least)
    if work.grouped and len(at) and at[-1] - at[0] <= 1:
        at = at[[int(times[at].argmax())]]

    total = float(times[at].sum())
    share = total / max(float(work.step.sum()), 1.0)
    if not 0 < len(at) <= (1 if work.grouped else MOST_PAUSES) or share < PAUSE_SHARE:
        return None

    mean = total / len(at)
    factor = count_text(round(mean / step))
    steps, they, each = ("One step", "that step", "") if len(at) == 1 else ("Two steps", "these steps", " each")
    where, action, more = compiled_in(window.steps[at], total, work, facts) or _place(work, facts, at, total, they)
    text = f" {steps} took {ns_text(mean)}{each}, {factor} times the mean of the others{where}."
    evidence = {"pauses": len(at), "pause_ms": mean / 1e6, "pause_share": min(share, 1.0), **more}
    return SinglePauses(at, Explanation(text, action, evidence))


def _place(work: OwnWork, facts: JobFacts, at: NDArray[np.intp], total: float, they: str) -> Explanation:
    """Return where the steps took most of their time, if that is known, and the advice to look there."""
    part = max(work.parts, key=lambda name: float(work.parts[name][:, at].max(axis=0).sum()), default="other")
    line = _line(work, facts, part, at)
    if line is None and (imports := imports_in(work, facts, part, at, total)):
        return imports

    in_part = float(work.parts[part][:, at].max(axis=0).sum()) if part in work.parts else 0.0
    is_known = part != "other" and in_part >= PART_SHARE * total
    where = line.place if line else phase_words(part) if is_known else ""
    action = (
        f"Find out what {line.place} did in {they}, and whether it needs to."
        if line
        else f"Find out what {they} did: `traceml report --lines` shows the lines in which the training was seen."
    )
    return Explanation(f", mostly in {where}" if where else "", action)


def usual_steps(work: OwnWork) -> NDArray[np.intp]:
    """Return the columns of the steps without the two longest, which are usually pauses."""
    count = len(work.step)
    if count < 10:
        return np.arange(count)

    return np.setdiff1d(np.arange(count), _with_next(np.argsort(work.step)[-2:], work))


def _with_next(columns: NDArray[np.intp], work: OwnWork) -> NDArray[np.intp]:
    """Return columns with those after them, where the optimizer's work counts: after the sync point."""
    if not work.grouped:
        return columns

    after = columns[columns < len(work.step) - 1] + 1
    return np.union1d(columns, after[~work.begins[after]])


def imports_in(work: OwnWork, facts: JobFacts, part: str, at: NDArray[np.intp], total: float) -> Explanation | None:
    """Return the line in which modules were imported, where that took half of some steps; samples show no step.

    Args:
        part: the part of the steps that is long.
        at: their columns.
        total: their time.
    """
    values = work.parts.get(part)
    row = 0 if values is None else int(values[:, at].sum(axis=1).argmax())
    line = importing_line(facts.lines, part, (int(work.ranks[row]),))
    if line is None or line.share * float(work.step.sum()) < NAMED_SHARE * total:
        return None

    action = "Import these modules at the start of the script: that takes as long, but no step waits for it."
    return Explanation(f", mostly in imports of {line.place}", action)


def _line(work: OwnWork, facts: JobFacts, part: str, at: NDArray[np.intp]) -> BlamedLine | None:
    """Return the line of one part of some steps, where these have most of what its samples are about."""
    values: Floats | None = work.parts.get(part)
    if values is None:
        return None

    row = int(values[:, at].sum(axis=1).argmax())
    if values[row, at].sum() < LINE_SHARE * values[row].sum():
        return None

    share = float(values[row].sum()) / max(float(work.step.sum()), 1.0)
    return own_line(facts.lines, part, share, (int(work.ranks[row]),))
