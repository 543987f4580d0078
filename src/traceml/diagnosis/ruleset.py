"""Diagnosis of a window: all rules, in order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.states import RunStatus
from traceml.diagnosis.advice import for_debugging
from traceml.diagnosis.deaths.lost_loader_workers import worker_lost
from traceml.diagnosis.deaths.lost_ranks import rank_lost
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Explanation, Finding, in_order, with_global_step_numbers
from traceml.diagnosis.hangs.hang import hang
from traceml.diagnosis.insufficient_data import MIN_STEPS, too_few_ranks, too_few_steps, unknown_backward
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, Severity
from traceml.diagnosis.memory.leaks import memory_leaks
from traceml.diagnosis.memory.pressure import allocator_churn, full_devices, full_hosts, memory_imbalance
from traceml.diagnosis.rules.between_trainings import set_up_between
from traceml.diagnosis.rules.bottlenecks.data_bound import input_bound, transfers
from traceml.diagnosis.rules.bottlenecks.own_code import residual
from traceml.diagnosis.rules.bottlenecks.saving import checkpoints
from traceml.diagnosis.rules.comm import comm_bound
from traceml.diagnosis.rules.correctness import (
    duplicate_data,
    loss_not_finite,
    never_cleared,
    never_synchronized,
    repeated_by_workers,
    same_order,
    steps_skipped,
    trained_in_evaluation_mode,
    trainings_not_finite,
    weights_unchanged,
)
from traceml.diagnosis.rules.cpu_contention import cpu_contention, is_oversubscribed_by_others
from traceml.diagnosis.rules.data_imbalance import data_imbalance, with_batch_sizes, without_largest_batches
from traceml.diagnosis.rules.devices import device_contention, device_faults, throttled, without_changes_by_others
from traceml.diagnosis.rules.gil_contention import gil_contention
from traceml.diagnosis.rules.jitter import jitter, late_in_turns
from traceml.diagnosis.rules.near_limits import limits_near
from traceml.diagnosis.rules.no_bottleneck import (
    nothing_found,
    with_costlier_code,
    with_optimizer,
    with_own_code,
)
from traceml.diagnosis.rules.outside_steps import outside_steps
from traceml.diagnosis.rules.periodic_collectives import periodic_collectives
from traceml.diagnosis.rules.periodic_steps import periodic_steps
from traceml.diagnosis.rules.restarted_workers import workers_restarted
from traceml.diagnosis.rules.slowdowns.related_findings import (
    depends_on_model,
    is_continued,
    is_of_the_host,
    with_part_of_run,
    with_steps_from_history,
    with_steps_from_slowdown,
)
from traceml.diagnosis.rules.slowdowns.slowdown import slowdown
from traceml.diagnosis.rules.stragglers.stragglers import stragglers
from traceml.diagnosis.stalls.gc_pauses import gc_pauses
from traceml.diagnosis.stalls.recompiles import recompiles
from traceml.diagnosis.stalls.single_pauses import SinglePauses, single_pauses
from traceml.diagnosis.stalls.stopped_ranks import stopped_ranks, without_stopped_steps
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork, by_pace, own_work_of
from traceml.diagnosis.steps.several_trainings import as_one_training, trainings_of
from traceml.diagnosis.steps.speedup import replayed, without_more_passes
from traceml.diagnosis.steps.step_history import NO_END, StepHistory
from traceml.formatting import count_text, ns_text, ranks_text

__all__ = ["diagnose", "is_newest_part"]

_OF_LONG_STEPS = (Kind.CHECKPOINT_STALLS, Kind.GC_PAUSES, Kind.RECOMPILES, Kind.JITTER)
"""Kinds that explain single long steps."""
_OF_ALL_STEPS = (Kind.RESIDUAL_HEAVY, Kind.H2D_BOUND, Kind.JITTER)
"""Kinds that say less than the step from which on steps are slower in the same part."""
_FIRST_STEPS = 64
_MAX_PERIODS = 3
_READ_SHARE = 0.5
"""Share of the time of the window's steps that a wall time must have in steps: else it is older than they are."""
_EXPLAINED_SHARE = 0.6
_LONGER, _FAR_LONGER = 1.5, 5.0
_MAX_LATER_SHARE = 0.5
_MAX_LISTED = 64


