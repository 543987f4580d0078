"""Findings about stragglers: who is late, where, why, and what a step gains without."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from traceml.diagnosis import advice
from traceml.diagnosis.facts.blamed_lines import (
    BlamedLine,
    blamed_line,
    is_of_ranks_alone,
    line_of_ranks_alone,
    lines_of_ranks_alone,
    workers_line,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import workers_at_work
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.gil_contention import background_threads
from traceml.diagnosis.rules.stragglers.core_lack import FAR_MORE_WORK, due_to_code_ns, is_without_core, more_work_ns
from traceml.diagnosis.rules.stragglers.excess_tests import EVERYWHERE_SHARE
from traceml.diagnosis.rules.stragglers.late_ranks import find_late, late_in_one_part, without_late
from traceml.diagnosis.rules.stragglers.straggler_wording import (
    fewer_workers,
    is_hidden,
    late_evidence,
    late_summary,
    stage_summary,
    waited_for_core,
)
from traceml.diagnosis.steps.own_work import (
    COMPUTE,
    ITERATOR_SHARE,
    LINE_SHARE,
    UNNAMED_CODE,
    LateRanks,
    OwnWork,
    excess_over_others,
    iterator_wait,
)
from traceml.diagnosis.steps.speedup import saved_ns, speedup, with_typical_work
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import capitalized, factor_text, ranks_text

__all__ = ["straggler_kind", "stragglers"]

GAIN_SHARE = 0.05
"""Without the late ranks a step would be shorter by at least this share, unless they are very late."""
MAIN_SHARE = 0.9
"""A line with less of the excess of late ranks is told with a second one, and promises no more than its own gain."""
_KINDS = {
    "input_wait": Kind.INPUT_STRAGGLER,
    "h2d": Kind.H2D_STRAGGLER,
    "checkpoint": Kind.CHECKPOINT_STALLS,
    **dict.fromkeys(COMPUTE, Kind.COMPUTE_STRAGGLER),
}


def stragglers(work: OwnWork, facts: JobFacts) -> tuple[list[Finding], dict[str, Floats]]:
    """Return a finding per group of late ranks, and the parts with their work replaced by that of the others."""
    if not work.grouped or len(work.ranks) < 2:
        return [], {}

    late = find_late(work, facts)
    without_stragglers = without_late(work, late)
    if late and saved_ns(work, without_stragglers) < GAIN_SHARE * work.step_ns:
        # Other ranks are late as often; a small difference on average is not a fault.
        late = [one for one in late if one.excess_ns >= EVERYWHERE_SHARE * work.step_ns]
        without_stragglers = without_late(work, late)

    late += late_in_one_part(work, facts, late)
    told = (_as_loading(work, facts, one) for one in late)
    return [_finding(seen, facts, one) for seen, one in told], without_late(work, late)


def straggler_kind(part: str) -> Kind:
    """Return the kind of finding for ranks that are late in a part of the step."""
    return _KINDS.get(part, Kind.STRAGGLER)


def _as_loading(work: OwnWork, facts: JobFacts, late: LateRanks) -> tuple[OwnWork, LateRanks]:
    """Take code outside the phases as waiting for data where late ranks wait longer there for the script's iterator."""
    if late.everywhere or late.part != "other":
        return work, late

    mine, usual = (
        iterator_wait(work, [each for each in facts.lines if each.rank in some], work.step_ns)
        for some in (set(late.ranks), set(late.other_ranks))
    )
    values = work.parts["other"]
    longer_ns = mine * float(values[late.rows].mean()) - usual * float(values[late.others].mean())
    if mine < ITERATOR_SHARE or longer_ns < ITERATOR_SHARE * late.excess_ns:
        return work, late

    parts, by_part_ns = (
        {"input_wait" if name == "other" else name: each for name, each in some.items() if name != "input_wait"}
        for some in (work.parts, late.by_part_ns)
    )
    return replace(work, parts=parts), replace(late, part="input_wait", by_part_ns=by_part_ns)


def _read_for_others(work: OwnWork, facts: JobFacts, late: LateRanks) -> bool:
    """Return whether late ranks alone have loaders, and the others wait for no data of their own."""
    readers = {rank for rank, loaders in facts.loaders.items() if loaders}
    return readers == set(late.ranks) and not work.parts["input_wait"][late.others].any()


def _own_code(
    work: OwnWork, facts: JobFacts, late: LateRanks, line: BlamedLine | None
) -> tuple[Sequence[BlamedLine], float]:
    """Return the lines that late ranks are in, and which part of their excess these are: all of it where unknown.

    The main line, or two that only these ranks run, if one has little more than half.
    """
    own_ns = _share_of_part(work, late) * work.step_ns
    found: tuple[BlamedLine, ...] = (line,) if line is not None else ()
    if late.everywhere or late.part not in UNNAMED_CODE:
        return found, 1.0

    if line is None or line.share < MAIN_SHARE:
        found = lines_of_ranks_alone(facts.lines, late.part, own_ns / work.step_ns, late.ranks) or found

    is_known = all(
        not each.is_rough and not each.is_least and is_of_ranks_alone(facts.lines, late.part, each, late.ranks)
        for each in found
    )
    explained = sum(each.share for each in found) * own_ns / late.excess_ns
    return found, explained if found and is_known and explained < MAIN_SHARE else 1.0


