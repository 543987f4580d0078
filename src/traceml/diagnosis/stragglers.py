"""Ranks whose own work makes the others wait.

A rank is late when its own work, summed over the window, stands out from the others', lastingly, and in one part of
the step. Sums find a fault that comes every fifth step, which medians cannot; one dominant part tells a fault from a
core or a host that happens to be slower in everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis import advice
from traceml.diagnosis.facts import Facts
from traceml.diagnosis.findings import WARNING_SHARE, Finding, Kind, severity_of
from traceml.diagnosis.replay import lifted, saved_ns, speedup
from traceml.diagnosis.segments import COMPUTE, Segments, median_over_ranks
from traceml.diagnosis.window import Floats
from traceml.diagnosis.words import factor, lasting, of_ranks, part_words, percent

__all__ = ["Late", "find_late", "stragglers"]

EXCESS_SHARE = 0.08
"""A late rank's excess over the others is at least this share of the step ..."""
EXCESS_NS = 1e6
"""... and at least this long."""
DOMINANCE = 0.7
"""The blamed part holds this much of the excess; with less the rank is slower in everything."""
EVERYWHERE_SHARE = 0.30
"""From this excess on a rank which is slower in everything is named too."""
RUNNER_UP = 1 / 3
"""Nobody who is not blamed has more than this share of the late ranks' excess."""
CERTAINTY = 3.5
"""The excess is so many standard errors away from none."""
ALIKE = 0.4
"""A second computing part slower by this much of the first one's factor: the rank computes slower, not one part."""

_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Late:
    """Ranks found late for the same reason; `rows` and `others` index the window's ranks."""

    rows: NDArray[np.intp]
    others: NDArray[np.intp]
    part: str
    excess_ns: float
    dominance: float
    everywhere: bool
    by_part_ns: Mapping[str, float]


def stragglers(segments: Segments, facts: Facts) -> tuple[list[Finding], dict[str, Floats]]:
    """Return a finding per group of late ranks, and the window's parts with them lifted to the others."""
    fixed: dict[str, Floats] = {}
    if not segments.grouped or len(segments.ranks) < 2:
        return [], fixed

    found = []
    for late in find_late(segments, facts):
        found.append(_finding(segments, facts, late))
        for part in late.by_part_ns if late.everywhere else (late.part,):
            fixed[part] = _lift(fixed.get(part, segments.parts[part]), late)

    return found, fixed


def find_late(segments: Segments, facts: Facts) -> list[Late]:
    """Return the groups of late ranks, the largest excess first."""
    remaining = np.arange(len(segments.ranks))
    found: list[Late] = []
    # One group of late ranks may hide a second one with another cause; a third is left for the next look.
    for _ in range(2):
        if len(remaining) < 2:
            break

        rows, others = _split(segments.own[remaining].mean(axis=1))
        rows, others = remaining[rows], remaining[others]
        groups = _judge(segments, facts, rows, others)
        if not groups:
            break

        found += groups
        remaining = others

    return found


