"""One or two long pauses that took much of a run's steps: no pattern, and no part of what a step takes as a rule."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.snapshots.rank_snapshot import user_line
from traceml.diagnosis.facts.blamed_lines import BlamedLine, importing_line, own_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import NAMED_SHARE
from traceml.diagnosis.findings import Explanation
from traceml.diagnosis.stalls.recompiles import compiled_in
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import LINE_SHARE, OwnWork
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import count_text, ns_text, phase_words

__all__ = ["SinglePauses", "imports_in", "line_of_stuck_rank", "single_pauses", "usual_steps"]

PAUSE_NS, PAUSE_SHARE = 5e8, 0.25
"""One or two steps are reported from this time each on, if they are this share of all steps."""
OVERSUBSCRIBED_PAUSE_NS = 5e9
"""With too few cores from this time on: other programs cause shorter ones."""
MAX_PAUSES = 2
"""So many are no rare long steps yet."""
PART_SHARE = 0.7
"""If no line is known, the part of the step is named if it took at least this share of it."""
_DIVIDED_NS = 3e9  # samples are counted by the second
_SAMPLES_PER_S = 1.0  # there are 3 to 10 of code that does not hide from them


class SinglePauses(NamedTuple):
    """The steps with a pause, and the sentence about them."""

    columns: NDArray[np.intp]
    steps: NDArray[np.int64]  # their numbers
    mean_ns: float
    share: float  # of all step time
    explanation: Explanation

    def left_out_of(self, window: AlignedSteps, work: OwnWork) -> AlignedSteps:
        """Return the window without these steps."""
        kept = np.ones(len(window), bool)
        kept[_with_next(self.columns, work)] = False
        return window.select(kept)

    def left_out_of_lines(self, facts: JobFacts) -> JobFacts:
        """Return the facts with the lines of the other steps, where the samples of these are told from them."""
        is_told = self.mean_ns >= _DIVIDED_NS
        return replace(facts, lines=facts.lines_without(set(self.steps.tolist()))) if is_told else facts


def single_pauses(window: AlignedSteps, work: OwnWork, facts: JobFacts) -> SinglePauses | None:
    """Return one or two long pauses of a run; None if they are too short to matter, or more."""
    step = max(float(work.step[usual_steps(work)].mean()), 1.0)
    # Of a group, the others wait in this step or in the next one: the mean over ranks has a part of it.
    times = np.maximum(work.step, work.longest(work.own))
    # What comes between two trainings is counted for the step before it, or for the one after it, as other code.
    near_begin = np.isin(window.steps, facts.trainings_begin) | np.isin(window.steps + 1, facts.trainings_begin)
    other = work.parts.get("other", np.zeros_like(work.own)).max(axis=0)
    are_between = near_begin & (other >= PART_SHARE * times)
    from_ns = np.where(are_between | (not facts.oversubscribed), PAUSE_NS, OVERSUBSCRIBED_PAUSE_NS)
    least = np.maximum(from_ns, max(2 * step, float(times.max()) / 2))  # a mean of long and short tells of neither
    at = np.flatnonzero(times >= least)
    if work.grouped and len(at) and at[-1] - at[0] <= 1:
        at = at[[int(times[at].argmax())]]

    total = float(times[at].sum())
    share = total / max(float(work.step.sum()), 1.0)
    if not 0 < len(at) <= (1 if work.grouped else MAX_PAUSES) or share < PAUSE_SHARE:
        return None

    mean = total / len(at)
    factor = count_text(round(mean / step))
    steps, they, each = ("One step", "that step", "") if len(at) == 1 else ("Two steps", "these steps", " each")
    between = bool(are_between[at].all())
    they = "the set-up" if between else they
    where, action, more = compiled_in(window.steps[at], total, work, facts) or _place(
        work, facts, window.steps[at], at, total, they
    )
    long = f"{steps} took {ns_text(mean)}{each}, {factor} times the mean of the others"
    set_up = f"{ns_text(mean)}{each} passed between two trainings, outside of their steps"
    text = f" {set_up if between else long}{where}."
    evidence = {"pauses": len(at), "pause_ms": mean / 1e6, "pause_share": min(share, 1.0), **more}
    evidence |= {"between_trainings": True} if between else {}
    return SinglePauses(at, window.steps[at], mean, min(share, 1.0), Explanation(text, action, evidence))


def _place(
    work: OwnWork, facts: JobFacts, steps: NDArray[np.int64], at: NDArray[np.intp], total: float, they: str
) -> Explanation:
    """Return where the steps took most of their time, if that is known, and the advice to look there."""
    part = max(work.parts, key=lambda name: float(work.parts[name][:, at].max(axis=0).sum()), default="other")
    line = _line(work, facts, part, steps, at)
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
    return np.setdiff1d(np.arange(len(work.step)), _with_next(np.argsort(work.step)[-2:], work))


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


def _line(
    work: OwnWork, facts: JobFacts, part: str, steps: NDArray[np.int64], at: NDArray[np.intp]
) -> BlamedLine | None:
    """Return the line of one part of some steps.

    Of long ones the samples in them tell, or a snapshot of the rank: code that holds the GIL hides from samples. Of
    others the samples of the part in the whole run, where these steps have most of it.

    Args:
        steps: numbers of the steps.
        at: their columns.
    """
    values: Floats | None = work.parts.get(part)
    if values is None:
        return None

    row = int(values[:, at].sum(axis=1).argmax())
    rank, total_ns = int(work.ranks[row]), float(values[row, at].sum())
    if total_ns < LINE_SHARE * values[row].sum():
        return None

    inside, others = ([each for each in some if each.rank == rank] for some in facts.divided_lines(set(steps.tolist())))
    if total_ns < _DIVIDED_NS or not (inside or others):
        share = float(values[row].sum()) / max(float(work.step.sum()), 1.0)
        return own_line(facts.lines, part, share, (rank,))

    if sum(each.samples for each in inside) < _SAMPLES_PER_S * total_ns / 1e9:
        return line_of_stuck_rank(facts, rank, steps)

    return own_line(inside, part, total_ns / max(float(work.step[at].sum()), 1.0), (rank,))


def line_of_stuck_rank(facts: JobFacts, rank: int, steps: NDArray[np.int64]) -> BlamedLine | None:
    """Return the line of a rank's longest pause, as its snapshot shows it, if that was in one of some steps."""
    known = facts.progress.longest_pauses if facts.progress is not None else {}
    snapshot = known.get(rank)
    line = user_line(snapshot) if snapshot is not None and snapshot.step in steps else None
    return BlamedLine(line.file, line.line, line.function, 1.0, 1) if line is not None else None
