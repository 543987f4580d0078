"""Finding about steps that grow, jump and stay, jump and recover, or are slow at first.

The rule looks at the usual step in equal bins of the whole run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from traceml.diagnosis.advice import WAITED_FOR, flush_denormals, for_first_batches, reading_ahead
from traceml.diagnosis.facts.blamed_lines import COLLECTIVES, calls_code, outside_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity, least_cost_ns
from traceml.diagnosis.rules.slowdowns.coinciding_changes import (
    CORE_WAITS,
    SideChange,
    changes,
    core_wait,
    larger_batches,
)
from traceml.diagnosis.rules.slowdowns.slow_parts import (
    COMM,
    NOT_OF_CORES,
    PASSES,
    SlowParts,
    computes_longer,
    find_parts,
    have_cores,
    most_grown,
    part_of_ranks,
    slow_phases,
)
from traceml.diagnosis.rules.slowdowns.slow_steps import SlowSteps
from traceml.diagnosis.steps.change_points import MIN_FACTOR, LevelChange, growth, level_change
from traceml.diagnosis.steps.own_work import COMPUTE
from traceml.diagnosis.steps.speedup import speedup_of_share
from traceml.diagnosis.steps.step_history import StepHistory
from traceml.formatting import count_text, factor_text, ns_text, percent_text, phases_text, ranks_text

__all__ = ["slowdown"]

MIN_FACTOR_ALIKE = 1.25
"""A slow part is slower by this factor where all phases are: on shared hosts, speed varies."""
MIN_ALIKE_NS = 10e9
"""And the slow part lasts so long: programs that come and go take cores for seconds."""
MIN_COMPUTE_NS = 3e9
"""A slow part of one computing phase lasts so long where the ranks had their cores, as counted by the kernel."""
FAR_SLOWER = 4.0
"""Phases that become slower by this factor more than the rest, which is as long, do so on any host."""
EXPLAINED_LOSS = 0.5
"""What explains this share of what the steps lost is a cause of it."""
STILL_SLOWER = 2.5
"""Steps that are this many times as long, also if they had not lost cores, have another cause."""
SAME_PACE = 1.15
"""Steps that are longer by no more than this factor of the growth of their batches have more work, and no fault."""


def slowdown(bins: StepHistory, facts: JobFacts, late: Collection[tuple[int, ...]] = ()) -> list[Finding]:
    """Return the finding about steps that became slower, or were slow at first.

    Args:
        late: groups of ranks that are known to be late.
    """
    steps = _slow_steps(bins, facts)
    if steps is None or not _is_clear(steps, facts, late) or not steps.is_of_mean():
        return []

    mean, lost = steps.mean_and_lost_ns()
    if lost < least_cost_ns(mean):
        return []

    return [_finding(steps, lost / mean * bins.of_run, facts)]


def _slow_steps(bins: StepHistory, facts: JobFacts) -> SlowSteps | None:
    """Return how the steps change; as steady growth where that of one phase looks like a jump on a busy host."""
    change = level_change(bins.step_ns)
    if change is None:
        return None

    steps = SlowSteps(bins, change)
    part = None if change.shape == "growth" else most_grown(steps, facts)
    if part in (None, *COMPUTE, COMM):
        return steps

    own = growth(bins.parts_ns[part])
    if own is None:
        return steps

    rest_ns = float(np.median(bins.step_ns - bins.parts_ns[part]))
    return SlowSteps(bins, replace(own, before_ns=rest_ns + own.before_ns, after_ns=rest_ns + own.after_ns))


def _is_clear(steps: SlowSteps, facts: JobFacts, late: Collection[tuple[int, ...]]) -> bool:
    """Return whether the slow part is slow enough; where a busy host makes the same picture, also long enough."""
    bins, change = steps
    parts = slow_phases(steps, facts)
    if (len(parts) == 1 and parts[0] not in (*COMPUTE, COMM)) or steps.ranks() in late:
        return change.factor >= MIN_FACTOR

    lasted_ns = float((bins.step_ns * bins.steps)[change.bins].sum())
    is_known = bool(parts) and (COMM not in parts or change.factor >= NOT_OF_CORES)
    is_sure = is_known and (have_cores(steps, parts, facts) or _are_far_slower(steps, parts))
    return change.factor >= MIN_FACTOR_ALIKE and lasted_ns >= (MIN_COMPUTE_NS if is_sure else MIN_ALIKE_NS)


def _are_far_slower(steps: SlowSteps, parts: Sequence[str]) -> bool:
    """Return whether some phases become slower by far more than the rest, which is as long: it is no lack of cores."""
    if steps.change.shape != "stays":  # another program that comes and goes may take the core in these phases
        return False

    usual, slow = steps.levels()
    rest = [name for name in usual if name not in (*parts, COMM)]
    own, own_then, others, others_then = (
        sum(each[name] for name in names) for names in (parts, rest) for each in (usual, slow)
    )
    return others >= own > 0 and own_then / own >= FAR_SLOWER * max(others_then / others, 1.0)


def _finding(steps: SlowSteps, share: float, facts: JobFacts) -> Finding:
    ranks = steps.ranks()
    beside = [*_batches(steps), *_use(steps, facts, ranks)]
    # Where cores were taken, whatever runs takes longer: no phase or line is the cause.
    is_of_cores = _is_loss_of_cores(steps.change, beside)
    where = SlowParts(is_loss_of_cores=True) if is_of_cores else find_parts(steps, facts, ranks)
    part = where.parts[0] if where.parts else None
    if part is not None and not ranks:
        late, late_part = steps.late_at_times()
        if late_part is not None and part in (late_part, COMM):  # the others wait for them in the next steps
            ranks, part, where = late, late_part, part_of_ranks(steps, facts, late, late_part)

    if ranks := steps.ranks_in(ranks, part):
        steps = steps.of_ranks(ranks, part)

    change = steps.change
    is_meant = not ranks and any(each.is_work for each in beside)
    evidence = {
        **steps.evidence(),
        "factor": change.factor,
        "before_ms": change.before_ns / 1e6,
        "after_ms": change.after_ns / 1e6,
        **({"changed": {each.name: [each.before, each.then] for each in beside}} if beside else {}),
        **where.evidence(),
    }
    whose = f", because of {ranks_text(ranks)}" if ranks else ""
    # A part that grew by more than the loss of cores explains has another cause, be its line known or not.
    is_other = where.line is not None or (bool(where.parts) and bool(beside) and beside[0].takes_cores)
    # From one step to the next, as longer episodes; what a script keeps makes one pass longer, or code outside of it.
    may_be_work = change.shape == "growth" and PASSES.issubset(where.parts)
    meanwhile = "".join(f" {'And' if at else 'Meanwhile'} {each.text}." for at, each in enumerate(beside[:2]))
    since = int(steps.bins.first_step[-1]) if change.shape == "growth" else evidence["since_step"]
    is_beside = bool(beside) and (is_meant or where.is_loss_of_cores or not is_other)
    return Finding.of(
        Kind.SLOWDOWN,
        severity=Severity.INFO if is_meant else None,
        ranks=ranks,
        phase=part,
        summary=_summary(steps, evidence, None if is_meant else share, whose + where.text) + meanwhile,
        next=beside[0].advice if is_beside else _advice(change.shape, since, where, ranks, facts),
        evidence=evidence,
        cost_share=share,
        speedup_if_fixed=1.0 if is_meant or may_be_work else speedup_of_share(share),
    )


def _batches(steps: SlowSteps) -> list[SideChange]:
    """Return that batches were larger, where that explains half of what the steps lost, or all of it."""
    bins, change = steps
    if not len(bins.elements):
        return []

    at_both = (steps.usual, steps.slow)
    usual, slow = (float(np.median(bins.elements[at])) for at in at_both)
    if usual <= 0 or 1 - usual / slow < EXPLAINED_LOSS * (1 - 1 / change.factor):
        return []

    usual_ns, slow_ns = (float(np.median(bins.step_ns[at])) for at in at_both)
    return [larger_batches(usual, slow, explains_all=slow_ns / usual_ns <= SAME_PACE * slow / usual)]


def _use(steps: SlowSteps, facts: JobFacts, ranks: tuple[int, ...]) -> list[SideChange]:
    """Return what else changed on the hosts in the slow steps."""
    hosts: set[str | None] = set(facts.hosts.values())
    is_limited = all(map(facts.has_memory_limit, hosts or {None}))
    usual, slow = steps.compared_steps
    found = changes(
        facts.samples.use(*usual, ranks=ranks),
        facts.samples.use(*slow, ranks=ranks),
        memory_of="container" if is_limited else "host",
        use_of=ranks_text(ranks) if ranks else "the training",
        may_read=not computes_longer(steps),
    )
    # Workers that have no core make batches late, while the training has its own.
    is_of_data = most_grown(steps, facts) == "input_wait"
    waits = (facts.workers_waited(*each) if is_of_data else None for each in (usual, slow))
    of_workers = core_wait("workers_wait_share", "the loader workers", *waits)
    return found if of_workers is None else [of_workers, *found]


def _is_loss_of_cores(change: LevelChange, beside: Sequence[SideChange]) -> bool:
    """Return whether the loss of cores explains half of what the steps lost, and they would not be far slower without.

    A list that grows takes a core more often, too: what uses more of them waits more for them.
    """
    # What a step would be shorter by if its thread had its core as often as in the others.
    waits = [(each.before, each.then) for each in beside if each.name in CORE_WAITS]
    waited = max((1 - (1 - then) / max(1 - before, 0.01) for before, then in waits), default=0.0)
    taken = any(each.takes_cores and each.name not in CORE_WAITS for each in beside)
    is_cause = waited >= (0.25 if taken else EXPLAINED_LOSS) * (1 - 1 / change.factor)
    return is_cause and change.factor * (1 - waited) < STILL_SLOWER


def _summary(steps: SlowSteps, evidence: Mapping[str, Any], share: float | None, where: str) -> str:
    change = steps.change
    usual, slow = ns_text(change.before_ns), ns_text(change.after_ns)
    cost = "." if share is None else f"; that costs {percent_text(share)} of step time."
    since, until = (count_text(evidence.get(name)) for name in ("since_step", "until_step"))
    if change.shape == "growth":
        begins = f"Since step {since} steps" if steps.begins_later else "Steps"
        each = f"{ns_text(1e6 * evidence['growth_ms_per_step'])} each"
        ends = f" until step {until}" if "until_step" in evidence else ""
        return f"{begins} grow by {each}{ends}, from {usual} to {slow}{where}{cost}"

    when = {
        "stays": f"Since step {since}",
        "first": f"Until step {until}",
        "recovers": f"From step {since} to step {until}",
    }[evidence["shape"]]
    return f"{when} a step takes {factor_text(change.factor)} as long ({slow} instead of {usual}){where}{cost}"


def _advice(shape: str, since: int, where: SlowParts, ranks: tuple[int, ...], facts: JobFacts) -> str:
    """Return what to do: by how steps changed, then by the line, then by the phase.

    Args:
        shape: of the change, as in `LevelChange`.
        since: step from which on they are slow, the last ones where they grow.
        where: what became slower.
        ranks: that alone became slower; empty for all.
    """
    part = where.parts[0] if len(where.parts) == 1 else None
    known = _for_shape(shape, since, part, where, facts)
    if known is not None:
        return known

    meanwhile = reading_ahead(facts) if part == "input_wait" else ""
    if where.line is not None:
        waits = part is not None and facts.waits_in(part, where.line)
        what = f"waits for then ({WAITED_FOR}): it does not compute" if waits else "does only then"
        return f"Look at what {where.line.place} {what}.{meanwhile}"

    if part == COMM:
        return _for_waiting(facts)

    return _for_part(part, where, f" of {ranks_text(ranks)}" if ranks else "", meanwhile)


_DENORMAL_STEPS = 300
"""In fewer steps without gradients, averages that lose a tenth in each do not shrink to denormal numbers."""


def _for_shape(shape: str, since: int, part: str | None, where: SlowParts, facts: JobFacts) -> str | None:
    """Return the advice on what makes a part slower in this way; None if nothing is known of it."""
    denormals = flush_denormals(facts)
    if part == "optimizer" and shape in ("growth", "stays") and since >= _DENORMAL_STEPS and denormals:
        place = where.line.place if where.line else None
        return f"{denormals} If that changes nothing, look at what else changes in {phases_text([part], place)} then."

    if part == "input_wait" and shape == "first":
        return for_first_batches("the data set" if where.line is None else where.line.place, facts)

    if shape != "growth":
        return None

    if PASSES.issubset(where.parts):
        keeps = "the script" if where.line is None else where.line.place
        return (
            "Forward and backward grow, too: the model is called more often in a step, or with more at once. If that "
            "is meant (longer episodes or sequences), nothing needs fixing. Otherwise look for a list or history that "
            f"{keeps} adds to and passes to the model."
        )

    if part == "backward":
        return (
            "Look for what links the graph to that of the steps before: a state that is not detached "
            "(detach_()), a loss that is added up with its graph, retain_graph=True. Otherwise at growing batches."
        )

    if where.line is not None:
        may_be_hook = part == "forward" and not where.line.is_module
        hooks = ", or hooks that are registered in each step and not removed" * may_be_hook
        return (
            f"Look at {where.line.place} for what it keeps, repeats or sends: a list, a history or a graph that "
            f"grows{hooks}."
        )

    return _for_growing_messages(facts) if COMM in where.parts else None


def _for_growing_messages(facts: JobFacts) -> str:
    """Return the advice about communication that takes longer from step to step."""
    caller = outside_line(facts.lines, COMM)
    is_known = caller is not None and calls_code(facts.lines, COMM, caller, COLLECTIVES)
    return (
        f"Look at how much {caller.place if caller and is_known else 'the script'} sends: an object that grows "
        "(all_gather_object of a list), or larger tensors. Otherwise at the links between the ranks, and at what "
        "else uses them."
    )


def _for_waiting(facts: JobFacts) -> str:
    """Return the advice about communication that takes longer for a time, with the ranks' own work as before."""
    look = "look at the links between the ranks at that time, at what else uses them"
    if facts.backend == "gloo" and facts.world_size <= facts.ranks_beside_first:
        look = "look at what takes the host's cores at that time, as gloo's threads need them (`top` names it)"

    return f"No rank's own work is longer: {look}, and at how much data is reduced."


def _for_part(part: str | None, where: SlowParts, of_ranks: str, meanwhile: str) -> str:
    """Return the advice where no line is known.

    Args:
        of_ranks: ` of ranks 1 and 2`, if only some became slower.
        meanwhile: a sentence about reading ahead, or nothing.
    """
    of_host = f"other programs on the host{of_ranks}, clocks lowered by heat or power, and swapping at that time."
    if not where.parts and not where.leading:  # also where cores were taken
        return (
            "All phases are slower, so no single piece of code is the cause. If steps have no more work then "
            f"(longer episodes or sequences), look for {of_host}"
        )

    if part == "input_wait":
        return (
            f"Look at the data{of_ranks} from that step on: larger files, another shard, a page cache that no longer "
            f"holds it.{meanwhile}"
        )

    places = " and ".join(each.place for each in where.two)
    phases = places or phases_text(where.parts or where.leading, None)
    what = "batch size, sequence length, recompilation, a growing list"
    if where.parts:
        return f"Look at what changes in {phases}{of_ranks} then: {what}."

    return f"If {phases} have more work then ({what}), look at that. Otherwise for {of_host}"
