"""Stragglers: ranks whose own work makes the others wait.

A rank is late when its own work, summed over the window, is persistently above the others', and in one part of the
step. A fault that occurs in every fifth step changes the sum but not the median. One dominant part separates a fault
from a core or a host that is slower in everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from math import hypot, inf

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis import advice
from traceml.diagnosis.facts.blamed_lines import (
    BlamedLine,
    blamed_line,
    is_of_ranks_alone,
    lines_of_ranks_alone,
    own_line_share,
    workers_line,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import workers_at_work
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.interpreter_lock import background_threads
from traceml.diagnosis.rules.straggler_wording import (
    fewer_workers,
    late_evidence,
    late_summary,
    mean_of_others,
    more_cpu_time,
    share_late,
    stage_summary,
    waited_for_core,
)
from traceml.diagnosis.steps.long_steps import RARE, count_long_steps, long_steps_blame
from traceml.diagnosis.steps.own_work import COMPUTE, UNNAMED_CODE, LateRanks, OwnWork
from traceml.diagnosis.steps.speedup import saved_ns, speedup, with_typical_work
from traceml.diagnosis.steps.steady_excess import SteadyExcess, steady_excesses
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["straggler_kind", "stragglers"]

EXCESS_SHARE = 0.08
"""A late rank's excess over the others is at least this share of the step."""
EXCESS_NS = 1e6
"""A late rank's excess over the others is at least this long."""
DOMINANCE = 0.7
"""If no part has this share of the excess, the rank is slower in everything."""
EVERYWHERE_SHARE = 0.30
"""A rank that is slower in everything is reported if its excess is at least this share of the step."""
SAME_GROUP_SHARE = 1 / 3
"""Ranks with more than this share of the largest excess form one group of late ranks."""
GAIN_SHARE = 0.05
"""Without the late ranks a step would be shorter by at least this share, unless they are very late."""
STEADY_GAIN_SHARE = 0.01
"""The same for a rank that is late steadily, in one part: with many noisy ranks, each costs the others little."""
MIN_EXCESS_RATIO = 1.5
"""The smallest excess of a late rank is at least this many times that of any other rank."""
MIN_Z_SCORE = 3.5
"""The excess is this many standard errors above 0, plus one for each tenth of a step that it is below a fifth."""
MIN_Z_SCORE_OF_LONG = 1.5
"""With a smaller z-score than that, but not than this, long steps are counted."""
SIMILAR_SLOWDOWN_SHARE = 0.25
"""If a second computing part is slower by this share of the first one's factor, the rank is slower in everything."""
SIMILAR_MIN_Z_SCORE = 2.0
"""The excess of that second part must be this many standard errors above 0."""
OWN_LINE_SHARE = 1 / 3
"""A line that only the late ranks run, and that has this share of their excess, shows that it is not for lack of cores.
A sampler sees code that holds the interpreter's lock less often than it runs."""
SAVING_SHARE = 0.5
"""Ranks that save alone are late because of it from this share of their excess on."""
NO_SAVING_RATIO = 0.1
"""The others do not save if they spend less than this share of the time on it."""
WAITING_SHARE = 0.5
"""Late ranks lack a core, and are not slow by their code, if waiting for one is this share of their excess."""
MORE_WORK_RATIO = 1.2
"""Main threads that each compute this many times as long as that of any other rank have more work. Those of equal
ranks, four on two busy cores, differ by less than 1.1."""
FAR_MORE_WORK = 2.0
"""By this factor no lower clock and no other program on a core makes the same work longer in CPU time."""
MORE_WORK_SHARE = 0.5
"""That explains the lateness if it is this share of the excess."""

MAIN_SHARE = 0.9
"""A line with less of the excess of late ranks is told with a second one, and promises no more than its own gain."""
MIN_COUNTED_S = 3.0
"""With waits for a core that were counted for less time, it is not known whether ranks have their cores."""
MANY_ROWS = 64
"""More late ranks than this are judged one by one only if they are not a group: a stage has thousands."""

