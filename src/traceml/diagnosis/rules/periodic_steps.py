"""Long steps at a fixed distance: every n-th step evaluates, logs, saves or samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import Phase
from traceml.diagnosis.advice import for_rollouts, waiting_text
from traceml.diagnosis.facts.blamed_lines import BlamedLine, awaits_others, line_without_hidden, own_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.rules.jitter import JOINT_SHARE, excess_over_usual, significant_excess, usual
from traceml.diagnosis.rules.stragglers.stragglers import straggler_kind
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.change_points import MIN_BINS, LevelChange, growth
from traceml.diagnosis.steps.own_work import COMPUTE, LINE_SHARE, UNNAMED, OwnWork, have_half
from traceml.diagnosis.steps.speedup import RARE, replayed, saved_ns, speedup
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import gain_text, ns_text, ordinal_text, percent_text, phases_text, ranks_text

__all__ = [
    "MIN_LONG_STEPS_OVERSUBSCRIBED", "MIN_PART_SHARE", "at_distance",
    "evidence_of_period", "periodic_steps",
]  # fmt: skip

MIN_LONG_STEPS = 4
"""Fewer long steps have no period."""
MIN_LONG_STEPS_OVERSUBSCRIBED = 8
"""With too few cores, where a quarter of the steps may be long by chance, some of which are at the same distance."""
CLEAR_FACTOR, CLEAR_DISTANCE = 10.0, 20
"""Unless each takes this many times longer than usual, so many steps apart: they are at one distance by no chance."""
REGULAR_SHARE = 0.8
"""Long steps with another one at the same distance have this share of the time beyond the usual."""
MIN_PART_SHARE = 0.5
"""Where steps of all lengths hide the long ones, a part of them is longer than usual by this share of a usual step."""
FILLED_SHARE = 0.6
"""So many of the steps at that distance, from the first long one to the last, are long."""
SPAN_SHARE = 0.5
"""They are spread over this share of the window: what a loop does in every n-th step it does all the time."""
MAX_OF_ONE = 0.5
"""A single step with more than this share of the long steps' excess is not one of many."""
HIDDEN_FACTOR, HIDDEN_QUANTILE = 2.0, 0.95
"""A step at that distance from them is one of them from so many times the usual on, and above so many other steps."""
JOINT_FACTOR, JOINT_STEPS = 5.0, 0.9
"""Or if it takes this many times longer than usual in this share of them, as the model's forward in rollouts."""
MOSTLY_SHARE = 0.8
"""A line with a smaller share of the longest part has most of it, and not all."""
NEARLY_ALL = 0.9
"""Other parts are not named where the longest one has this share of the time."""
MIN_GROWTH, MAX_BINS = 2.0, 32
"""Long steps that grow by this factor are said to, as the medians of so many parts of the run show."""
KIND_RATIO = 3.0
"""Long steps are of two kinds if none is between some and those that take this many times more beyond the usual."""
_INPUT_WAIT = Phase.INPUT_WAIT.label
SOONER_SHARE = 1 / 3
"""At most this many of them come sooner after another one than the distance."""


class _Period(msgspec.Struct, frozen=True):
    """Long steps at a fixed distance."""

    every: int
    columns: NDArray[np.intp]
    part: str  # the part of the step that makes the long ones longest
    ranks: tuple[int, ...]  # those that have it; none for all
    removed: dict[str, Floats]  # this part, and others that are long in the same steps, as they would be without them
    saved_ns: float  # time by which the mean step would be shorter
    part_saved_ns: float  # how much of it is in the longest part

    @property
    def phases(self) -> list[str]:
        """The longest part, and the others unless they are next to nothing of the time."""
        is_nearly_all = self.part_saved_ns >= NEARLY_ALL * self.saved_ns
        return [self.part] if is_nearly_all else [self.part, *sorted(self.removed.keys() - {self.part})]


def periodic_steps(
    window: AlignedSteps, work: OwnWork, facts: JobFacts, step_ns: float, hidden_ns: Mapping[str, float]
) -> tuple[list[Finding], dict[str, Floats]]:
    """Return the finding about long steps at a fixed distance, and the parts of the step without them.

    Steps that train more are no finding, nor jitter; what else is long in them may be one.

    Args:
        hidden_ns: mean time of each part that another finding has and `work` has not, as of garbage collections.
    """
    period = _period(window, work)
    if period is not None and (usual_work := _without_more_training(work, period.columns)):
        found, without = periodic_steps(window, replayed(work, usual_work), facts, step_ns, hidden_ns)
        return found, usual_work | without

    if period is None or period.saved_ns < least_cost_ns(step_ns):
        return [], {}

    # Longer than a wait for a core makes them, and regular by no chance.
    longer = float(work.step[period.columns].min()) / max(float(np.median(work.step)), 1.0)
    is_clear = longer >= CLEAR_FACTOR and period.every >= CLEAR_DISTANCE
    if facts.oversubscribed and len(period.columns) < MIN_LONG_STEPS_OVERSUBSCRIBED and not is_clear:
        return [], {}

    hidden_share = hidden_ns.get(period.part, 0.0) / step_ns
    return [_finding(work, facts, period, step_ns, hidden_share)], period.removed


