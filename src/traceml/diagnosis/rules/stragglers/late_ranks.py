"""Ranks whose own work makes the others wait, and the part of the step in which they are late.

A rank is late when its own work, summed over the window, is persistently above the others', and in one part of the
step. A fault that occurs in every fifth step changes the sum but not the median. One dominant part separates a fault
from a core or a host that is slower in everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.rules.gil_contention import background_threads
from traceml.diagnosis.rules.stragglers.core_lack import (
    due_to_code_ns,
    may_be_without_core,
    more_work_ns,
    own_line_ns,
    without_core_ns,
)
from traceml.diagnosis.rules.stragglers.excess_tests import (
    EVERYWHERE_SHARE,
    OtherRanks,
    SteadyExcess,
    is_significant,
    is_slower_overall,
    only_passes_are_slower,
    persists,
    steady_excesses,
)
from traceml.diagnosis.rules.stragglers.straggler_wording import share_late
from traceml.diagnosis.steps.own_work import COMPUTE, LateRanks, OwnWork, Rows, excess_over_others
from traceml.diagnosis.steps.speedup import RARE, saved_ns, with_typical_work
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["find_late", "late_in_one_part", "slower_ranks", "without_late"]

EXCESS_SHARE = 0.08
"""A late rank's excess over the others is at least this share of the step."""
EXCESS_NS = 1e6
"""A late rank's excess over the others is at least this long."""
DOMINANCE = 0.7
"""If no part has this share of the excess, and most of the rest is computation, the rank is slower in everything."""
SAME_GROUP_SHARE = 1 / 3
"""Ranks with more than this share of the largest excess form one group of late ranks."""
STEADY_GAIN_SHARE = 0.01
"""Without ranks that are late steadily, in one part, a step would be shorter by at least this share: with many noisy
ranks, each costs the others little."""
MIN_EXCESS_RATIO = 1.5
"""The smallest excess of a late rank is at least this many times that of any other rank."""
SAVING_SHARE = 0.5
"""Ranks that save alone are late because of it from this share of their excess on."""
NO_SAVING_RATIO = 0.1
"""The others do not save if they spend less than this share of the time on it."""
MIN_SLOW_GROUP = 4
"""A group of so many ranks, as a host, is slower in everything from `EXCESS_SHARE` on, and not by chance."""
MANY_ROWS = 64
"""More late ranks than this are judged one by one only if they are not a group: a stage has thousands."""
_MIN_MEASURED = 20


def without_late(work: OwnWork, late: Sequence[LateRanks]) -> dict[str, Floats]:
    """Return the parts that ranks are late in, with their work replaced by that of the others."""
    replaced: dict[str, Floats] = {}
    for one in late:
        for part in one.by_part_ns if one.everywhere else (one.part,):
            replaced[part] = with_typical_work(replaced.get(part, work.parts[part]), one.rows, one.others)

    return replaced


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
    before_ns = saved_ns(work, without_late(work, known))
    saved = saved_ns(work, without_late(work, [*known, *late])) - before_ns
    return late if saved >= STEADY_GAIN_SHARE * work.step_ns else []


def _late_steadily(work: OwnWork, facts: JobFacts, steady: SteadyExcess) -> LateRanks | None:
    if steady.dominance < DOMINANCE:
        return None

    row, others = np.array([steady.row]), np.delete(np.arange(len(work.ranks)), steady.row)
    without_core = may_be_without_core(work, facts, row)
    own_ns = due_to_code_ns(work, facts, row, steady.part, steady.mean_ns) if without_core else 0.0
    if max(steady.mean_ns - without_core_ns(work, facts, row), own_ns) < EXCESS_SHARE * work.step_ns:
        return None

    if not own_ns and (without_core or is_slower_overall(work, row, OtherRanks(work, others, row), steady.part)):
        return None

    return _late(work, facts, row, others, steady.part, everywhere=False)