_BATCHES = 8
_MIN_MEASURED = 20
_Rows = NDArray[np.intp]
"""Indices of ranks in the window."""


class _Others(msgspec.Struct, frozen=True, dict=True):
    """The ranks that are not late, by whose work late ones are judged, each of thousands."""

    work: OwnWork
    rows: _Rows
    late: _Rows  # the ranks that are judged, of which some may turn out not to be late

    @cached_property
    def all_ranks(self) -> list[int]:
        """All ranks but the judged ones, also those whose lateness is known."""
        return self.work.ranks_of(np.delete(np.arange(len(self.work.ranks)), self.late))

    @cached_property
    def own(self) -> Floats:
        """Their mean own work, by step."""
        return mean_of_others(self.work.own[self.rows])

    @cached_property
    def parts(self) -> dict[str, Floats]:
        """Its parts."""
        return {part: mean_of_others(values[self.rows]) for part, values in self.work.parts.items()}

    @cached_property
    def long_steps(self) -> NDArray[np.int64]:
        """Long steps of all ranks, compared with theirs."""
        return count_long_steps(self.work, self.rows)


def stragglers(work: OwnWork, facts: JobFacts) -> tuple[list[Finding], dict[str, Floats]]:
    """Return a finding per group of late ranks, and the parts with their work replaced by that of the others."""
    if not work.grouped or len(work.ranks) < 2:
        return [], {}

    late = find_late(work, facts)
    without_stragglers = _without_stragglers(work, late)
    if late and saved_ns(work, without_stragglers) < GAIN_SHARE * work.step_ns:
        # Other ranks are late as often; a small difference on average is not a fault.
        late = [one for one in late if one.excess_ns >= EVERYWHERE_SHARE * work.step_ns]
        without_stragglers = _without_stragglers(work, late)

    late += late_in_one_part(work, facts, late)
    return [_finding(work, facts, one) for one in late], _without_stragglers(work, late)


def _without_stragglers(work: OwnWork, late: Sequence[LateRanks]) -> dict[str, Floats]:
    without_stragglers: dict[str, Floats] = {}
    for one in late:
        for part in one.by_part_ns if one.everywhere else (one.part,):
            without_stragglers[part] = with_typical_work(
                without_stragglers.get(part, work.parts[part]), one.rows, one.others
            )

    return without_stragglers


def find_late(work: OwnWork, facts: JobFacts) -> list[LateRanks]:
    """Return the groups of late ranks, the largest excess first."""
    remaining = np.arange(len(work.ranks))
    found: list[LateRanks] = []
    # One group of late ranks may hide a second one with another cause; a third waits for the next diagnosis.
    for _ in range(2):
        if len(remaining) < 2:
            break

        rows, others = _without_near(work, remaining, *divide_ranks(work.own[remaining].mean(axis=1)))
        groups = _late_groups(work, facts, rows, others)
        if not groups:
            break

        found += groups
        remaining = others

    return found


def late_in_one_part(work: OwnWork, facts: JobFacts, known: Sequence[LateRanks] = ()) -> list[LateRanks]:
    """Return ranks that are late in one part of the step each, weakly but steadily; at most two, and no known ones.

    Ranks that are late in different parts hide each other: their sums are alike, and steps gain little by one of them.
    """
    rows = {row for one in known for row in one.rows.tolist()}
    steady = steady_excesses(work, max(EXCESS_SHARE * work.step_ns, EXCESS_NS))
    found = [_late_steadily(work, facts, each) for each in steady if each.row not in rows]
    late = [one for one in found if one is not None][:2]
    before_ns = saved_ns(work, _without_stragglers(work, known))
    saved = saved_ns(work, _without_stragglers(work, [*known, *late])) - before_ns
    return late if saved >= STEADY_GAIN_SHARE * work.step_ns else []