def diagnose(window: AlignedSteps, facts: JobFacts, history: AlignedSteps | None = None) -> list[Finding]:
    """Return the findings, the verdict first; never empty.

    Args:
        window: aligned steps: live the newest, at the end of a run all of them, or of a long run some.
        history: of a run that is not over, steps that are spread over it, or the window: whether they are slower now.
    """
    facts = _without_old_time(window, facts)
    return [with_global_step_numbers(each, facts.resumes_at) for each in _found(window, facts, history)]


def is_newest_part(window: AlignedSteps, facts: JobFacts) -> bool:
    """Return whether a window lacks the beginning of the run, as a live one may."""
    return len(window) > 0 and bool(window.steps[0] - facts.first_step > _FIRST_STEPS)


def _without_old_time(window: AlignedSteps, facts: JobFacts) -> JobFacts:
    """Return the facts of a running run without its wall time, if that was read before many of its steps were made.

    It is read every few seconds: soon after the start-up it would say that steps take hardly any of the run's time.
    """
    if facts.time is None or facts.state != RunStatus.RUNNING or not len(window):
        return facts

    # The wall time may be that of ranks that evaluate alone, for which the others wait in their steps.
    read_s, judged_s = facts.time.in_steps * facts.time.wall_s, float(window.total.sum(axis=1).min()) / 1e9
    return replace(facts, time=None) if read_s < _READ_SHARE * judged_s else facts


def _found(window: AlignedSteps, facts: JobFacts, history: AlignedSteps | None) -> list[Finding]:
    main, remarks = _split_remarks(_non_timing(window, facts))
    in_steps = 1.0 if facts.time is None else facts.time.in_steps
    judged = _usual_steps(window, facts)
    if len(judged) < MIN_STEPS:
        return [*(in_order(main, in_steps) or [too_few_steps(judged, facts)]), *remarks]

    awaits_ranks = None if is_newest_part(judged, facts) else too_few_ranks(judged, facts)
    if awaits_ranks is not None:
        return [*(in_order(main, in_steps) or [awaits_ranks]), *remarks]

    judged, faster = by_pace(judged, facts)
    work = own_work_of(judged, facts)
    shared = [each for each in main if each.kind is Kind.DEVICE_CONTENTION]
    past = judged if history is window else None if history is None else _usual_steps(history, facts)
    found, slow_until = _timing_without_pauses(judged, work, facts, past)
    later = judged.select(judged.steps >= slow_until)
    if MIN_STEPS <= len(later) < len(judged):
        judged, work = later, own_work_of(later, facts)
        found, _ = _timing_without_pauses(judged, work, facts, past)

    found = without_changes_by_others(found, shared)
    timing, of_timing = _split_remarks(_with_lock(found, work, facts))
    lead = max(timing, key=lambda each: each.cost_share, default=None)
    timing = [_with_other_costs(each, work, facts) if each is lead else each for each in timing]
    timing = _of_seen_ranks(_of_slowest_ranks(timing, judged, faster), judged, facts)
    main, remarks = [*main, *timing], [*remarks, *of_timing]
    nothing = [] if main else [unknown_backward(judged, work) or nothing_found(judged, work, facts)]
    nothing = _of_seen_ranks(_of_slowest_ranks(nothing, judged, faster), judged, facts)
    contention = cpu_contention(facts)
    if contention is None:
        return [*in_order(main, in_steps), *nothing, *remarks]

    code = [each for each in nothing if _is_code_that_costs_more(each, contention)]
    told = contention
    if not (main or code):
        told = _with_pauses(with_own_code(contention, work, facts), single_pauses(judged, work, facts))

    told, several = _with_other_advice(told, facts), _has_several(judged, facts)
    return [*code, *_with_contention(told, main, timing, remarks, facts, several=several)]


def _with_pauses(contention: Finding, pauses: SinglePauses | None) -> Finding:
    """Return the finding about too few cores with pauses that no finding about steps can tell, as there is none."""
    return contention if pauses is None else contention.with_part(pauses.explanation._replace(evidence={}))


def _is_code_that_costs_more(nothing: Finding, contention: Finding) -> bool:
    """Return whether the script's own code in forward or backward costs more than waiting for cores."""
    is_code = nothing.kind is Kind.COMPUTE_BOUND and "own_code" in nothing.evidence  # a waiting host is not healthy
    return is_code and nothing.evidence.get("line_share", 0.0) > contention.cost_share


