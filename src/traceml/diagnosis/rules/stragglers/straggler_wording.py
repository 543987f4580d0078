"""Sentences and numbers about ranks that the others wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.facts.blamed_lines import BlamedLine
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.topology import RankGroup
from traceml.diagnosis.rules.stragglers.excess_tests import SIMILAR_SLOWDOWN_SHARE
from traceml.diagnosis.steps.own_work import LateRanks, OwnWork, excess_over_others, usual_excess
from traceml.diagnosis.steps.step_split import PHASES, Floats
from traceml.formatting import (
    capitalized,
    gain_text,
    largest_text,
    ns_text,
    percent_text,
    phase_words,
    phases_text,
    plural,
    ranks_text,
)

__all__ = [
    "fewer_workers", "is_hidden", "late_evidence", "late_summary", "share_late", "stage_summary", "subject_text",
    "waited_for_core",
]  # fmt: skip

_UNEVEN = 0.03
"""Cost and gain that differ by so much of the step are explained."""
_HIDDEN = 0.25
"""If a remedy alone gains less than this share of the cost, another late rank hides this one."""
_SELDOM = 0.25
"""Ranks that are late in a smaller share of the steps are late at times, as by saving in every n-th step."""
_NEARLY_ALL = 0.8
_SECOND_SHARE, _SECOND_NS = 0.3, 1e6
"""Ranks are late in another part, too, from this share of what they are late in the first one, and this time on."""
_IN_TURNS = 1.25
"""Ranks that cost this many times what they are late by on average are late in different steps."""
_LITTLE = 0.05
"""Parts with less of what a step takes, or of what ranks are late by, are next to nothing."""
_MAX_LISTED = 64  # a switch or a stage has thousands of ranks


def waited_for_core(facts: JobFacts, ranks: Sequence[int], others: Sequence[int]) -> str:
    """Return the sentence about late ranks that waited for a core."""
    mine, usual = (
        float(np.median([facts.wait_of_ready_time.get(rank, 0.0) for rank in some])) for some in (ranks, others)
    )
    return (
        f" {capitalized(ranks_text(ranks))} waited for a CPU core for {percent_text(mine)} of the time that "
        f"{'they' if len(ranks) > 1 else 'it'} had work (the others {percent_text(usual)})."
    )


def fewer_workers(facts: JobFacts, ranks: Sequence[int], others: Sequence[int]) -> tuple[str, int] | None:
    """Return the sentence about late ranks with fewer loader workers than any other rank, and how many these have.

    None where they have as many, or not all are known.
    """
    number = (facts.loader.number or 0) if facts.loader else 0
    mine, usual = ([facts.loader_of(rank, number) for rank in some] for some in (ranks, others))
    most = max((each.num_workers or 0 for each in mine if each), default=0)
    least = min((each.num_workers or 0 for each in usual if each), default=0)
    if None in mine or None in usual or most >= least:
        return None

    has = "has" if len(ranks) == 1 else "have"
    many = "no loader worker" if not most else plural(most, "loader worker")
    return f" {capitalized(ranks_text(ranks))} {has} {many}, the others {least}.", least


def late_summary(
    work: OwnWork,
    late: LateRanks,
    share: float,
    gain: float,
    lines: Sequence[BlamedLine],
    workers: int,
    gain_of_lines: float | None = None,
    untimed: str = "",
    *,
    is_bounded_by_workers: bool = False,
) -> str:
    """Return the sentence about late ranks.

    Args:
        share: share of the step that they cost.
        gain: factor by which steps would be faster if these ranks were not late.
        lines: of their code, or of their loader workers.
        workers: of their loader.
        gain_of_lines: the same without these lines alone, where that is less.
        untimed: what may be waiting for a device, in words; no gain is promised then.
        is_bounded_by_workers: whether the loader workers of the others allow no more.
    """
    many, cost = len(late.ranks) > 1, "costs"
    subject = f"{_subject(late)} {'slow' if many else 'slows'} the others down"
    own = work.parts[late.part]
    mine, others = float(own[late.rows].mean()), float(own[late.others].mean(axis=0).mean())
    if late.everywhere:
        without = untimed or f"; without it steps would be {gain_text(gain)}"
        return (
            f"{subject}: slower in {_slower_parts(work, late)}, {ns_text(late.excess_ns)} more own work per step than "
            f"the others ({_mostly_in(late)}){without}."
        )

    if many and share * work.step_ns >= _IN_TURNS * late.excess_ns:  # the mean of each says less than they cost
        subject += ", in turns"

    # Steps gain less than the late ranks lose where the next slowest work takes part of it.
    remains = "the others' workers make no more" if is_bounded_by_workers else "other differences between ranks remain"
    pace = f", not more, as {remains}" if share > 1 - 1 / gain + _UNEVEN else ""
    gained = untimed or f", and without it steps would be {gain_text(gain)}{pace}"
    if gain_of_lines is not None and not untimed:
        these = "that line" if len(lines) == 1 else "these lines"
        gained = f", and without {these} steps would be {gain_text(gain_of_lines)}"

    if is_hidden(late, share, gain):
        # Nobody waits for these ranks alone.
        subject, cost = f"{_subject(late)} {'are' if many else 'is'} slow, hidden by other slow ranks", "is"
        gained = ", saved only once other differences between ranks are removed, too"

    whose = "their" if many else "its"
    where = "".join(each.of_it if each is lines[0] else each.also for each in lines if not each.of_workers)
    batches = "".join(each.of_batches(workers, whose) for each in lines if each.of_workers)
    return (
        f"{subject}: {whose} {phase_words(late.part)} {_takes(late.part)} {ns_text(mine)}, "
        f"{ns_text(mine - others)} more than the others' ({ns_text(others)}){_seldom_text(work, late)}{where}; that "
        f"{cost} {percent_text(share)} of step time{gained}{batches}.{_second_part_text(late, whose)}"
    )


def _slower_parts(work: OwnWork, late: LateRanks) -> str:
    """Return in words the parts that are slower by a quarter of their factor or more; all if little is left."""
    usual_ns = {name: float(values[late.others].mean()) for name, values in work.parts.items()}
    whole_ns = max(sum(usual_ns.values()), 1.0)
    alike, least_ns = SIMILAR_SLOWDOWN_SHARE * late.excess_ns / whole_ns, _LITTLE * late.excess_ns
    slower = [name for name, ns in late.by_part_ns.items() if ns >= max(alike * usual_ns[name], least_ns)]
    if sum(usual_ns.values()) - sum(usual_ns[name] for name in slower) < _LITTLE * whole_ns:
        return "every part of the step"

    return phases_text([*(name for name in PHASES if name in slower), *sorted({*slower}.difference(PHASES))], None)


def _mostly_in(late: LateRanks) -> str:
    """Return the part with most of what late ranks work longer: `most of it in forward`."""
    most = largest_text(late.by_part_ns[late.part], sum(late.by_part_ns.values()))
    return f"{most} in {phase_words(late.part)}"


def _second_part_text(late: LateRanks, whose: str) -> str:
    """Return another part in which the ranks are late by much, as a sentence; empty if there is none."""
    rest = {name: ns for name, ns in late.by_part_ns.items() if name != late.part}
    part = max(rest, key=lambda name: rest[name], default=None)
    if part is None or rest[part] < max(_SECOND_SHARE * late.excess_ns, _SECOND_NS):
        return ""

    return f" {whose.capitalize()} {phase_words(part)} {_takes(part)} {ns_text(rest[part])} more, too."


def _takes(part: str) -> str:
    return "take" if part == "user" else "takes"  # user phases


def is_hidden(late: LateRanks, share: float, gain: float) -> bool:
    """Return whether other ranks are late by as much or more, so that a remedy alone gains hardly any of the cost."""
    return not late.everywhere and 1 - 1 / gain < _HIDDEN * share


def stage_summary(work: OwnWork, late: LateRanks, more_ns: float) -> str:
    """Return the sentence about late ranks that are stages of a pipeline: what one computes less, another one does."""
    slow, their = ("slow", "their") if len(late.ranks) > 1 else ("slows", "its")
    share = min(more_ns / work.step_ns, 1.0)
    return (
        f"{_subject(late)} {slow} the others down: {their} part of the model is a different one, and takes "
        f"{ns_text(more_ns)} more own work per step than theirs ({_mostly_in(late)}), for "
        f"which they wait {percent_text(share)} of step time."
    )


def _seldom_text(work: OwnWork, late: LateRanks) -> str:
    """Return in how many steps ranks are late, if these are few; else nothing."""
    excess = _excess(work, late)
    is_late = _is_late(excess)
    often, held = float(is_late.mean()), float(excess[is_late].sum()) / max(float(excess.sum()), 1.0)
    if often > _SELDOM or held < _NEARLY_ALL:
        return ""

    return f", nearly all in {percent_text(often)} of the steps ({ns_text(float(excess[is_late].mean()))} each)"


def _subject(late: LateRanks) -> str:
    return subject_text(late.ranks, late.group)


def subject_text(ranks: tuple[int, ...], group: RankGroup | None) -> str:
    """Return `Ranks 8, 9`, or `All 8 ranks of host gpu-041 (ranks 8-15)` where they are a group."""
    if group is None:
        return capitalized(ranks_text(ranks))

    return f"{capitalized(group.words)} ({', '.join([*group.also, ranks_text(ranks)])})"


def late_evidence(work: OwnWork, facts: JobFacts, late: LateRanks) -> dict[str, object]:
    """Return the numbers behind that sentence."""
    own = work.parts[late.part]
    mine, others = own[late.rows], own[late.others].mean(axis=0)
    evidence: dict[str, object] = {
        "step_ms": work.step_ns / 1e6,
        "own_ms": float(mine.mean()) / 1e6,
        "others_ms": float(others.mean()) / 1e6,
        "excess_ms": late.excess_ns / 1e6,
        "excess_ms_by_phase": {name: value / 1e6 for name, value in late.by_part_ns.items()},
        "dominance": late.dominance,
        "share_of_steps_late": share_late(_excess(work, late)),
        "steps": work.own.shape[1],
    }
    group = {"rank_group": late.group.evidence()} if late.group is not None else {}
    listed = late.ranks[:_MAX_LISTED]
    hosts = {str(rank): facts.hosts[rank] for rank in listed if rank in facts.hosts}
    waits = {str(rank): facts.wait_of_ready_time[rank] for rank in listed if rank in facts.wait_of_ready_time}
    return {**evidence, **group, **({"hosts": hosts} if hosts else {}), **({"cpu_wait_share": waits} if waits else {})}


def _excess(work: OwnWork, late: LateRanks) -> Floats:
    """Return by how much late ranks are late in each step that shows it: of backward the steps that measured it."""
    own = work.parts[late.part]
    known = work.measured if late.part == "backward" and work.measured.any() else slice(None)
    return excess_over_others(own, late.rows, late.others)[known]


def share_late(excess: Floats) -> float:
    """Return the share of steps with at least half of the usual excess."""
    return float(_is_late(excess).mean())


def _is_late(excess: Floats) -> NDArray[np.bool_]:
    """Return which steps have at least half of the usual excess."""
    return np.asarray(excess >= 0.5 * max(usual_excess(excess), 1.0))