def _without_more_training(work: OwnWork, columns: NDArray[np.intp]) -> dict[str, Floats]:
    """Return computation as it would be if some steps did not train more; empty if that is not why they are long.

    They have longer backward passes, and forward or the optimizer is longer, too: the updates of a generator, or of a
    policy. Half as often would be another training.
    """
    typical = {
        part: float(np.median(excess_over_usual(values, columns).max(axis=0)))  # by the median, as for joint parts
        for part, values in work.parts.items()
    }
    longer = {part for part, excess_ns in typical.items() if excess_ns > JOINT_SHARE * max(typical.values())}
    is_training = max(typical, key=lambda part: typical[part]) in COMPUTE and "backward" in longer
    computing = longer & {*COMPUTE}
    is_more = is_training and len(computing) > 1
    return {part: _without_excess(work.parts[part], columns) for part in computing} if is_more else {}


def _period(window: AlignedSteps, work: OwnWork) -> _Period | None:
    usual_ns, limit = usual(work.step)
    found = at_distance(window, work.step, usual_ns, limit)
    if found is not None and (period := _of_part(work, *found)) is not None:
        return period

    # On a busy host steps of all lengths hide the regular ones, and so do saves in some of these, but not in the part
    # that makes them long.
    for part in UNNAMED:
        if (values := work.parts.get(part)) is not None:
            longest = values.max(axis=0)
            part_ns, _ = usual(longest)
            found = at_distance(window, longest, part_ns, part_ns + MIN_PART_SHARE * usual_ns)
            if found is not None:
                return _of_part(work, *found, part)

    return None


def at_distance(
    window: AlignedSteps, values: Floats, usual_ns: float, limit_ns: float
) -> tuple[int, NDArray[np.intp]] | None:
    """Return (the distance, the columns) of the values above a limit that follow each other regularly."""
    # The last step has what the script does before it ends, also a hang: it makes no period.
    long = np.flatnonzero(values[:-1] > limit_ns)
    if not MIN_LONG_STEPS <= len(long) <= RARE * len(values):
        return None

    found = regular(window.steps[long], values[long] - usual_ns, window.steps)
    if found is None:
        long = long[_of_longest_kind(values[long] - usual_ns)]
        if len(long) < MIN_LONG_STEPS:
            return None

        found = regular(window.steps[long], values[long] - usual_ns, window.steps)

    if found is None:
        return None

    every, columns = found[0], long[found[1]]
    return every, np.union1d(columns, _hidden(window.steps, values, columns, every, usual_ns))


def _of_longest_kind(excess: Floats) -> NDArray[np.bool_]:
    """Return which long steps are far longer than the others: those that evaluate, beside others that log."""
    ascending = np.sort(excess)
    ratios = ascending[1:] / np.maximum(ascending[:-1], 1.0)
    at = int(ratios.argmax())
    return np.asarray(excess >= ascending[at + 1] if ratios[at] >= KIND_RATIO else np.zeros(len(excess), bool))


def _hidden(
    steps: NDArray[np.int64], values: Floats, columns: NDArray[np.intp], every: int, usual_ns: float
) -> NDArray[np.intp]:
    """Return the columns that continue some at their distance, and are long, but not unusual where all steps vary much.

    Without them every n-th step would seem to take as long as the longest ones on a busy host, and cost less.
    """
    is_longer = values >= HIDDEN_FACTOR * usual_ns
    is_longer[columns], is_longer[-1] = True, False
    longer = np.flatnonzero(is_longer)
    longer = longer[np.lexsort((steps[longer], steps[longer] % every))]
    chain = np.cumsum(np.diff(steps[longer], prepend=steps[longer[0]]) != every)  # each at the distance from the last
    same = longer[np.isin(chain, chain[np.isin(longer, columns)])]
    return same[values[same] > np.quantile(np.delete(values, same), HIDDEN_QUANTILE)]


