"""Irregular long steps: rare ones without an explanation, and ranks that are late in turns."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis import advice
from traceml.diagnosis.facts.blamed_lines import BlamedLine, blamed_line, is_of_ranks_alone, own_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Explanation, Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.rules.stragglers.straggler_wording import subject_text
from traceml.diagnosis.rules.stragglers.stragglers import straggler_kind
from traceml.diagnosis.stalls.single_pauses import imports_in, line_of_stuck_rank
from traceml.diagnosis.steps.own_work import (
    COMPUTE,
    LINE_SHARE,
    UNNAMED,
    UNNAMED_CODE,
    OwnWork,
    median_over_ranks,
    usual_excess,
)
from traceml.diagnosis.steps.speedup import RARE, saved_ns, speedup
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import capitalized, gain_text, ns_text, percent_text, phase_words, ranks_text

__all__ = ["JOINT_SHARE", "excess_over_usual", "jitter", "late_in_turns", "significant_excess", "usual"]

LONG_NS = 20e6
"""A long step is at least this much longer than usual: other processes on a busy host usually take less."""
DEVICE_LONG_NS = 2e6
"""By device times, a long step is at least this much longer than usual."""
OVERSUBSCRIBED_LONG_NS = 100e6
"""With too few cores, long steps are reported only if they are this much longer on average."""
OVERSUBSCRIBED_DOMINANCE = 0.8
"""With too few cores, long steps are reported only if this share of the excess is in one part."""
TURNS_SHARE = 0.35
"""Ranks that are late in turns are late in at least this share of the steps."""
TURNS_NS = 10e6
"""By CPU times, ranks are late in turns by at least this much: ranks that share cores disturb each other."""
TURNS_DOMINANCE = 0.7
"""One part has this share of the difference between ranks from step to step."""
TURNS_WAIT = 0.10
"""If main threads waited for a core for this share of their ready time or more, they may have waited in turns."""
TOGETHER_SHARE = 2 / 3
"""Ranks that are each late in this share of the steps in which any of them is late take no turns."""
WAITED_FACTOR = 2.0
"""Then turns cost this many times what all ranks waited: a thread that gets a core back finds its caches cold."""
MIN_EVENTS = 3
"""Fewer long steps are single events."""
IN_A_ROW_SHARE = 0.7
"""If so many long steps directly follow another one, they are a series, as the first calls of L-BFGS."""
DESCRIBED_SHARE = 0.8
"""If some long steps have this share of what all of them cost, the sentence describes these alone."""
LIGHT_SHARE = 0.1
"""Steps with less than this share of the excess of those that have half of it are noise between these."""
CAUSE_SHARE = 0.5
"""What a rank does in a step explains that the next one is long, if it takes this share of what that takes more."""
ONE_RANK_SHARE = 0.9
"""Long steps are of one rank if it has this share of them."""
JOINT_SHARE = 0.2
"""A part belongs to the long steps if its usual excess in them is this share of that of the longest part."""
CODE_SHARE = 0.8
"""A step is also long by its code outside the phases, if that is unusually long and has this share of the excess."""
_ONE_RANK_EVENTS = 6
_PER_EVALUATION = 2  # long steps around one evaluation of some ranks, for which the others wait
_CHANCE_ERRORS = 3.0  # of the number of a rank's late steps
_MAX_CELLS = 100_000
_SIGMAS = 4.0  # beyond the usual value, of the spread of logarithms
_MAX_EXPONENT = 20.0  # of the limit of a part that many steps do not have: no time in nanoseconds overflows
_UNKNOWN = "unknown"


def usual(values: Floats) -> tuple[float, float]:
    """Return (the usual value, the limit above which a value is unusual).

    Both are computed from the lower half, which rare long values do not change: the spread of its logarithms, as one
    half of a normal distribution. The limit is at least twice the usual value.
    """
    flat = values.ravel()
    low, lower, middle = np.quantile(flat[:: max(1, flat.size // _MAX_CELLS)], (0.05, 0.16, 0.5))
    spread = max(np.log(max(middle, 1) / max(lower, 1)), np.log(max(middle, 1) / max(low, 1)) / 1.645)
    return float(middle), float(middle * max(2.0, np.exp(min(_SIGMAS * spread, _MAX_EXPONENT))))


class _LongSteps(msgspec.Struct, frozen=True):
    """Long steps without an explanation."""

    columns: NDArray[np.intp]  # their columns in the window
    excess: dict[str, Floats]  # part -> time of each rank in them beyond its usual
    usual_ns: float
    # which of them are only waiting for a rank that was late in the step before
    are_waits: NDArray[np.bool_]


def jitter(
    steps: NDArray[np.int64], work: OwnWork, facts: JobFacts, step_ns: float
) -> tuple[list[Finding], dict[str, Floats]]:
    """Find rare long steps that cost much together and that no part explains; also return their part without them.

    Args:
        steps: numbers of the steps of the window.
    """
    events = _unexplained(work)
    found = _rare_long_steps(steps, work, facts, events, step_ns)
    if found is None:
        return [], {}

    part = found.phase
    if part is None or part not in events.excess:
        return [found], {}

    values = work.parts[part].copy()
    values[:, events.columns] -= events.excess[part].astype(values.dtype)
    return [found], {part: values}


def _rare_long_steps(
    steps: NDArray[np.int64], work: OwnWork, facts: JobFacts, events: _LongSteps, step_ns: float
) -> Finding | None:
    if not MIN_EVENTS <= len(events.columns) <= RARE * len(work.step):
        return None

    cost = float((work.step[events.columns] - events.usual_ns).sum()) / len(work.step)
    if cost < least_cost_ns(step_ns):
        return None

    if facts.oversubscribed and not _exceeds_cpu_contention(work, events):
        return None

    found = _jitter(steps, work, facts, events, cost, step_ns)
    if "line" not in found.evidence and facts.is_core_wait(cost / step_ns, in_communication=found.phase == "comm"):
        return None

    own = events.columns[~events.are_waits]
    if found.phase is None and (np.diff(own) == 1).sum() >= IN_A_ROW_SHARE * (len(own) - 1):
        return None  # all parts are longer: they have more work

    waits_for_evaluation = (
        found.phase == "comm"
        and facts.time is not None
        and bool(facts.time.evaluators)
        and len(events.columns) <= _PER_EVALUATION * facts.time.evaluations
    )
    return None if waits_for_evaluation else found


def _exceeds_cpu_contention(work: OwnWork, events: _LongSteps) -> bool:
    """Return whether the steps are too long for a lack of cores alone."""
    sums = [float(values.max(axis=0).sum()) for values in events.excess.values()]
    excess = float(work.step[events.columns].mean()) - events.usual_ns
    return excess >= OVERSUBSCRIBED_LONG_NS and max(sums) >= OVERSUBSCRIBED_DOMINANCE * sum(sums)


def _unexplained(work: OwnWork) -> _LongSteps:
    step = _without_gathered(work)
    usual_ns, limit = usual(step)
    least = DEVICE_LONG_NS if work.device else LONG_NS
    long = (step > max(limit, usual_ns + least)) | _long_by_code(work, usual_ns, least)
    # In the window's last step scripts save and end.
    long[-1] = False
    columns = np.flatnonzero(long)
    if not len(columns) or not work.parts:
        return _LongSteps(columns[:0], {}, usual_ns, long[:0])

    if work.grouped:
        columns = _with_causes(work, columns, usual_ns)

    excess = {part: excess_over_usual(values, columns) for part, values in work.parts.items()}
    longest = np.stack([values.max(axis=0) for values in excess.values()])
    is_open = np.stack([_is_open(work, part, values) for part, values in excess.items()])
    kept, own = is_open[np.argmax(longest, axis=0), np.arange(len(columns))], longest.sum(axis=0)
    waits = (np.diff(columns, prepend=-2) == 1) & work.grouped
    waits[1:] &= own[1:] < LIGHT_SHARE * own[:-1]
    kept = np.where(waits, np.roll(kept, 1), kept)  # what explains the one step explains the waiting in the next
    return _LongSteps(columns[kept], {part: each[:, kept] for part, each in excess.items()}, usual_ns, waits[kept])


def _without_gathered(work: OwnWork) -> Floats:
    """Return the steps' times without the waiting for work of the steps before, where ranks meet in every n-th only."""
    if len(work.sync_intervals) == len(work.step):
        return work.step

    own, step = work.by_sync_interval(work.own), work.step.copy()
    step[np.append(work.sync_intervals[1:], len(step)) - 1] -= own.max(axis=0) - own.mean(axis=0)
    return step