def _late_steadily(work: OwnWork, facts: JobFacts, steady: SteadyExcess) -> LateRanks | None:
    if steady.dominance < DOMINANCE:
        return None

    row, others = np.array([steady.row]), np.delete(np.arange(len(work.ranks)), steady.row)
    without_core = _may_be_without_core(work, facts, row)
    own_ns = _due_to_code_ns(work, facts, row, steady.part, steady.mean_ns) if without_core else 0.0
    if max(steady.mean_ns - _without_core_ns(work, facts, row), own_ns) < EXCESS_SHARE * work.step_ns:
        return None

    if not own_ns and (without_core or _is_slower_overall(work, row, _Others(work, others, row), steady.part)):
        return None

    return _late(work, facts, row, others, steady.part, everywhere=False)


def divide_ranks(means: Floats) -> tuple[_Rows, _Rows]:
    """Divide the ranks by mean own work: (those with a third of the largest excess or more, the others)."""
    base, late = float(means.min()), np.zeros(len(means), bool)
    for _ in range(3):
        late = means - base > SAME_GROUP_SHARE * (float(means.max()) - base)
        base = float(np.median(means[~late]))

    return np.flatnonzero(late), np.flatnonzero(~late)


def _without_near(work: OwnWork, ranks: _Rows, late: _Rows, usual: _Rows) -> tuple[_Rows, _Rows]:
    """Return the late ranks and the others; ranks that only noise has put among the late ones count as others."""
    means = work.own[ranks].mean(axis=1)
    excess = means - float(np.median(means[usual]))
    clear = excess[late] >= MIN_EXCESS_RATIO * max(float(excess[usual].max()), 0.0)
    if clear.any():
        late, usual = late[clear], np.sort(np.append(usual, late[~clear]))

    return ranks[late], ranks[usual]


def _late_groups(work: OwnWork, facts: JobFacts, rows: _Rows, others: _Rows) -> list[LateRanks]:
    usual = _Others(work, others, rows)
    excess = (work.own[rows] - usual.own).mean(axis=1)
    spread = float((work.own[others].mean(axis=1) - usual.own.mean()).max())
    # All other ranks must be clearly apart from the late ones.
    if not len(rows) or float(excess.min()) < MIN_EXCESS_RATIO * max(spread, 0.0):
        return []

    if len(rows) > MANY_ROWS:
        together = _one_group(work, facts, rows, usual, {})
        if together is not None:
            return [together]

    causes: dict[tuple[str, bool], list[int]] = {}
    for row in rows.tolist():
        cause = _cause(work, facts, np.array([row]), usual)
        if cause is not None:
            causes.setdefault(cause, []).append(row)

    together = _one_group(work, facts, rows, usual, causes)
    found = [_late(work, facts, np.array(late), others, *cause) for cause, late in causes.items()]
    return [together] if together is not None else sorted(found, key=lambda late: -late.excess_ns)


def _one_group(
    work: OwnWork, facts: JobFacts, rows: _Rows, usual: _Others, causes: Mapping[tuple[str, bool], Sequence[int]]
) -> LateRanks | None:
    """Return the late ranks as one group if they are a host, a switch or a part of the mesh, and have one cause.

    The noise of a single rank may hide its cause, or let it look slower in everything; that of a group hides less.
    """
    if sum(not everywhere for _, everywhere in causes) > 1:
        return None

    blamed = sorted(row for late in causes.values() for row in late)
    for some in (rows, np.array(blamed, np.intp)):
        if facts.topology.smallest_group(work.ranks_of(some), work.all_ranks) is None:
            continue

        cause = _cause(work, facts, some, usual)
        if cause is not None:
            return _late(work, facts, some, usual.rows, *cause)

    return None