def _finding(work: OwnWork, facts: JobFacts, late: LateRanks) -> Finding:
    line = _line(work, facts, late)
    is_stage = late.part in COMPUTE and facts.batches.has_own_stages(late.ranks, late.other_ranks)
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
    hidden = {"is_hidden": True} if is_hidden(late, share, gain) else {}
    untimed = "" if late.part == "input_wait" else advice.waiting_for_device(facts, is_timed=work.device)
    return Finding.of(
        straggler_kind(late.part),
        ranks=late.ranks,
        phase=late.part,
        summary=late_summary(
            work, late, share, gain, lines, facts.loader_workers, of_lines, untimed, is_bounded_by_workers=is_bounded
        )
        + why,
        next=action,
        evidence=_evidence(work, facts, late, lines[0] if lines else None) | hidden,
        cost_share=share,
        speedup_if_fixed=1.0 if untimed else of_lines or gain,
    )


def _workers_of_others_ns(work: OwnWork, facts: JobFacts, late: LateRanks) -> float:
    """Return how long a step takes at least without late data, as the loader workers of the others are no faster.

    Each makes batches for a share of the time, and would for all of it; 0 where they have no workers, or few samples.
    """
    others = set(late.other_ranks)
    at_work = workers_at_work([each for each in facts.worker_lines if each.rank in others])
    return at_work.share * work.step_ns if late.part == "input_wait" and not at_work.is_rough else 0.0


def _stage_finding(work: OwnWork, facts: JobFacts, late: LateRanks, line: BlamedLine | None) -> Finding:
    """Return the finding about ranks that are the longest stages of a pipeline."""
    more_ns = float(excess_over_others(work.own, late.rows, late.others).mean())
    return Finding.of(
        straggler_kind(late.part),
        ranks=late.ranks,
        phase=late.part,
        summary=stage_summary(work, late, more_ns),
        next=advice.for_long_stage(late.ranks),
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

    if late.part == "input_wait" and facts.loader_workers:  # the loop's own line is that in which it waits for them
        return workers_line(facts.worker_lines, late.ranks, late.other_ranks)

    share = _share_of_part(work, late)
    waiting = max(1.0 - float(work.own[late.rows].mean()) / work.step_ns, 0.0) if late.part == "backward" else 0.0
    line = blamed_line(facts.lines, late.part, share, late.ranks, late.other_ranks, waiting)
    # The part may have far more work that all ranks do: a small share of it is all that these take longer.
    of_excess = min(late.excess_ns / max(share * work.step_ns, 1.0), 1.0)
    return line or line_of_ranks_alone(facts.lines, late.part, share, late.ranks, LINE_SHARE * of_excess)


def _evidence(work: OwnWork, facts: JobFacts, late: LateRanks, line: BlamedLine | None) -> dict[str, object]:
    return late_evidence(work, facts, late) | (line.evidence(_share_of_part(work, late)) if line else {})


def _reason(
    work: OwnWork, facts: JobFacts, late: LateRanks, line: BlamedLine | None, lines: Sequence[BlamedLine]
) -> tuple[str, str]:
    """Return the sentence about why the ranks are late, empty if nothing more is known, and the advice.

    Args:
        line: the line in which they are late.
        lines: that line, or two that have most of their time together.
    """
    ranks, others = late.ranks, late.other_ranks
    is_loading, why = late.part == "input_wait", ""
    action = advice.for_straggler(None if late.everywhere else late.part, ranks, facts, line)
    if late.only_passes:
        action = advice.for_more_work(ranks, is_known=False)
    elif len(lines) > 1:
        action = advice.for_own_code(ranks, facts, lines)

    if late.group is not None and line is None and not is_loading:
        action = advice.for_slow_group(late.group)

    beside = background_threads(facts, ranks) if late.everywhere else None
    if beside is not None:
        why, action = beside.text, beside.action

    if is_loading and (fewer := fewer_workers(facts, ranks, others)) is not None:
        why, usual = fewer
        action = f"Give {ranks_text(ranks)} as many loader workers as the others have: num_workers={usual}."

    if is_loading and _read_for_others(work, facts, late):
        action = advice.for_reading_ranks(ranks, facts)

    if beside is None and not is_loading and is_without_core(work, facts, late):
        is_due_to_code = due_to_code_ns(work, facts, late.rows, late.part, late.excess_ns)
        return (
            waited_for_core(facts, ranks, others),
            action if is_due_to_code else advice.for_rank_without_core(ranks, facts),
        )

    run = facts.core_run(ranks)
    if not why and run is not None and facts.oversubscribed and more_work_ns(work, facts, late.rows, late.excess_ns):
        why = f" {capitalized(ranks_text(ranks))} used {factor_text(run[0] / run[1])} the CPU time of the others."
        if late.everywhere and run[0] >= FAR_MORE_WORK * run[1]:
            action = advice.for_more_work(ranks, is_known=True)

    return why, action