def _with_other_costs(finding: Finding, work: OwnWork, facts: JobFacts) -> Finding:
    """Return the costliest finding about the time of steps with what costs more, and no rule judges beside another."""
    return _with_other_advice(with_optimizer(with_costlier_code(finding, work, facts), work, facts), facts)


def _with_other_advice(finding: Finding, facts: JobFacts) -> Finding:
    """Return a finding about the time of steps with advice on what makes each of them slower, beside its cause."""
    return finding.with_part(Explanation(action=for_debugging(facts)))


def _usual_steps(window: AlignedSteps, facts: JobFacts) -> AlignedSteps:
    """Return the steps that show how long a step takes as a rule; all of them if there are too few to judge."""
    return window if len(window) < MIN_STEPS else _without_joined_steps(without_stopped_steps(window, facts), facts)


def _without_joined_steps(window: AlignedSteps, facts: JobFacts) -> AlignedSteps:
    """Return the window without the steps at which a rank has left `with Join(...)`: they show no usual step.

    The wait is in the step that was open, or in the next one where the script begins that with its next batch.
    """
    left = [step + after for steps in facts.joined.values() for step in steps for after in (0, 1)]
    kept = ~np.isin(window.steps, left)
    return window if kept.all() else window.select(kept)


def _non_timing(window: AlignedSteps, facts: JobFacts) -> list[Finding]:
    """Return what is found without comparing the times of steps: ends and errors first."""
    ended = hang(window, facts) or rank_lost(facts)
    explained = ended.ranks if ended is not None and "worker_pid" in ended.evidence else ()
    found = (
        ended,
        worker_lost(facts, explained),
        steps_skipped(facts),
        *limits_near(facts),
        throttled(facts),
        device_contention(facts),
        device_faults(facts),
        loss_not_finite(facts) or trainings_not_finite(facts),
        duplicate_data(facts),
        repeated_by_workers(facts),
        never_synchronized(facts),
        trained_in_evaluation_mode(facts),
        never_cleared(facts),
        weights_unchanged(facts),
        *outside_steps(window, facts, hung=ended is not None and ended.kind is Kind.HANG),
        stopped_ranks(window, facts),
        same_order(facts),
        *memory_leaks(facts, window),
        full_hosts(facts),
        full_devices(facts),
        memory_imbalance(facts),
        allocator_churn(facts),
    )
    return [each for each in found if each is not None]