def _long_by_code(work: OwnWork, usual_ns: float, least_ns: float) -> NDArray[np.bool_]:
    """Return which steps of a rank alone are long by code outside the phases, however much the others of them vary.

    On a host with other programs computation takes several times as long at times; that a line waits is still seen.
    """
    found = np.zeros(len(work.step), bool)
    for part in set() if work.grouped else {*UNNAMED_CODE} & work.parts.keys():
        values = work.parts[part][0]
        middle_ns, limit_ns = usual(values)
        has_most = values - middle_ns >= CODE_SHARE * (work.step - usual_ns)
        found |= (values > max(limit_ns, middle_ns + least_ns)) & has_most

    return found & (work.step > max(2 * usual_ns, usual_ns + least_ns))


def _is_open(work: OwnWork, part: str, excess: Floats) -> NDArray[np.bool_]:
    """Return in which long steps a part needs an explanation, as no other finding has it.

    Waiting for data has one where more than half of the ranks wait.
    """
    if part == "input_wait" and work.grouped:
        return np.asarray(2 * (excess >= CAUSE_SHARE * excess.max(axis=0)).sum(axis=0) <= len(excess))

    return np.full(excess.shape[1], part in UNNAMED)


def _with_causes(work: OwnWork, columns: NDArray[np.intp], usual_ns: float) -> NDArray[np.intp]:
    """Return long steps with those before them that explain them: in which a rank was late after the ranks had met.

    The others wait for it in their next step; the mean over many ranks has nearly all of it there.
    """
    before = np.setdiff1d(columns - 1, [*columns, -1])
    own = np.sum([excess_over_usual(values, before).max(axis=0) for values in work.parts.values()], axis=0)
    return np.union1d(columns, before[own >= CAUSE_SHARE * (work.step[before + 1] - usual_ns)])