def _cause(work: OwnWork, facts: JobFacts, rows: _Rows, usual: _Others) -> tuple[str, bool] | None:
    """Return (the part to blame, whether the ranks are slower in everything); None if their excess may be chance."""
    over = work.own[rows].mean(axis=0) - usual.own
    excess = float(over.mean())
    if excess < max(EXCESS_SHARE * work.step_ns, EXCESS_NS):
        return None

    # A fault in a part of the run looks like chance; a line that only these ranks run is none, if it is no rare event.
    if not _is_significant(work, rows, usual) and (
        share_late(over) <= RARE or not _runs_own_line(work, facts, rows, usual)
    ):
        return None

    part, everywhere = _blamed_part(work, facts, rows, usual, excess)
    return None if part is None or (everywhere and not _persists(over, work)) else (part, everywhere)


def _blamed_part(work: OwnWork, facts: JobFacts, rows: _Rows, usual: _Others, excess: float) -> tuple[str | None, bool]:
    """Return (the part to blame or None, whether the ranks are slower in everything)."""
    by_part = _excess_by_part(work, rows, usual)
    positive = sum(value for value in by_part.values() if value > 0)
    part = max(by_part, key=lambda name: by_part[name])
    without_core = _may_be_without_core(work, facts, rows)
    own_ns = _own_line_ns(work, facts, rows, usual.all_ranks, part, by_part[part]) if without_core else 0.0
    more_ns = _more_work_ns(work, facts, rows, excess) if without_core else 0.0
    explained_ns = max(excess - _without_core_ns(work, facts, rows), own_ns, more_ns)
    if own_ns:
        return (part if explained_ns >= EXCESS_SHARE * work.step_ns else None), False

    alike = by_part[part] < DOMINANCE * positive or _is_slower_overall(work, rows, usual, part)
    everywhere = alike and not _saves_alone(rows, usual, part, by_part[part] / positive)
    seldom = part == "backward" and int(work.measured.sum()) < _MIN_MEASURED
    floor = EVERYWHERE_SHARE if everywhere or seldom or (without_core and not more_ns) else EXCESS_SHARE
    chance = everywhere and facts.oversubscribed and not more_ns
    if explained_ns < floor * work.step_ns or (chance and not _waits_for_side_threads(work, facts, rows)):
        return None, everywhere

    return part, everywhere


def _saves_alone(rows: _Rows, usual: _Others, part: str, share: float) -> bool:
    """Return whether ranks save, where others do not, for most of their excess: that is no slow host."""
    others_ns, mine_ns = float(usual.parts[part].mean()), float(usual.work.parts[part][rows].mean())
    return part == "checkpoint" and share >= SAVING_SHARE and others_ns < NO_SAVING_RATIO * mine_ns


def _waits_for_side_threads(work: OwnWork, facts: JobFacts, rows: _Rows) -> bool:
    """Return whether other threads of the ranks explain that they are slower in everything, beside a lack of cores.

    Torch's own threads compute for the main one: where there are several, they say nothing.
    """
    return facts.threads == 1 and background_threads(facts, work.ranks_of(rows)) is not None


def _excess_by_part(work: OwnWork, rows: _Rows, usual: _Others) -> dict[str, float]:
    return {part: float((values[rows] - usual.parts[part]).mean()) for part, values in work.parts.items()}


def _runs_own_line(work: OwnWork, facts: JobFacts, rows: _Rows, usual: _Others) -> bool:
    """Return whether a line of the slow part that only these ranks run explains a reportable excess by itself."""
    by_part = _excess_by_part(work, rows, usual)
    part = max(by_part, key=lambda name: by_part[name])
    return _own_line_ns(work, facts, rows, usual.all_ranks, part, by_part[part]) >= EXCESS_SHARE * work.step_ns


def _own_line_ns(work: OwnWork, facts: JobFacts, rows: _Rows, others: list[int], part: str, excess_ns: float) -> float:
    """Return the time per step of late ranks in a line that the others do not run; 0 below a third of the excess."""
    share = own_line_share(facts.lines, part, work.ranks_of(rows), others)
    return share * work.step_ns if share * work.step_ns >= OWN_LINE_SHARE * excess_ns else 0.0


