"""Whether late ranks lack a core, or are late for what they run."""

from __future__ import annotations

from math import inf

import numpy as np

from traceml.diagnosis.facts.blamed_lines import own_line_share
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.steps.own_work import LateRanks, OwnWork, Rows, iterator_wait

__all__ = [
    "FAR_MORE_WORK", "due_to_code_ns", "is_without_core", "may_be_without_core", "more_work_ns", "own_line_ns",
    "without_core_ns",
]  # fmt: skip

OWN_LINE_SHARE = 1 / 3
"""A line that only the late ranks run, and that has this share of their excess, shows that it is not for lack of cores.
A sampler sees code that holds the GIL less often than it runs."""
WAITING_SHARE = 0.5
"""Late ranks lack a core, and are not slow by their code, if waiting for one is this share of their excess."""
MORE_WORK_RATIO = 1.2
"""Main threads that each compute this many times as long as that of any other rank have more work. Those of equal
ranks, four on two busy cores, differ by less than 1.1."""
FAR_MORE_WORK = 2.0
"""By this factor no lower clock and no other program on a core makes the same work longer in CPU time."""
MORE_WORK_SHARE = 0.5
"""That explains the lateness if it is this share of the excess."""
MIN_COUNTED_S = 3.0
"""With waits for a core that were counted for less time, it is not known whether ranks have their cores."""


def own_line_ns(work: OwnWork, facts: JobFacts, rows: Rows, others: list[int], part: str, excess_ns: float) -> float:
    """Return the time per step of late ranks in a line that the others do not run; 0 below a third of the excess."""
    # Waiting for an iterator of the script is measured as `other`, and its samples are those of `input_wait`.
    is_iterator = part == "other" and iterator_wait(work, facts.lines, work.step_ns) > 0
    parts = (part, "input_wait") if is_iterator else (part,)
    share = max(own_line_share(facts.lines, each, work.ranks_of(rows), others) for each in parts)
    return share * work.step_ns if share * work.step_ns >= OWN_LINE_SHARE * excess_ns else 0.0


def due_to_code_ns(work: OwnWork, facts: JobFacts, rows: Rows, part: str, excess_ns: float) -> float:
    """Return the time per step by which ranks are late for what they run, not for lack of cores; 0 if unsure."""
    others = np.delete(np.arange(len(work.ranks)), rows)
    own_ns = own_line_ns(work, facts, rows, work.ranks_of(others), part, excess_ns)
    return own_ns or more_work_ns(work, facts, rows, excess_ns)


def more_work_ns(work: OwnWork, facts: JobFacts, rows: Rows, excess_ns: float) -> float:
    """Return the part of an excess that CPU time explains; 0 if it is small, or other ranks compute as long.

    A rank that has more to compute also waits longer for a core, in proportion.
    """
    late = work.ranks[rows].tolist()
    run, others = facts.core_run(late), (each for rank, each in facts.core_runs.items() if rank not in late)
    if run is None or min(facts.core_runs[rank] for rank in late) < MORE_WORK_RATIO * max(others):
        return 0.0

    waiting = float(np.median([facts.wait_of_ready_time.get(rank, 0.0) for rank in work.ranks.tolist()]))
    more_ns = (run[0] - run[1]) * work.step_ns / max(1 - waiting, 0.05)
    return min(more_ns, excess_ns) if more_ns >= MORE_WORK_SHARE * excess_ns else 0.0


def may_be_without_core(work: OwnWork, facts: JobFacts, rows: Rows) -> bool:
    """Return whether the ranks have too few cores, or these ranks wait for one more than the others.

    Also where that was counted for so short a time that a program may have come and gone.
    """
    ranks = work.ranks[rows].tolist()
    counted = [facts.core_wait_s[rank] for rank in ranks if rank in facts.core_wait_s]
    return facts.oversubscribed or facts.without_core.issuperset(ranks) or min(counted, default=inf) < MIN_COUNTED_S


def without_core_ns(work: OwnWork, facts: JobFacts, rows: Rows) -> float:
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


def is_without_core(work: OwnWork, facts: JobFacts, late: LateRanks) -> bool:
    """Return whether waiting for a core explains half of the excess of late ranks, as far as that is known.

    A rank that mostly sleeps has little work, so its share of waiting may be large without being a cause.
    """
    ranks = work.ranks[late.rows].tolist()
    if not facts.without_core.issuperset(ranks):
        return False

    is_known = facts.core_wait_of_others(ranks) is not None
    return not is_known or without_core_ns(work, facts, late.rows) >= WAITING_SHARE * late.excess_ns