def _jitter(
    steps: NDArray[np.int64], work: OwnWork, facts: JobFacts, events: _LongSteps, cost: float, step_ns: float
) -> Finding:
    sums = {part: float(values.max(axis=0).sum()) for part, values in events.excess.items()}
    if work.grouped:  # what no rank's own work explains is waiting, or backward of steps that did not measure it
        is_measured = 2 * int(work.measured[events.columns].sum()) >= len(events.columns)
        sums["comm" if is_measured else _UNKNOWN] = max(cost * len(work.step) - sum(sums.values()), 0.0)

    part = max(sums, key=lambda name: sums[name])
    is_most = sums[part] >= 0.6 * max(sum(sums.values()), 1.0)
    phase = part if is_most and part != _UNKNOWN else None
    rank = _one_rank(work, np.sum(list(events.excess.values()), axis=0)[:, ~events.are_waits])
    share, gain = cost / step_ns, speedup(step_ns, cost)
    long, usual_ns = work.as_measured(events.columns, events.usual_ns)
    # The waiting for a late rank belongs to its own step: a mean has a part in each.
    excess = np.add.reduceat(long - usual_ns, np.flatnonzero(~events.are_waits))
    # The sentence describes those that count: no step is as long as the mean of a pause and short ones.
    heavy = excess[significant_excess(excess)]
    long = usual_ns + (heavy if heavy.sum() >= DESCRIBED_SHARE * excess.sum() else excess)
    how_long, them = _how_long(long, len(work.step))
    line, phase_share = _line(work, facts, events, phase, rank, step_ns) if phase in events.excess else (None, 0.0)
    line = _line_of_pause(steps, work, facts, events, phase) or line
    rank = _rank_of_line(work, facts, events, phase, line) if rank is None else rank
    where = f", mostly in {line.place if line else phase_words(part)}" if phase else ""
    without = f"; without {them} steps would be {gain_text(gain)}"
    if line is None and phase and (imports := imports_in(work, facts, phase, events.columns, cost * len(work.step))):
        where, action, _ = imports
        without, gain = "", 1.0  # they take as long elsewhere
    elif is_most and part == _UNKNOWN:
        where, action, rank = ", mostly in backward or communication", advice.for_unmeasured_jitter(facts), None
    elif facts.collects and phase in (None, "other", "forward") and sums.get("forward", 0.0) > JOINT_SHARE * sums[part]:
        action = advice.for_rollouts(phase or part, line, facts)
    else:
        action = advice.for_jitter(phase, rank, line, facts)

    rank_text = f" on rank {rank}" if rank is not None else ""
    return Finding.of(
        Kind.JITTER,
        ranks=() if rank is None else (rank,),
        phase=phase,
        summary=(
            f"{how_long} instead of {ns_text(usual_ns)}{rank_text}{where}: {percent_text(share)} of step time{without}."
        ),
        next=action,
        evidence={
            "long_steps": len(long),
            "steps": len(work.step),
            "usual_ms": usual_ns / 1e6,
            "mean_long_ms": float(long.mean()) / 1e6,
            "p99_ms": float(np.quantile(work.as_measured(np.arange(len(work.step)), 0.0)[0], 0.99)) / 1e6,
            "longest_ms": float(long.max()) / 1e6,
            "excess_ms_by_phase": {name: value / 1e6 for name, value in sums.items() if value > 0},
            **(line.evidence(phase_share) if line else {}),
        },
        cost_share=share,
        speedup_if_fixed=gain,
    )