def divide_ranks(means: Floats) -> tuple[Rows, Rows]:
    """Divide the ranks by mean own work: (those with a third of the largest excess or more, the others)."""
    base, late = float(means.min()), np.zeros(len(means), bool)
    for _ in range(3):
        late = means - base > SAME_GROUP_SHARE * (float(means.max()) - base)
        base = float(np.median(means[~late]))

    return np.flatnonzero(late), np.flatnonzero(~late)


def _without_near(work: OwnWork, ranks: Rows, late: Rows, usual: Rows) -> tuple[Rows, Rows]:
    """Return the late ranks and the others; ranks that only noise has put among the late ones count as others."""
    means = work.own[ranks].mean(axis=1)
    excess = means - float(np.median(means[usual]))
    clear = excess[late] >= MIN_EXCESS_RATIO * max(float(excess[usual].max()), 0.0)
    if clear.any():
        late, usual = late[clear], np.sort(np.append(usual, late[~clear]))

    return ranks[late], ranks[usual]


def slower_ranks(work: OwnWork) -> Rows:
    """Return the rows of ranks that work longer than all others, from the beginning to the end, be it in everything."""
    ranks = np.arange(len(work.ranks))
    rows, others = _without_near(work, ranks, *divide_ranks(work.own.mean(axis=1)))
    usual = OtherRanks(work, others, rows)
    if not _are_apart(work, rows, usual) or not is_significant(work, rows, usual):
        return ranks[:0]

    return rows if persists(work.own[rows].mean(axis=0) - usual.own, work, EXCESS_SHARE) else ranks[:0]


def _are_apart(work: OwnWork, rows: Rows, usual: OtherRanks) -> bool:
    """Return whether there are late ranks, and all other ranks are clearly apart from them."""
    excess = (work.own[rows] - usual.own).mean(axis=1)
    spread = float((work.own[usual.rows].mean(axis=1) - usual.own.mean()).max())
    return bool(len(rows)) and float(excess.min()) >= MIN_EXCESS_RATIO * max(spread, 0.0)


def _late_groups(work: OwnWork, facts: JobFacts, rows: Rows, others: Rows) -> list[LateRanks]:
    usual = OtherRanks(work, others, rows)
    if not _are_apart(work, rows, usual):
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
    work: OwnWork, facts: JobFacts, rows: Rows, usual: OtherRanks, causes: Mapping[tuple[str, bool], Sequence[int]]
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


def _cause(work: OwnWork, facts: JobFacts, rows: Rows, usual: OtherRanks) -> tuple[str, bool] | None:
    """Return (the part to blame, whether the ranks are slower in everything); None if their excess may be chance."""
    over = work.own[rows].mean(axis=0) - usual.own
    excess = float(over.mean())
    if excess < max(EXCESS_SHARE * work.step_ns, EXCESS_NS):
        return None

    # A fault in a part of the run looks like chance; a line that only these ranks run is none, if it is no rare event.
    if not is_significant(work, rows, usual) and (
        share_late(over) <= RARE or not _runs_own_line(work, facts, rows, usual)
    ):
        return None

    part, everywhere = _blamed_part(work, facts, rows, usual, over)
    return None if part is None else (part, everywhere)