def _due_to_code_ns(work: OwnWork, facts: JobFacts, rows: _Rows, part: str, excess_ns: float) -> float:
    """Return the time per step by which ranks are late for what they run, not for lack of cores; 0 if unsure."""
    others = np.delete(np.arange(len(work.ranks)), rows)
    own_ns = _own_line_ns(work, facts, rows, work.ranks_of(others), part, excess_ns)
    return own_ns or _more_work_ns(work, facts, rows, excess_ns)


def _more_work_ns(work: OwnWork, facts: JobFacts, rows: _Rows, excess_ns: float) -> float:
    """Return the part of an excess that CPU time explains; 0 if it is small, or other ranks compute as long.

    A rank that has more to compute also waits longer for a core, in proportion.
    """
    late = work.ranks[rows].tolist()
    others, run = facts.core_runs_of_others(late), facts.core_run(late)
    if run is None or min(facts.core_runs[rank] for rank in late) < MORE_WORK_RATIO * max(others):
        return 0.0

    waiting = float(np.median([facts.wait_of_ready_time.get(rank, 0.0) for rank in work.ranks.tolist()]))
    more_ns = (run[0] - run[1]) * work.step_ns / max(1 - waiting, 0.05)
    return min(more_ns, excess_ns) if more_ns >= MORE_WORK_SHARE * excess_ns else 0.0


def _has_far_more_work(facts: JobFacts, ranks: Sequence[int]) -> bool:
    """Return whether ranks ran for longer than the others by more than a lower clock or a shared core explains."""
    run = facts.core_run(ranks)
    return run is not None and run[0] >= FAR_MORE_WORK * run[1]


def _may_be_without_core(work: OwnWork, facts: JobFacts, rows: _Rows) -> bool:
    """Return whether the ranks have too few cores, or these ranks wait for one more than the others.

    Also where that was counted for so short a time that a program may have come and gone.
    """
    ranks = work.ranks[rows].tolist()
    counted = [facts.core_wait_s[rank] for rank in ranks if rank in facts.core_wait_s]
    return facts.oversubscribed or facts.without_core.issuperset(ranks) or min(counted, default=inf) < MIN_COUNTED_S


def _is_slower_overall(work: OwnWork, rows: _Rows, usual: _Others, part: str) -> bool:
    """Return whether another computing part is slower by a similar factor: then the ranks are, not that part."""
    if part not in COMPUTE:
        return False

    base = {name: max(float(usual.parts[name].mean()), 1.0) for name in COMPUTE if name in usual.parts}
    excess = {name: work.in_measured(name, work.parts[name][rows].mean(axis=0) - usual.parts[name]) for name in base}
    least = SIMILAR_SLOWDOWN_SHARE * float(excess[part].mean()) / base[part]
    return any(
        float(excess[name].mean()) / base[name] >= least and _errors(excess[name]) >= SIMILAR_MIN_Z_SCORE
        for name in base
        if name != part and base[name] >= 0.01 * sum(base.values())
    )


def _without_core_ns(work: OwnWork, facts: JobFacts, rows: _Rows) -> float:
    """Return the time per step that the ranks waited for a core beyond the others; 0 if unknown.

    On a busy host who has more to compute waits longer for a core: that much is due to the work. What the others wait
    for a core while they wait for the late ranks, too, costs nothing: no more counts than they work themselves.
    """
    late = work.ranks[rows].tolist()
    others, run = facts.core_wait_of_others(late), facts.core_run(late)
    if others is None:
        return 0.0

    own = work.own.mean(axis=1)
    mine_ns = float(np.mean([facts.wait_of_wall_time.get(rank, 0.0) for rank in late])) * work.step_ns
    others_ns = min(others * work.step_ns, float(np.median(np.delete(own, rows))))
    more_work = 1.0 if run is None else max(run[0] / run[1], 1.0)
    return max(min(mine_ns, float(own[rows].mean())) - more_work * others_ns, 0.0)


