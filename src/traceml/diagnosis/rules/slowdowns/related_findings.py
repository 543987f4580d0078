"""Relations of slower steps to other findings: late ranks, costs of all steps, other trainings, and lost cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis.advice import for_first_batches
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Explanation, Finding
from traceml.diagnosis.kinds import WARNING_SHARE, Kind
from traceml.diagnosis.rules.slowdowns.coinciding_changes import CORE_WAITS
from traceml.diagnosis.rules.slowdowns.slow_parts import COMM, PASSES
from traceml.diagnosis.rules.slowdowns.slow_steps import SlowSteps
from traceml.diagnosis.steps.change_points import level_change
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.speedup import speedup_of_share
from traceml.diagnosis.steps.step_history import StepHistory
from traceml.formatting import count_text, ns_text, percent_text

__all__ = [
    "depends_on_model", "is_continued", "is_of_the_host", "with_part_of_run", "with_steps_from_history",
    "with_steps_from_slowdown",
]  # fmt: skip

SAME_CHANGE = 0.1
"""Changes whose first steps differ by less than this share of their number are the same."""
MIN_COST_RATIO = 0.5
"""Ranks that are late only in the slow part cost about as much as it does; those late before it too, more than that."""
END_SHARE = 0.1
"""Ranks that are not late in a smaller rest of the run did not recover: the last steps are unlike the others."""
CORES_SHARE = 0.5
"""Waiting for cores costs this share of what the slow steps do if it makes forward and backward slower."""
HELD_SHARE = 0.7
"""A part of the run that has this share of a cost is told,"""
MAX_PART = 0.5
"""if it has no more than this share of the steps."""
_STEPS = ("shape", "since_step", "until_step", "growth_ms_per_step")
_OF_CORES = {*CORE_WAITS, "others_cores", "memory_share"}


def with_steps_from_slowdown(late: Finding, slower: Finding, first_step: int) -> Finding:
    """Return a finding about late ranks with the steps in which they are; unchanged where others became slower.

    Args:
        first_step: the first one of the steps that were compared.
    """
    if not _is_same_cause(late, slower):
        return late

    return _timed(late, {name: slower.evidence[name] for name in _STEPS if name in slower.evidence}, first_step)


def with_steps_from_history(late: Finding, judged: NDArray[np.int64], bins: StepHistory) -> Finding:
    """Return a finding about late ranks with the steps in which they are, by their work alone; others unchanged.

    Args:
        judged: the steps that it is about; slow ones before them are not those in which the ranks are late.
    """
    if not (late.blames_ranks and late.ranks) or not len(bins.ranks):
        return late

    alone = bins.of_ranks(late.ranks, late.phase)
    change = level_change(alone.step_ns)
    if change is None or (change.shape == "first" and change.last > (1 - END_SHARE) * len(alone.step_ns)):
        return late

    slow = SlowSteps(alone, change)
    mean, lost = slow.mean_and_lost_ns()
    is_clear = lost >= MIN_COST_RATIO * late.cost_share * mean and slow.is_of_mean()
    return _timed(late, slow.evidence(), alone.first_step[0]) if is_clear and slow.contains(judged).any() else late


def with_part_of_run(
    cost: Finding, judged: NDArray[np.int64], bins: StepHistory, work: OwnWork, facts: JobFacts
) -> Finding:
    """Return a finding about a cost of all steps with the part of the run that has most of it; others unchanged.

    The first epoch reads files that are cached afterwards; a second training has a data set of its own.

    Args:
        judged: the steps whose cost it is; the part is told if it has some of them, and not all.
    """
    part, is_of_all_steps = cost.phase, "phase_ms" in cost.evidence  # not of every n-th step, or of new workers
    if not is_of_all_steps or part is None or not bins.parts_ns.get(part, np.zeros(1)).any():
        return cost

    # Waiting for an iterator is measured as `other`: what is in the phase that it is told of is a small loader's.
    if work.parts[part].max(axis=0).mean() < WARNING_SHARE * work.step_ns:
        return cost

    alone = bins.of_part(part, work)
    change = level_change(alone.step_ns)
    if change is None or change.shape == "growth":
        return cost

    slow = SlowSteps(alone, change)
    of_all = alone.single_ns[slow.contains(alone.single_steps)].sum() / alone.single_ns.sum()
    # Rare long steps, as of every tenth batch, are not in the medians of bins.
    held = min(slow.phase_ns(part, slow.slow) / slow.phase_ns(part), float(of_all))
    if held < HELD_SHARE or int(bins.steps[slow.slow].sum()) > MAX_PART * bins.steps.sum():
        return cost

    inside = slow.contains(judged)
    if not inside.any() or inside.all():
        return cost

    evidence = slow.evidence()
    since, until = (count_text(evidence.get(name)) for name in ("since_step", "until_step"))
    when = {
        "stays": f"from step {since} on",
        "first": f"before step {until}",
        "recovers": f"from step {since} to step {until}",
    }
    is_first = change.shape == "first" and part == "input_wait"
    if is_first:  # the number of workers, and their gain, are those of the advice that is replaced
        known = {name: value for name, value in cost.evidence.items() if name != "workers_advised"}
        cost = replace(cost, evidence=known, speedup_if_fixed=speedup_of_share(held * cost.cost_share))

    return replace(
        cost,
        summary=f"{cost.summary} {percent_text(held)} of it is {when[change.shape]}.",
        next=for_first_batches(cost.evidence.get("dataset", "the data set"), facts) if is_first else cost.next,
        evidence={**cost.evidence, **evidence},
    )


def _timed(late: Finding, evidence: Mapping[str, Any], first_step: int) -> Finding:
    per_step = ns_text(1e6 * evidence.get("growth_ms_per_step", 0.0))
    since, until = (count_text(evidence.get(name)) for name in ("since_step", "until_step"))
    has, was = ("It has", "It was") if len(late.ranks) == 1 else ("They have", "They were")
    when = {
        "stays": f"{has} been slow since step {since}.",
        "first": f"{was} slow until step {until}.",
        "recovers": f"{was} slow from step {since} to step {until}.",
        "growth": f"The difference grows by {per_step} with each step.",
    }
    if evidence["shape"] == "growth" and evidence["since_step"] > first_step:
        when["growth"] = f"Since step {since} the difference grows by {per_step} with each step."

    return late.with_part(Explanation(f" {when[evidence['shape']]}", evidence=evidence))


def _is_same_cause(late: Finding, slower: Finding) -> bool:
    """Return whether steps became slower because of ranks that are late, and were not late before."""
    same = slower.phase in (None, late.phase)
    # Steps lose less than late ranks exceed the others by, where these are late at times, too.
    lost = min(late.cost_share, 1 - 1 / late.speedup_if_fixed) if late.speedup_if_fixed > 1 else late.cost_share
    same = same and (slower.evidence["shape"] == "growth" or slower.cost_share >= MIN_COST_RATIO * lost)
    return late.blames_ranks and bool(slower.ranks) and slower.ranks == late.ranks and same


def depends_on_model(phase: str | None) -> bool:
    """Return whether the time of a phase, or of all, may differ between trainings because of their models."""
    return phase in (None, COMM, *COMPUTE)


def is_continued(of_training: Finding, of_run: Finding) -> bool:
    """Return whether the slowdown in one of several trainings is that of the whole run, not caused by another model."""
    if depends_on_model(of_run.phase) or of_run.phase != of_training.phase:
        return False

    since, same = (each.evidence["since_step"] for each in (of_run, of_training))
    return of_run.evidence["shape"] == "growth" or bool(abs(since - same) <= SAME_CHANGE * max(since, same))


def is_of_the_host(slower: Finding, contention_share: float = 0.0) -> bool:
    """Return whether nothing but the cores changed when steps became slower, in all phases.

    Some ranks alone became slower because of the cores only if they waited for these. It is also so in forward and
    backward only, in no line, if waiting for cores costs much of it: torch's threads wait for each other there, so
    that one core less costs a step several times its length.
    """
    changed = slower.evidence.get("changed", ())
    alike = slower.phase is None or (
        PASSES.issubset(slower.evidence.get("phases", ()))
        and "function" not in slower.evidence
        and contention_share >= CORES_SHARE * slower.cost_share
    )
    waited = not slower.ranks or "cpu_wait_share" in changed
    return slower.kind is Kind.SLOWDOWN and alike and waited and _OF_CORES.issuperset(changed)