def significant_excess(excess: Floats) -> NDArray[np.bool_]:
    """Return which times beyond the usual are not only noise beside the others."""
    return np.asarray(excess >= LIGHT_SHARE * usual_excess(excess))


def _how_long(long: Floats, steps: int) -> tuple[str, str]:
    """Return `11 of 210 steps take 136 ms` and `them`."""
    if len(long) == 1:
        return f"One of {steps} steps takes {ns_text(float(long.max()))}", "it"

    return f"{len(long)} of {steps} steps take {ns_text(float(long.mean()))}", "them"


def _line(
    work: OwnWork, facts: JobFacts, events: _LongSteps, phase: str, rank: int | None, step_ns: float
) -> tuple[BlamedLine | None, float]:
    """Return the line of the long steps, where they have most of the phase, and the phase's share of the step."""
    ranks = slice(None) if rank is None else work.ranks == rank
    values = work.parts[phase][ranks]
    share = float(values.mean()) / step_ns
    held = float(events.excess[phase][ranks].sum()) >= LINE_SHARE * float(values.sum())
    return (own_line(facts.lines, phase, share, () if rank is None else (rank,)) if held else None), share


def _line_of_pause(
    steps: NDArray[np.int64], work: OwnWork, facts: JobFacts, events: _LongSteps, phase: str | None
) -> BlamedLine | None:
    """Return the line of a long step that is nearly all of what they cost, if its rank was seen without progress in it.

    Code that holds the GIL hides from samples.
    """
    excess = events.excess.get(phase or "")
    if excess is None or excess.max() < LINE_SHARE * excess.sum():
        return None

    row, at = np.unravel_index(int(excess.argmax()), excess.shape)
    return line_of_stuck_rank(facts, int(work.ranks[row]), steps[events.columns[at : at + 1]])