def _is_significant(work: OwnWork, rows: _Rows, usual: _Others) -> bool:
    """Return whether the excess is not chance: it is steady, or nearly all long steps are of these ranks."""
    excess = {part: values[rows].mean(axis=0) - usual.parts[part] for part, values in work.parts.items()}
    backward = excess.pop("backward", np.zeros(1, np.float32))
    steady = [np.sum(list(excess.values()), axis=0), work.in_measured("backward", backward)]
    (mean, error), (mean_backward, error_backward) = (_mean_and_error(values) for values in steady)
    share = (mean + mean_backward) / work.step_ns
    needed = MIN_Z_SCORE + 10 * max(0.0, 0.2 - share)
    errors = (mean + mean_backward) / hypot(error, error_backward)
    if errors >= needed:
        return True

    return errors >= MIN_Z_SCORE_OF_LONG and long_steps_blame(usual.long_steps, rows, usual.rows)


def _mean_and_error(values: Floats) -> tuple[float, float]:
    """Return the mean and its standard error, from the means of batches of steps, as noise may last some steps."""
    number = min(max(len(values) // 10, _BATCHES), 2 * _BATCHES, len(values))
    begins, sizes = _batches(len(values), number)
    means = np.add.reduceat(values, begins, dtype=np.float64) / sizes
    mean = float(means.sum()) / number
    spread = means - mean
    error = (float(spread @ spread) / (number * (number - 1))) ** 0.5 if number > 1 else 0.0
    return mean, max(error, 1.0)


@lru_cache(maxsize=16)
def _batches(steps: int, number: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the beginning and the size of each of several batches of steps, as equal as can be."""
    ends = np.arange(number + 1) * steps // number
    return ends[:-1], np.diff(ends)


def _errors(values: Floats) -> float:
    mean, error = _mean_and_error(values)
    return mean / error


def _persists(excess: Floats, work: OwnWork) -> bool:
    halves = zip(np.array_split(excess, 2), np.array_split(work.step, 2), strict=True)
    return all(float(half.mean()) >= EVERYWHERE_SHARE * float(step.mean()) for half, step in halves)


def _late(work: OwnWork, facts: JobFacts, rows: _Rows, others: _Rows, part: str, everywhere: bool) -> LateRanks:
    by_part = {
        name: float((values[rows].mean(axis=0) - mean_of_others(values[others])).mean())
        for name, values in work.parts.items()
    }
    positive = {name: value for name, value in by_part.items() if value > 0}
    total = float((work.own[rows].mean(axis=0) - mean_of_others(work.own[others])).mean())
    dominance = by_part[part] / max(sum(positive.values()), 1.0)
    return LateRanks(
        rows=rows,
        others=others,
        part=part,
        excess_ns=total if everywhere else by_part[part],
        dominance=dominance,
        everywhere=everywhere,
        by_part_ns=positive,
        group=facts.topology.smallest_group(work.ranks_of(rows), work.all_ranks),
    )


def straggler_kind(part: str) -> Kind:
    """Return the kind of finding for ranks that are late in a part of the step."""
    if part == "input_wait":
        return Kind.INPUT_STRAGGLER

    if part == "h2d":
        return Kind.H2D_STRAGGLER

    if part == "checkpoint":
        return Kind.CHECKPOINT_STALLS

    return Kind.COMPUTE_STRAGGLER if part in COMPUTE else Kind.STRAGGLER


def _is_without_core(work: OwnWork, facts: JobFacts, late: LateRanks) -> bool:
    """Return whether waiting for a core explains half of the excess of late ranks, as far as that is known.

    A rank that mostly sleeps has little work, so its share of waiting may be large without being a cause.
    """
    ranks = work.ranks[late.rows].tolist()
    if not facts.without_core.issuperset(ranks):
        return False

    is_known = facts.core_wait_of_others(ranks) is not None
    return not is_known or _without_core_ns(work, facts, late.rows) >= WAITING_SHARE * late.excess_ns


def _waiting_share(work: OwnWork, late: LateRanks) -> float:
    """Return the share of the step that late ranks wait for others, mostly inside backward."""
    return max(1.0 - float(work.own[late.rows].mean()) / work.step_ns, 0.0)


def _read_for_others(work: OwnWork, facts: JobFacts, late: LateRanks) -> bool:
    """Return whether late ranks alone have loaders, and the others wait for no data of their own."""
    readers = {rank for rank, loaders in facts.loaders.items() if loaders}
    waits = work.parts["input_wait"]
    return readers == set(work.ranks_of(late.rows)) and not waits[late.others].any()


def _own_code(
    work: OwnWork, facts: JobFacts, late: LateRanks, line: BlamedLine | None
) -> tuple[Sequence[BlamedLine], float]:
    """Return the lines that late ranks are in, and which part of their excess these are: all of it where unknown.

    The main line, or two that only these ranks run, if one has little more than half.
    """
    ranks, own_ns = work.ranks_of(late.rows), _share_of_part(work, late) * work.step_ns
    found: tuple[BlamedLine, ...] = (line,) if line is not None else ()
    if late.everywhere or late.part not in UNNAMED_CODE:
        return found, 1.0

    if line is None or line.share < MAIN_SHARE:
        found = lines_of_ranks_alone(facts.lines, late.part, own_ns / work.step_ns, ranks) or found

    is_known = all(
        not each.is_rough and not each.is_least and is_of_ranks_alone(facts.lines, late.part, each, ranks)
        for each in found
    )
    explained = sum(each.share for each in found) * own_ns / late.excess_ns
    return found, explained if found and is_known and explained < MAIN_SHARE else 1.0


def _finding(work: OwnWork, facts: JobFacts, late: LateRanks) -> Finding:
    ranks, line = tuple(work.ranks_of(late.rows)), _line(work, facts, late)
    is_stage = late.part in COMPUTE and facts.batches.has_own_stages(ranks, work.ranks_of(late.others))
    if is_stage and (line is None or not facts.waits_in(late.part, line)):
        return _stage_finding(work, facts, late, line)

    blamed = tuple(late.by_part_ns) if late.everywhere else (late.part,)
    saved = saved_ns(work, {part: with_typical_work(work.parts[part], late.rows, late.others) for part in blamed})
    # Ranks late in turns cost more than the mean of each; with two causes at once, fixing one gains less than its cost.
    share = min(max(late.excess_ns, saved) / work.step_ns, 1.0)
    most = work.step_ns - _workers_of_others_ns(work, facts, late)
    is_bounded, saved = most < saved, min(saved, most)
    gain = speedup(work.step_ns, saved)
    lines, part_of_excess = _own_code(work, facts, late, line)
    of_lines = speedup(work.step_ns, saved * part_of_excess) if part_of_excess < 1.0 else None
    why, action = _reason(work, facts, late, line, lines)
    return Finding.of(
        straggler_kind(late.part),
        ranks=ranks,
        phase=late.part,
        summary=late_summary(
            work, late, share, gain, lines, facts.loader_workers, of_lines, is_bounded_by_workers=is_bounded
        )
        + why,
        next=action,
        evidence=_evidence(work, facts, late, lines[0] if lines else None),
        cost_share=share,
        speedup_if_fixed=of_lines or gain,
    )


def _workers_of_others_ns(work: OwnWork, facts: JobFacts, late: LateRanks) -> float:
    """Return how long a step takes at least without late data, as the loader workers of the others are no faster.

    Each makes batches for a share of the time, and would for all of it; 0 where they have no workers, or few samples.
    """
    others = set(work.ranks_of(late.others))
    at_work = workers_at_work([each for each in facts.worker_lines if each.rank in others])
    return at_work.share * work.step_ns if late.part == "input_wait" and not at_work.is_rough else 0.0


def _stage_finding(work: OwnWork, facts: JobFacts, late: LateRanks, line: BlamedLine | None) -> Finding:
    """Return the finding about ranks that are the longest stages of a pipeline."""
    ranks = tuple(work.ranks_of(late.rows))
    more_ns = float((work.own[late.rows].mean(axis=0) - mean_of_others(work.own[late.others])).mean())
    return Finding.of(
        straggler_kind(late.part),
        ranks=ranks,
        phase=late.part,
        summary=stage_summary(work, late, more_ns),
        next=advice.for_long_stage(ranks),
        evidence=_evidence(work, facts, late, line),
        cost_share=min(more_ns / work.step_ns, 1.0),
    )


def _share_of_part(work: OwnWork, late: LateRanks) -> float:
    """Return the share of the step that late ranks spend in the slow part."""
    return float(work.parts[late.part][late.rows].mean()) / work.step_ns


def _line(work: OwnWork, facts: JobFacts, late: LateRanks) -> BlamedLine | None:
    """Return the line in which the ranks are late; None if they are slower in every part, or it is not known."""
    if late.everywhere:
        return None

    ranks, others = tuple(work.ranks_of(late.rows)), work.ranks_of(late.others)
    if late.part == "input_wait" and facts.loader_workers:  # the loop's own line is that in which it waits for them
        return workers_line(facts.worker_lines, ranks, others)

    waiting = _waiting_share(work, late) if late.part == "backward" else 0.0
    return blamed_line(facts.lines, late.part, _share_of_part(work, late), ranks, others, waiting)


def _evidence(work: OwnWork, facts: JobFacts, late: LateRanks, line: BlamedLine | None) -> dict[str, object]:
    of_line = line.evidence(_share_of_part(work, late)) if line else {}
    return late_evidence(work, facts, late, tuple(work.ranks_of(late.rows))) | of_line


def _reason(
    work: OwnWork, facts: JobFacts, late: LateRanks, line: BlamedLine | None, lines: Sequence[BlamedLine]
) -> tuple[str, str]:
    """Return the sentence about why the ranks are late, empty if nothing more is known, and the advice.

    Args:
        line: the line in which they are late.
        lines: that line, or two that have most of their time together.
    """
    ranks, others = tuple(work.ranks_of(late.rows)), work.ranks_of(late.others)
    is_loading, why = late.part == "input_wait", ""
    action = advice.for_straggler(None if late.everywhere else late.part, ranks, facts, line)
    if len(lines) > 1:
        action = advice.for_own_code(ranks, facts, lines)

    if late.group is not None and line is None and not is_loading:
        action = advice.for_slow_group(late.group)

    beside = background_threads(facts, ranks) if late.everywhere else None
    if beside is not None:
        why, action = beside.text, beside.action

    if is_loading and (fewer := fewer_workers(facts, ranks, others)) is not None:
        why, usual = fewer
        action = advice.for_fewer_workers(ranks, usual)

    if is_loading and _read_for_others(work, facts, late):
        action = advice.for_reading_ranks(ranks, facts)

    if beside is None and not is_loading and _is_without_core(work, facts, late):
        is_due_to_code = _due_to_code_ns(work, facts, late.rows, late.part, late.excess_ns)
        return (
            waited_for_core(facts, ranks, others),
            action if is_due_to_code else advice.for_rank_without_core(ranks, facts),
        )

    if not why and facts.oversubscribed and _more_work_ns(work, facts, late.rows, late.excess_ns) > 0:
        why = more_cpu_time(facts, ranks)
        if late.everywhere and _has_far_more_work(facts, ranks):
            action = advice.for_more_work(ranks)

    return why, action