def _split_remarks(found: list[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Return the findings that may be the verdict, and the remarks."""
    main = [each for each in found if each.severity is not Severity.INFO]
    return main, [each for each in found if each.severity is Severity.INFO]


def _with_contention(
    contention: Finding,
    main: list[Finding],
    timing: list[Finding],
    remarks: list[Finding],
    facts: JobFacts,
    *,
    several: bool,
) -> list[Finding]:
    """Return all findings of a run that waited for cores: one about a host that became busier is the same cause.

    Args:
        several: whether the run has several trainings.
    """
    waited = contention.cost_share
    of_host = [each for each in main if is_of_the_host(each, waited)]
    main = [each for each in main if each not in of_host]
    of_host = [] if several else [replace(each, severity=Severity.INFO) for each in of_host]
    remarks = [*of_host, *remarks]
    in_steps = 1.0 if facts.time is None else facts.time.in_steps
    ordered = in_order(main, in_steps)
    timing = [each for each in timing if not is_of_the_host(each, waited)]
    if is_oversubscribed_by_others(facts) and not any(each.blames_ranks for each in timing):
        place = in_order([*main, contention], in_steps).index(contention)
        place = min([place, *map(ordered.index, timing)])
        return [*ordered[:place], contention, *ordered[place:], *remarks]

    # Waiting for cores makes all phases longer: next to another cause it is a remark.
    return [*ordered, replace(contention, severity=Severity.INFO) if ordered else contention, *remarks]


def _of_slowest_ranks(found: list[Finding], window: AlignedSteps, faster: AlignedSteps | None) -> list[Finding]:
    """Add to the findings about steps whose steps these are, where other ranks do not wait for them.

    Args:
        faster: the ranks that do not wait for them, if any; see `by_pace`.
    """
    if not found or faster is None:
        return found

    ranks, others = (sorted(each.ranks.tolist()) for each in (window, faster))
    text = (
        f" This is about {ranks_text(ranks)}: the steps of {ranks_text(others)} take "
        f"{ns_text(float(np.median(faster.total)))}, so {'it does' if len(others) == 1 else 'they do'} not wait for "
        f"{'it' if len(ranks) == 1 else 'them'} in these steps."
    )
    beside = Explanation(evidence={"faster_ranks": others[:_MAX_LISTED]})
    return [each.with_part(beside if at else beside._replace(text=text)) for at, each in enumerate(found)]


def _of_seen_ranks(found: list[Finding], window: AlignedSteps, facts: JobFacts) -> list[Finding]:
    """Add to the first finding about steps how many ranks it rests on, where some are missing."""
    if not found or not facts.latest:
        return found

    started = sum(step >= 0 for step in facts.latest[: facts.world_size])
    seen = started - len(window.missing_ranks)
    if seen >= facts.world_size:
        return found

    text = f" {count_text(seen)} of {count_text(facts.world_size)} ranks were seen in these steps."
    evidence = {"ranks_seen": seen, "world_size": facts.world_size}
    return [found[0].with_part(Explanation(text, evidence=evidence)), *found[1:]]


class _Timing(NamedTuple):
    """Findings about the time of steps."""

    found: list[Finding]
    slow_until: int = 0
    """First step after slow ones that are over, where the newest steps are judged: they say nothing of now."""


def _timing_without_pauses(
    window: AlignedSteps, work: OwnWork, facts: JobFacts, history: AlignedSteps | None
) -> _Timing:
    """Find what steps cost; single pauses that nothing explains are left out of it, and told beside it."""
    timing, pauses = _timing(window, work, facts, history), single_pauses(window, work, facts)
    explaining = [] if pauses is None else [each.kind for each in timing.found if _explains_pauses(each, pauses)]
    if pauses is None or {*explaining} - {Kind.JITTER}:
        return timing

    others = pauses.left_out_of(window, work)
    facts = pauses.left_out_of_lines(facts)
    found, slow_until = _timing(others, own_work_of(others, facts), facts, others if history is window else history)
    if explaining and not any(_are_far_shorter(each, pauses) for each in found):
        return timing

    more = pauses.explanation
    not_counted = f" {'It is' if len(pauses.columns) == 1 else 'They are'} not counted here."
    lead = max(found, key=lambda each: each.cost_share, default=None)
    told, beside = more._replace(text=more.text + not_counted), Explanation(evidence=more.evidence)
    return _Timing([each.with_part(told if each is lead else beside) for each in found], slow_until)


def _are_far_shorter(found: Finding, pauses: SinglePauses) -> bool:
    """Whether a finding is about long steps that are far shorter than the pauses, which are none of them."""
    mean_ns = 1e6 * float(found.evidence.get("mean_long_ms", 0.0))
    return 0 < _FAR_LONGER * mean_ns <= pauses.mean_ns


def _explains_pauses(found: Finding, pauses: SinglePauses) -> bool:
    """Whether a finding explains the pauses: also the first batches of epochs, which a short run has two of."""
    are_between = "between_trainings" in pauses.explanation.evidence
    is_of_series = are_between and "trainings" in found.evidence and len(pauses.columns) > 1
    is_of_epochs = "epochs" in found.evidence and found.cost_share >= _EXPLAINED_SHARE * pauses.share
    is_kind = found.kind in _OF_LONG_STEPS and not (are_between and found.kind is Kind.JITTER)
    return is_kind or is_of_epochs or is_of_series


def _timing(window: AlignedSteps, work: OwnWork, facts: JobFacts, history: AlignedSteps | None) -> _Timing:
    """Find what steps cost, and when they became slower."""
    whole = as_one_training(window, work, facts.other_models)
    without_explained, explained = _without_explained(window, whole, facts)
    uneven = any(each.kind is Kind.DATA_IMBALANCE for each in explained)
    costs = _costs(window, without_explained, whole, facts, work.step_ns, uneven=uneven)
    found = [*without_largest_batches(costs, explained), *explained]
    if history is None or history is window or len(history) < MIN_STEPS:
        return _with_slowdown(found, window.steps, window, without_explained, facts, only_now=history is not None)

    past = as_one_training(history, own_work_of(history, facts), facts.other_models)
    past, _ = _without_explained(history, past, facts)
    timing = _with_slowdown(found, window.steps, history, past, facts, only_now=True)
    # Slow steps that are over may be too few of a long run, and many of the window.
    in_window = _slow_until(_slower(window, without_explained, facts, _late_ranks(found)))
    return timing._replace(slow_until=max(timing.slow_until, in_window))


def _costs(
    window: AlignedSteps, work: OwnWork, with_explained: OwnWork, facts: JobFacts, step_ns: float, *, uneven: bool
) -> list[Finding]:
    """Find what steps cost, each rule beside what the rules before it have found.

    Args:
        with_explained: the same own work with what other findings explain.
        step_ns: of the whole window, which costs are shares of.
        uneven: whether ranks wait for the largest batch.
    """
    hidden_ns = {
        part: float((values - work.parts[part]).mean())
        for part, values in with_explained.parts.items()
        if values is not work.parts[part]  # most have nothing that is explained
    }
    late_ranks, without_stragglers = stragglers(work, facts)
    # Stages of a pipeline have inputs of their own kind: tokens, and what the stage before computed of them.
    found = late_ranks if facts.batches.messages else [with_batch_sizes(each, window) for each in late_ranks]
    # The cost of late ranks is reported; the other rules judge the run as it would be without them.
    remaining = replayed(work, without_stragglers)
    alternating = [] if found else late_in_turns(remaining, facts, step_ns)
    found += alternating
    # What is left of the waiting for data is that of the others.
    of_others = facts.with_loader_beside({rank for each in found if each.phase == "input_wait" for rank in each.ranks})
    restarted, without_restarts = workers_restarted(window, remaining, of_others, step_ns)
    before_ns = _waiting_ns(remaining)
    excluded = None
    if restarted:
        found += restarted
        remaining = replayed(remaining, without_restarts)
        excluded = "restarts of workers" if "restart_ms" in restarted[0].evidence else "first batches of epochs"

    restarts_ns = before_ns - _waiting_ns(remaining)

    whole = remaining
    between, without_set_up = set_up_between(window, remaining, facts, step_ns)
    found += between
    remaining = replayed(remaining, without_set_up)
    periodic, remaining = _periodic(window, remaining, facts, step_ns, hidden_ns)
    found += periodic
    gathered, remaining = periodic_collectives(window, remaining, facts, step_ns)
    found += gathered

    found += input_bound(remaining, of_others, step_ns, excluded, restarts_ns)
    # What rare long steps do is no steady cost of copies, or of code outside the phases.
    long, without_rare_ones = ([], {}) if alternating else jitter(window.steps, remaining, facts, step_ns)
    without_long_steps = replayed(remaining, without_rare_ones)
    found += transfers(without_long_steps, facts, step_ns)
    whole_steps = whole if long or periodic or between else None
    found += residual(without_long_steps, facts, step_ns, whole_steps, hidden_ns)
    found += checkpoints(remaining, facts, step_ns)
    # Ranks that meet every n-th step only, as in local SGD, wait there for all that a late rank has gathered.
    gathers = bool(late_ranks) and len(work.sync_intervals) < len(work.step)
    found += [each for each in long if not (gathers and each.phase == "comm")]

    if not any(finding.blames_ranks for finding in found):
        found += comm_bound(window, with_explained, facts, uneven=uneven)

    return found


def _periodic(
    window: AlignedSteps, work: OwnWork, facts: JobFacts, step_ns: float, hidden_ns: Mapping[str, float]
) -> tuple[list[Finding], OwnWork]:
    """Find long steps at fixed distances, as of a loop that logs in each 10th step and evaluates in each 50th."""
    found: list[Finding] = []
    for _ in range(_MAX_PERIODS):
        more, without_long = periodic_steps(window, work, facts, step_ns, hidden_ns)
        found, work = [*found, *more], replayed(work, without_long)
        if not more:
            break

        # Samples of a part are of the steps that are told already, too.
        told = {each.phase for each in more}
        facts = replace(facts, lines=[each for each in facts.lines if each.part not in told])

    return found, work


def _waiting_ns(work: OwnWork) -> float:
    return float(work.parts["input_wait"].mean()) if "input_wait" in work.parts else 0.0


def _with_slowdown(
    found: list[Finding],
    judged: NDArray[np.int64],
    window: AlignedSteps,
    work: OwnWork,
    facts: JobFacts,
    *,
    only_now: bool,
) -> _Timing:
    """Return the findings about steps with that about steps that became slower, where it is no part of another.

    Args:
        judged: the steps that the findings are about; the others of the window tell only when they became slower.
        only_now: whether the findings are about the newest steps: slow ones that have ended are none of them.
    """
    if is_newest_part(window, facts):
        return _Timing(found)

    late = _late_ranks(found)
    slower, slow_until = _slower(window, work, facts, late), 0
    if only_now:
        slow_until = _slow_until(slower)
        slower = [each for each in slower if "until_step" not in each.evidence]

    for each in slower:
        timed = [with_steps_from_slowdown(one, each, int(window.steps[0])) for one in found]
        if timed != found:  # those ranks are the cause: one finding
            return _Timing(timed, slow_until)

    if _has_several(window, facts):  # its cost there is a part of what they cost in all trainings
        told = {(one.ranks, one.phase) for one in found if one.blames_ranks and one.ranks}
        slower = [each for each in slower if (each.ranks, each.phase) not in told]

    if not slower:
        found = _with_own_steps(found, judged, window, work, facts)
        slow_until = max(slow_until, _slow_until(found) if only_now else 0)

    if any(each.ranks in late for each in slower):  # late all along: as clear as any other change
        slower = _slower(window, work, facts, ())

    slower = [each for each in slower if not any(_is_used_up(each, one, window, facts) for one in found)]
    explained = [each for each in found if any(_explains(one, each, window, work) for one in slower)]
    return _Timing([*slower, *(each for each in found if each not in explained)], slow_until)


def _late_ranks(found: Iterable[Finding]) -> list[tuple[int, ...]]:
    return [one.ranks for one in found if one.blames_ranks and one.ranks]


def _slow_until(findings: Iterable[Finding]) -> int:
    """Return the first step after the slow ones of findings; 0 if they last."""
    return max((int(each.evidence.get("until_step", 0)) for each in findings), default=0)


def _with_lock(timing: list[Finding], work: OwnWork, facts: JobFacts) -> list[Finding]:
    """Return the findings about steps with that about the GIL, which makes steps uneven, too."""
    if any(each.blames_ranks for each in timing):
        return timing

    locked = gil_contention(work, facts, work.step_ns)
    return timing if locked is None else [locked, *(each for each in timing if not _is_by_chance(each))]


def _is_by_chance(finding: Finding) -> bool:
    """Return whether steps may only vary because another thread has the lock in some: no line, or computation."""
    is_known = "function" in finding.evidence and finding.phase not in COMPUTE
    return finding.kind in (Kind.JITTER, Kind.SLOWDOWN) and not is_known


def _without_explained(window: AlignedSteps, work: OwnWork, facts: JobFacts) -> tuple[OwnWork, list[Finding]]:
    """Return own work without what is explained (closures, batch sizes, collections, compiling), and the findings."""
    work = replayed(work, without_more_passes(window, work))
    explained, even = ([], {}) if facts.batches.messages else data_imbalance(window, work)
    work = replayed(work, even)
    for rule in (gc_pauses, recompiles):
        found, without = rule(window, work, facts)
        work = replayed(work, without)
        explained = [*explained, *found]

    return work, explained


def _slower(window: AlignedSteps, work: OwnWork, facts: JobFacts, late: Collection[tuple[int, ...]]) -> list[Finding]:
    """Return the finding about steps that became slower.

    Of several trainings, each is compared with itself. A slowdown of code that does not depend on the model may
    continue in later trainings: then the finding is about the whole run.
    """
    of_run = slowdown(StepHistory.of(window, work), facts, late)
    trainings = trainings_of(window, facts.other_models, facts.same_models)
    if len(trainings) == 1:
        return of_run

    found: list[Finding] = []
    for columns in trainings:
        if columns.sum() >= MIN_STEPS:
            found += slowdown(_history_of(window, columns, facts), facts, late)

    same = [one for one in found if any(is_continued(one, each) for each in of_run)]
    # What began in the last training has its times; those of the whole run are as if of one model.
    in_last = [one for one in same if one.evidence["shape"] == "stays"]
    return in_last or (of_run if same else sorted(found, key=lambda each: each.cost_share)[-1:])


def _with_own_steps(
    found: list[Finding], judged: NDArray[np.int64], window: AlignedSteps, work: OwnWork, facts: JobFacts
) -> list[Finding]:
    """Return the findings, with the steps in which ranks are late, or which have most of a cost.

    In the times of whole steps other noise may hide these.
    """
    if not found:
        return found

    bins, several = StepHistory.of(window, work), _has_several(window, facts)
    found = [with_part_of_run(each, judged, bins, work, facts) for each in found]
    return [
        each if several and depends_on_model(each.phase) else with_steps_from_history(each, judged, bins)
        for each in found
    ]


def _has_several(window: AlignedSteps, facts: JobFacts) -> bool:
    return len(trainings_of(window, facts.other_models, facts.same_models)) > 1


def _history_of(window: AlignedSteps, columns: NDArray[np.bool_], facts: JobFacts) -> StepHistory:
    training = window.select(columns)
    work, _ = _without_explained(training, own_work_of(training, facts), facts)
    first, last = (int(training.steps[at]) for at in (0, -1))
    after = window.steps[window.steps > last]
    return replace(
        StepHistory.of(training, work),
        start=first if first > window.steps[0] else 1,
        end=int(after[0]) if len(after) else NO_END,
        of_run=float(training.total.sum() / window.total.sum()),
    )


def _is_used_up(slower: Finding, waiting: Finding, window: AlignedSteps, facts: JobFacts) -> bool:
    """Return whether steps became slower only because batches that had been made in advance were used up.

    The thread or process that fills a queue begins before the first step; what it cannot keep up with is reported.
    """
    is_queue = waiting.kind is Kind.INPUT_BOUND and waiting.phase == "input_wait" and slower.phase == "other"
    shape, until = (slower.evidence.get(name) for name in ("shape", "until_step"))
    lasts = shape == "stays" or (shape == "recovers" and until in facts.other_models)  # to the end of its training
    stays = lasts and "function" not in slower.evidence
    since, last = slower.evidence.get("since_step", 0), int(window.steps[-1])
    early = 2 * (since - facts.first_step) <= last - facts.first_step
    return is_queue and stays and early


def _has_ended(slower: Finding, window: AlignedSteps, work: OwnWork) -> bool:
    """Return whether slow steps that have ended have most of the waiting for data.

    It continues if it has a similar share of the later steps: all of the step took longer then, as on a busy host.
    """
    later = window.steps >= slower.evidence.get("until_step", np.inf)
    waits = work.parts["input_wait"].mean(axis=0)
    if not later.any():
        return "until_step" in slower.evidence

    usual, mean = (float(waits[columns].sum() / work.step[columns].sum()) for columns in (later, slice(None)))
    return usual < max(WARNING_SHARE, _MAX_LATER_SHARE * mean)


def _is_of_longer_steps(other: Finding, slower: Finding) -> bool:
    """Return whether a finding is about single steps that are longer than the slow ones, as each n-th or each epoch's.

    They are in no median of the steps, by which these became slower.
    """
    longer = other.evidence.get("mean_long_ms", 0.0) >= _LONGER * slower.evidence["after_ms"]
    return longer or any(name in other.evidence for name in ("epochs", "trainings"))


def _explains(slower: Finding, other: Finding, window: AlignedSteps, work: OwnWork) -> bool:
    """Return whether another finding is only about the steps that became slower, and says less."""
    if _is_of_longer_steps(other, slower):
        return False

    same = other.phase in (None, slower.phase)
    if slower.severity is Severity.INFO:  # larger batches: what takes a share of each step still does
        return other.kind is Kind.JITTER and same

    if other.kind is Kind.INPUT_BOUND:  # its gain by workers would be that of waits which have ended
        is_all = other.cost_share - slower.cost_share < WARNING_SHARE
        same = other.phase == slower.phase and (is_all or _has_ended(slower, window, work))
    else:
        is_of_all_saves = other.kind is Kind.CHECKPOINT_STALLS and not other.blames_ranks
        same = same and (other.kind in _OF_ALL_STEPS or is_of_all_saves)

    return same and slower.cost_share >= _EXPLAINED_SHARE * other.cost_share