def _of_part(work: OwnWork, every: int, columns: NDArray[np.intp], known: str | None = None) -> _Period | None:
    """Return a period with the part that makes its steps long; None if that has a finding of its own.

    Args:
        known: that part, where it alone is regular.
    """
    by_rank = {part: excess_over_usual(values, columns) for part, values in work.parts.items()}
    excess = {part: values.max(axis=0) for part, values in by_rank.items()}
    part = known or max(excess, key=lambda name: excess[name].sum(), default=None)
    evaluates = part == _INPUT_WAIT and _evaluates(work, excess)
    part = "forward" if evaluates else part
    if part is None or part not in UNNAMED:
        return None

    sums = by_rank[part].sum(axis=1)
    ranks = work.named(have_half(sums))

    least_ns = JOINT_SHARE * float(np.median(excess[part]))  # by the median: some are long in these steps by chance
    joint = [
        name
        for name in UNNAMED
        if name in excess
        and (
            float(np.median(excess[name])) >= least_ns
            or _is_always_long(work.parts[name], excess[name], least_ns / JOINT_FACTOR)
        )
    ]
    joint += [_INPUT_WAIT] if evaluates else []
    removed = {name: _without_excess(work.parts[name], columns) for name in {part, *joint}}
    saved = saved_ns(work, {part: removed[part]})
    of_all = saved if len(removed) == 1 else saved_ns(work, removed)
    return _Period(every, columns, part, ranks, removed, of_all, saved)


def _evaluates(work: OwnWork, excess: dict[str, Floats]) -> bool:
    """Return whether steps that wait for many batches call the model on them, and train on none: backward is as long.

    So does evaluation with gradients in training mode, which is counted as part of the step.
    """
    forward, backward = work.parts.get("forward"), work.parts.get("backward")
    if forward is None or backward is None:
        return False

    least_ns = JOINT_SHARE * float(np.median(excess[_INPUT_WAIT]))
    trains = float(np.median(excess["backward"])) > float(np.median(backward.max(axis=0)))
    return not trains and _is_always_long(forward, excess["forward"], least_ns)


def _is_always_long(values: Floats, excess: Floats, least_ns: float) -> bool:
    """Return whether a part takes at least this long, and far longer than usual, in nearly all long steps."""
    usual_ns = float(np.median(values.max(axis=0)))
    return float(np.quantile(excess, 1.0 - JOINT_STEPS)) >= max((JOINT_FACTOR - 1.0) * usual_ns, least_ns)


def _without_excess(values: Floats, columns: NDArray[np.intp]) -> Floats:
    """Return a part that takes no longer than usual in some columns."""
    usually = values.copy()
    usually[:, columns] = np.minimum(usually[:, columns], np.median(values, axis=1, keepdims=True))
    return usually


def regular(steps: NDArray[np.int64], excess: Floats, seen: NDArray[np.int64]) -> tuple[int, NDArray[np.bool_]] | None:
    """Return the distance at which long steps follow each other, and which of them do; None without one.

    A counter may begin again in each epoch, so not all distances need to be equal: a step belongs to the period if
    there is a long step at that distance before or after it. Of a long run only some steps are seen: a step also
    belongs to it if neither of those two is.

    Args:
        steps: numbers of the long steps, ascending.
        excess: their time beyond the usual.
        seen: numbers of all steps that are judged, ascending.
    """
    heavy = significant_excess(excess)
    for every in np.unique(np.diff(steps[heavy])):
        follows = np.isin(steps, steps + every)
        if every < 2 or follows.sum() < MIN_LONG_STEPS - 1:
            continue

        known = np.isin(steps + every, seen) | np.isin(steps - every, seen)
        members = follows | np.isin(steps, steps - every) | ~known
        regular_ns = float(excess[members & known].sum())
        if float(excess[members].max()) > MAX_OF_ONE * regular_ns:
            continue

        if regular_ns < REGULAR_SHARE * float(excess[known].sum()):
            continue

        # Long steps that come in clumps, as on a busy host or as long episodes of a game, have a distance too, but are
        # not at each multiple of it, or also follow each other sooner.
        regular_steps = steps[members & heavy]
        if len(regular_steps) < MIN_LONG_STEPS:
            continue

        span = np.count_nonzero((seen > regular_steps[0]) & (seen <= regular_steps[-1])) + every
        is_filled = len(regular_steps) >= FILLED_SHARE * span / every
        is_spread = span >= SPAN_SHARE * len(seen)
        if is_filled and is_spread and float((np.diff(regular_steps) < every).mean()) <= SOONER_SHARE:
            return int(every), members & heavy  # light ones are noise, in which this distance is by chance

    return None