def excess_over_usual(values: Floats, columns: NDArray[np.intp]) -> Floats:
    """Return the time of each rank in some columns beyond its usual."""
    usual_values = np.median(values[:, :: max(1, values.size // _MAX_CELLS)], axis=1, keepdims=True)
    return np.asarray(np.maximum(values[:, columns] - usual_values, 0))


def _one_rank(work: OwnWork, late: Floats) -> int | None:
    """Return the rank that causes nearly all long steps, if it is a single one and there are enough steps."""
    if len(work.ranks) < 2 or late.shape[1] < _ONE_RANK_EVENTS:
        return None

    counts = np.bincount(np.argmax(late, axis=0), minlength=len(work.ranks))
    top = int(np.argmax(counts))
    return int(work.ranks[top]) if counts[top] >= ONE_RANK_SHARE * late.shape[1] else None


def _rank_of_line(
    work: OwnWork, facts: JobFacts, events: _LongSteps, phase: str | None, line: BlamedLine | None
) -> int | None:
    """Return the rank that has nearly all that is longer, if the others hardly run its line: no other could have it."""
    if phase is None or line is None or len(work.ranks) < 2:
        return None

    sums = events.excess[phase].sum(axis=1)
    rank = int(work.ranks[int(sums.argmax())])
    is_alone = sums.max() >= ONE_RANK_SHARE * sums.sum() and is_of_ranks_alone(facts.lines, phase, line, (rank,))
    return rank if is_alone else None


def late_in_turns(work: OwnWork, facts: JobFacts, step_ns: float) -> list[Finding]:
    """Find ranks that are late in turns: none is late on average, and all wait."""
    if not work.grouped or len(work.ranks) < 2:
        return []

    uneven = {part: _imbalance(values) for part, values in work.parts.items()}
    part = max(uneven, key=lambda name: uneven[name], default=None)
    if part is None or uneven[part] < TURNS_DOMINANCE * sum(uneven.values()):
        return []

    finding = _late_in_turns(work, facts, part, work.parts[part], step_ns)
    return [] if finding is None else [finding]


def _imbalance(values: Floats) -> float:
    """Return the mean difference between the slowest rank of a step and the median; of some steps of many ranks."""
    values = values[:, :: max(1, values.size // _MAX_CELLS)]
    return float((values.max(axis=0) - median_over_ranks(values)).mean())


def _late_in_turns(work: OwnWork, facts: JobFacts, part: str, values: Floats, step_ns: float) -> Finding | None:
    outliers = _outliers(values, work.measured if part == "backward" else None, step_ns)
    late = outliers.any(axis=0)
    turns = outliers[:, late]
    # A step that is long on most ranks is not attributed to one rank.
    if late.mean() < TURNS_SHARE or late.sum() < 2 * MIN_EVENTS or (turns.mean(axis=0) <= 0.5).mean() < 2 / 3:
        return None

    base, late_ns = float(np.median(values[~outliers])), float(values[outliers].mean())
    if late_ns - base < (0.0 if work.device else TURNS_NS):
        return None

    saved = saved_ns(work, {part: np.where(outliers, np.minimum(values, base), values).astype(values.dtype)})
    if saved < least_cost_ns(step_ns) + _waits_ns(facts, step_ns):
        return None

    # Even work is no less work: what one rank no longer does at a time, all do.
    even = saved_ns(work, {part: np.where(late, values.mean(axis=0), values).astype(values.dtype)})
    counts = turns.sum(axis=1)
    by_chance = (counts > 0) & (counts >= counts.mean() - _CHANCE_ERRORS * counts.mean() ** 0.5)
    some = (counts >= 0.25 * counts.max()) | by_chance
    if some.all() and part not in COMPUTE:
        return None  # all ranks, in a part that has a finding of its own

    ranks, often = work.named(some), percent_text(float(late.mean()))
    # One rank, or several that are late in the same steps, take no turns.
    is_together = bool(ranks) and float(turns[some].mean()) >= TOGETHER_SHARE
    summary, action, evidence = (
        _seldom_late(work, facts, part, ranks, often, ns_text(late_ns), ns_text(base), step_ns)
        if is_together
        else _taking_turns(work, part, ranks, often, ns_text(late_ns), ns_text(base))
    )
    saved = saved if is_together else even
    gain = speedup(step_ns, saved)
    return Finding.of(
        straggler_kind(part),
        ranks=ranks,
        phase=part,
        summary=f"{summary}, steps would be {gain_text(gain)}.",
        next=action,
        evidence={
            "step_ms": step_ns / 1e6,
            "usual_ms": base / 1e6,
            "late_ms": late_ns / 1e6,
            "share_of_steps_late": float(late.mean()),
            **evidence,
        },
        cost_share=saved / step_ns,
        speedup_if_fixed=gain,
    )


def _waits_ns(facts: JobFacts, step_ns: float) -> float:
    """Return what waiting for a core may cost a step, if the ranks wait in turns; 0 if they had their cores."""
    if facts.wait_share < TURNS_WAIT:
        return 0.0

    # Only the main threads are known; the others wait as they do.
    waited = sum(facts.wait_of_wall_time.values()) * (facts.threads or 1) if facts.wait_of_wall_time else 1.0
    return WAITED_FACTOR * waited * step_ns


def _outliers(values: Floats, columns: NDArray[np.bool_] | None, step_ns: float) -> NDArray[np.bool_]:
    """Return which values are far above the usual, which is the lower quartile: half of all may be late."""
    flat = (values if columns is None or not columns.any() else values[:, columns]).ravel()
    low, quarter = np.quantile(flat[:: max(1, flat.size // _MAX_CELLS)], (0.05, 0.25))
    spread = np.log(max(quarter, 1) / max(low, 1)) / 0.97
    limit = quarter * max(2.0, np.exp(4.7 * spread)) + 0.05 * step_ns
    outliers = values > limit
    return np.asarray(outliers if columns is None else outliers & columns)


def _seldom_late(
    work: OwnWork,
    facts: JobFacts,
    part: str,
    ranks: tuple[int, ...],
    often: str,
    late: str,
    usual_text: str,
    step_ns: float,
) -> Explanation:
    """Explain ranks that are late in some steps, together: the sentence up to what steps would be without that."""
    are_late = np.isin(work.ranks, ranks)
    mine = float(work.parts[part][are_late].mean()) / step_ns
    line = blamed_line(facts.lines, part, mine, ranks, work.ranks[~are_late].tolist())
    slow, their = ("slow", "their") if len(ranks) > 1 else ("slows", "its")
    group = facts.topology.smallest_group(ranks, work.all_ranks)
    summary = (
        f"{subject_text(ranks, group)} {slow} the others down in {often} of the steps: {their} {phase_words(part)} "
        f"takes {late} then instead of {usual_text}{line.of_it if line else ''}; without that"
    )
    evidence = {} if group is None else {"rank_group": group.evidence()}
    action = advice.for_straggler(part, ranks, facts, line)
    if group is not None and line is None and part != "input_wait":
        action = advice.for_slow_group(group)

    return Explanation(summary, action, evidence | (line.evidence(mine) if line else {}))


def _taking_turns(
    work: OwnWork, part: str, ranks: tuple[int, ...], often: str, late: str, usual_text: str
) -> Explanation:
    summary = (
        f"{capitalized(ranks_text(ranks))} take turns being slow: in {often} of the steps {phase_words(part)} takes "
        f"{late} on one of them instead of {usual_text}; with even work"
    )
    action = (
        "Balance the work of the ranks in each step: batches of similar size on all ranks (bucket samples by length), "
        "no work that only one rank does at a time."
    )
    imbalance_ns = float((work.own.max(axis=0) - median_over_ranks(work.own)).mean())
    return Explanation(summary, action, {"imbalance_ms": imbalance_ns / 1e6})