def _split(means: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Part the ranks at the largest gap between their mean own work."""
    order = np.argsort(means, kind="stable")
    cut = int(np.argmax(np.diff(means[order]))) + 1
    return order[cut:], order[:cut]


def _judge(segments: Segments, facts: Facts, rows: NDArray[np.intp], others: NDArray[np.intp]) -> list[Late]:
    reference = {part: median_over_ranks(values[others]) for part, values in segments.parts.items()}
    own = median_over_ranks(segments.own[others])
    excess = segments.own[rows] - own
    least = float(excess.mean(axis=1).min())
    spread = float((segments.own[others].mean(axis=1) - own.mean()).max())
    if least < max(EXCESS_SHARE * segments.step_ns, EXCESS_NS) or spread > RUNNER_UP * least:
        return []

    groups: dict[tuple[str, bool], list[int]] = {}
    for row, one in zip(rows.tolist(), excess, strict=True):
        if certainty(one) < CERTAINTY:
            continue

        part, everywhere = _blame(segments, facts, row, reference, float(one.mean()))
        if part and not (everywhere and not _lasting(one, segments)):
            groups.setdefault((part, everywhere), []).append(row)

    found = [_late(segments, np.array(group), others, *cause) for cause, group in groups.items()]
    return sorted(found, key=lambda late: -late.excess_ns)


def _blame(
    segments: Segments, facts: Facts, row: int, reference: Mapping[str, Floats], excess: float
) -> tuple[str | None, bool]:
    """Return (the part to blame or None, whether the rank is slower in everything)."""
    by_part = {part: float((values[row] - reference[part]).mean()) for part, values in segments.parts.items()}
    positive = sum(value for value in by_part.values() if value > 0)
    part = max(by_part, key=lambda name: by_part[name])
    everywhere = by_part[part] < DOMINANCE * positive or _alike(by_part, reference, part)
    floor = EVERYWHERE_SHARE if everywhere or facts.oversubscribed else EXCESS_SHARE
    if excess < floor * segments.step_ns or (everywhere and facts.oversubscribed):
        return None, everywhere

    return part, everywhere


def _alike(by_part: Mapping[str, float], reference: Mapping[str, Floats], part: str) -> bool:
    """Tell whether another computing part got slower by a like factor: then it is the rank, not that part."""
    if part not in COMPUTE:
        return False

    base = {name: float(reference[name].mean()) for name in COMPUTE if name in reference}
    whole = sum(base.values())
    factor = by_part[part] / max(base[part], 1.0)
    return any(
        by_part[name] >= ALIKE * factor * base[name] for name in base if name != part and base[name] >= 0.1 * whole
    )


def certainty(excess: Floats) -> float:
    """Return how many standard errors the mean lies above zero, by the means of eight batches of steps."""
    batches = [float(batch.mean()) for batch in np.array_split(excess, _BATCHES)]
    error = float(np.std(batches, ddof=1)) / float(np.sqrt(_BATCHES))
    return float(np.mean(batches)) / max(error, 1.0)


def _lasting(excess: Floats, segments: Segments) -> bool:
    halves = np.array_split(excess, 2)
    return min(float(half.mean()) for half in halves) >= EVERYWHERE_SHARE * segments.step_ns


def _late(segments: Segments, rows: NDArray[np.intp], others: NDArray[np.intp], part: str, everywhere: bool) -> Late:
    by_part = {
        name: float((values[rows].mean(axis=0) - median_over_ranks(values[others])).mean())
        for name, values in segments.parts.items()
    }
    positive = {name: value for name, value in by_part.items() if value > 0}
    excess = float((segments.own[rows].mean(axis=0) - median_over_ranks(segments.own[others])).mean())
    dominance = by_part[part] / max(sum(positive.values()), 1.0)
    return Late(
        rows=rows,
        others=others,
        part=part,
        excess_ns=excess,
        dominance=dominance,
        everywhere=everywhere,
        by_part_ns=positive,
    )


def _lift(values: Floats, late: Late) -> Floats:
    values = values.copy()
    values[late.rows] = median_over_ranks(values[late.others])
    return values


def _kind(part: str) -> Kind:
    if part == "input_wait":
        return Kind.INPUT_STRAGGLER

    if part == "h2d":
        return Kind.H2D_STRAGGLER

    return Kind.COMPUTE_STRAGGLER if part in COMPUTE else Kind.STRAGGLER


def _finding(segments: Segments, facts: Facts, late: Late) -> Finding:
    blamed = tuple(late.by_part_ns) if late.everywhere else (late.part,)
    saved = saved_ns(segments, {part: lifted(segments, part, late.rows, late.others) for part in blamed})
    share = min(late.excess_ns / segments.step_ns, 1.0)
    ranks = tuple(int(rank) for rank in segments.ranks[late.rows])
    gain = speedup(segments, saved)
    return Finding(
        kind=_kind(late.part),
        severity=severity_of(max(share, WARNING_SHARE)),
        ranks=ranks,
        phase=late.part,
        summary=_summary(segments, late, ranks, gain),
        next=advice.for_straggler(late, ranks, facts),
        evidence=_evidence(segments, facts, late, ranks),
        cost_share=share,
        speedup_if_fixed=gain,
    )


def _summary(segments: Segments, late: Late, ranks: tuple[int, ...], gain: float) -> str:
    who, verb = of_ranks(ranks), "hold" if len(ranks) > 1 else "holds"
    own = segments.parts[late.part]
    mine, others = float(own[late.rows].mean()), float(median_over_ranks(own[late.others]).mean())
    if late.everywhere:
        return (
            f"{who} {verb} the others up: slower in every part of the step, {lasting(late.excess_ns)} a step more own "
            f"work than the others (most of it in {part_words(late.part)}); the run would be {factor(gain)} faster."
        )

    whose = "their" if len(ranks) > 1 else "its"
    return (
        f"{who} {verb} the others up: {whose} {part_words(late.part)} takes {lasting(mine)}, {lasting(mine - others)} "
        f"more than the others' ({lasting(others)}), {percent(late.excess_ns / segments.step_ns)} of the step; "
        f"without that the run would be {factor(gain)} faster."
    )


def _evidence(segments: Segments, facts: Facts, late: Late, ranks: tuple[int, ...]) -> dict[str, object]:
    own = segments.parts[late.part]
    mine = own[late.rows].mean(axis=0)
    others = median_over_ranks(own[late.others])
    often = float((mine - others > 0.5 * max((mine - others).max(), 1.0)).mean())
    evidence: dict[str, object] = {
        "step_ms": segments.step_ns / 1e6,
        "own_ms": float(mine.mean()) / 1e6,
        "others_ms": float(others.mean()) / 1e6,
        "excess_ms": late.excess_ns / 1e6,
        "excess_ms_by_phase": {name: value / 1e6 for name, value in late.by_part_ns.items()},
        "dominance": late.dominance,
        "share_of_steps_late": often,
        "steps": segments.own.shape[1],
    }
    hosts = {str(rank): facts.hosts[rank] for rank in ranks if rank in facts.hosts}
    waits = {str(rank): facts.main_wait[rank] for rank in ranks if rank in facts.main_wait}
    return {**evidence, **({"hosts": hosts} if hosts else {}), **({"cpu_wait_share": waits} if waits else {})}