def _finding(work: OwnWork, facts: JobFacts, period: _Period, step_ns: float, hidden_share: float) -> Finding:
    share, are_late = period.saved_ns / step_ns, bool(period.ranks) and work.grouped
    rows = np.isin(work.ranks, period.ranks) if period.ranks else np.full(len(work.ranks), True)
    phase_share = float(work.parts[period.part][rows].mean()) / step_ns
    held = period.part_saved_ns >= LINE_SHARE * phase_share * step_ns
    seen = own_line(facts.lines, period.part, phase_share + hidden_share, period.ranks) if held else None
    line = line_without_hidden(seen, phase_share, hidden_share)
    where = phases_text(period.phases, line.place if line else None)
    mostly = "mostly " if line and line.share < MOSTLY_SHARE else ""
    long, usual_ns = work.as_measured(period.columns, float(np.median(work.step)))
    # The others wait for a late rank in its step or in the next: their mean is the length of none. Some may also save.
    by_parts_ns, mean_ns = usual_ns + _excess_ns(work, period), float(long.mean())
    long_ns = by_parts_ns if are_late or by_parts_ns < MOSTLY_SHARE * mean_ns else mean_ns
    half = speedup(step_ns, period.saved_ns / 2)
    grown = None if are_late else _growth(long)
    longer = f" They grow from {ns_text(grown.before_ns)} to {ns_text(grown.after_ns)}." if grown else ""
    on_ranks = f" on {ranks_text(period.ranks)}" if period.ranks else ""
    waits = ", for which the others wait" if are_late else ""
    return Finding.of(
        straggler_kind(period.part) if are_late else Kind.RESIDUAL_HEAVY,
        ranks=period.ranks,
        phase=period.part,
        summary=(
            f"Every {ordinal_text(period.every)} step takes {ns_text(long_ns)} instead of "
            f"{ns_text(usual_ns)}{on_ranks}, {mostly}in {where}{waits}: {percent_text(share)} of step time."
            f"{longer}"
        ),
        next=_for_growth(line) * bool(grown) + _advice(facts, period, line, half),
        evidence={
            **evidence_of_period(work, period.every, period.columns, usual_ns, long_ns),
            **({"before_ms": grown.before_ns / 1e6, "after_ms": grown.after_ns / 1e6} if grown else {}),
            **({"phases": period.phases} if len(period.phases) > 1 else {}),
            **(line.evidence(phase_share) if line else {}),
        },
        cost_share=share,
        speedup_if_fixed=half,
    )


def _growth(long: Floats) -> LevelChange | None:
    """Return how long steps grow over the run; None if they do not, or too few are known."""
    bins = [float(np.median(some)) for some in np.array_split(long, min(len(long), MAX_BINS))]
    grown = growth(np.array(bins)) if len(bins) >= MIN_BINS else None
    return grown if grown is not None and grown.factor >= MIN_GROWTH else None


def _for_growth(line: BlamedLine | None) -> str:
    at = "the script" if line is None else line.place
    return f"Look at what {at} reads, sends or writes as a whole each time: a list, a history or a file that grows. "


def evidence_of_period(
    work: OwnWork, every: int, columns: NDArray[np.intp], usual_ns: float, long_ns: float
) -> dict[str, Any]:
    """Return the evidence on long steps at a fixed distance, which take so long in the mean."""
    return {
        "every_n_steps": every,
        "long_steps": len(columns),
        "steps": len(work.step),
        "usual_ms": usual_ns / 1e6,
        "mean_long_ms": long_ns / 1e6,
    }


def _excess_ns(work: OwnWork, period: _Period) -> float:
    """Return the mean time of the long steps beyond the usual, of the rank that has most in each."""
    excess = sum(work.parts[part] - without for part, without in period.removed.items())
    return float(np.asarray(excess)[:, period.columns].max(axis=0).mean())


def _advice(facts: JobFacts, period: _Period, line: BlamedLine | None, half: float) -> str:
    if facts.collects:  # half as many rollouts are another training
        seldom = (
            "" if period.part == "forward" else f" If it only logs or saves, do it half as often: {gain_text(half)}."
        )
        return for_rollouts(period.part, line, facts) + seldom

    if line is not None and facts.waits_in(period.part, line):
        # A queue that is emptied half as often has twice as much in it.
        is_for_others = awaits_others(facts.lines, period.part, line)
        alike = ", and there is no more to wait for then" if is_for_others else ""
        return (
            f"{waiting_text(line)} Do it in the background, in a thread or another process, and begin what a step "
            f"needs ahead of that step. If half as often is enough{alike}, run it every "
            f"{ordinal_text(2 * period.every)} step: {gain_text(half)}."
        )

    if line is not None and line.function.endswith("__init__"):  # as of a data set that each epoch makes
        return (
            f"If {line.place} makes the same each time, make it once, before the loop, and use it again. Otherwise "
            f"make it cheaper, or half as often: {gain_text(half)}."
        )

    what, see = "what else these steps do", " `traceml report --lines` shows the lines."
    evaluation = line if _INPUT_WAIT in period.removed else None
    if period.part == "forward" and evaluation is None:  # the line is the model's, which runs in each step
        what += " with the model (sampling, evaluation)"
    elif line is not None:
        what, see = line.place, ""

    return (
        f"If half as often is enough, run {what} every {ordinal_text(2 * period.every)} step: {gain_text(half)}. "
        f"Otherwise make it cheaper, or run it in the background, in a thread or another process.{see}"
    )