def _blamed_part(
    work: OwnWork, facts: JobFacts, rows: Rows, usual: OtherRanks, over: Floats
) -> tuple[str | None, bool]:
    """Return (the part to blame or None, whether the ranks are slower in everything).

    Args:
        over: the ranks' own work beyond that of the others, by step.
    """
    excess = float(over.mean())
    by_part = _excess_by_part(work, rows, usual)
    positive = sum(value for value in by_part.values() if value > 0)
    part = max(by_part, key=lambda name: by_part[name])
    without_core = may_be_without_core(work, facts, rows)
    own_ns = own_line_ns(work, facts, rows, usual.all_ranks, part, by_part[part]) if without_core else 0.0
    more_ns = more_work_ns(work, facts, rows, excess) if without_core else 0.0
    explained_ns = max(excess - without_core_ns(work, facts, rows), own_ns, more_ns)
    if own_ns:
        return (part if explained_ns >= EXCESS_SHARE * work.step_ns else None), False

    alike = _is_slow_host(by_part, part, positive)
    if part in COMPUTE:
        alike = alike or is_slower_overall(work, rows, usual, part)
    elif alike:  # slow data and one slow phase are two causes
        slowest = max((name for name in COMPUTE if name in by_part), key=lambda name: by_part[name])
        alike = is_slower_overall(work, rows, usual, slowest)

    everywhere = alike and not _saves_alone(rows, usual, part, by_part[part] / positive)
    seldom = part == "backward" and int(work.measured.sum()) < _MIN_MEASURED
    # A slow host slows down the optimizer, too.
    is_host = everywhere and not only_passes_are_slower(work, rows, usual.rows)
    # One core of a healthy job may be slower than the others; not those of several ranks that are a group.
    least = EVERYWHERE_SHARE if is_host and len(rows) < MIN_SLOW_GROUP else EXCESS_SHARE
    floor = EVERYWHERE_SHARE if seldom or (without_core and not more_ns) else least
    chance = everywhere and facts.oversubscribed and not more_ns
    if chance and facts.threads == 1:  # other threads may explain it; torch's, where there are several, do not
        chance = background_threads(facts, work.ranks_of(rows)) is None

    if explained_ns < floor * work.step_ns or chance or (everywhere and not persists(over, work, least)):
        return None, everywhere

    return part, everywhere


def _is_slow_host(by_part: Mapping[str, float], part: str, positive: float) -> bool:
    """Return whether no part dominates an excess, and most of the rest is other computation, as on a slow core."""
    rest = positive - by_part[part]
    computing = sum(max(by_part.get(name, 0.0), 0.0) for name in COMPUTE if name != part)
    return by_part[part] < DOMINANCE * positive and 2 * computing >= rest


def _saves_alone(rows: Rows, usual: OtherRanks, part: str, share: float) -> bool:
    """Return whether ranks save, where others do not, for most of their excess: that is no slow host."""
    others_ns, mine_ns = float(usual.parts[part].mean()), float(usual.work.parts[part][rows].mean())
    return part == "checkpoint" and share >= SAVING_SHARE and others_ns < NO_SAVING_RATIO * mine_ns


def _excess_by_part(work: OwnWork, rows: Rows, usual: OtherRanks) -> dict[str, float]:
    return {part: float((values[rows] - usual.parts[part]).mean()) for part, values in work.parts.items()}


def _runs_own_line(work: OwnWork, facts: JobFacts, rows: Rows, usual: OtherRanks) -> bool:
    """Return whether a line of the slow part that only these ranks run explains a reportable excess by itself."""
    by_part = _excess_by_part(work, rows, usual)
    part = max(by_part, key=lambda name: by_part[name])
    return own_line_ns(work, facts, rows, usual.all_ranks, part, by_part[part]) >= EXCESS_SHARE * work.step_ns


def _late(work: OwnWork, facts: JobFacts, rows: Rows, others: Rows, part: str, everywhere: bool) -> LateRanks:
    by_part = {name: float(excess_over_others(values, rows, others).mean()) for name, values in work.parts.items()}
    positive = {name: value for name, value in by_part.items() if value > 0}
    ranks = work.ranks_of(rows)
    return LateRanks(
        rows=rows,
        others=others,
        ranks=tuple(ranks),
        other_ranks=work.ranks_of(others),
        part=part,
        excess_ns=float(excess_over_others(work.own, rows, others).mean()) if everywhere else by_part[part],
        dominance=by_part[part] / max(sum(positive.values()), 1.0),
        everywhere=everywhere,
        only_passes=everywhere and only_passes_are_slower(work, rows, others),
        by_part_ns=positive,
        group=facts.topology.smallest_group(ranks, work.all_ranks),
    )
