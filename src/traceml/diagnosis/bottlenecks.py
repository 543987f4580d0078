"""Parts of the step that cost all ranks: waiting for data, copies to the device, code outside the known phases."""

from __future__ import annotations

import numpy as np

from traceml.diagnosis import advice
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.job_facts import JobFacts
from traceml.diagnosis.kinds import WARNING_SHARE, Kind
from traceml.diagnosis.phases import Floats
from traceml.diagnosis.replay import saved_ns, speedup, without_rare
from traceml.diagnosis.segments import COMPUTE, Segments
from traceml.formatting import capitalized, factor_text, ns_text, percent_text, phase_words, ranks_text

__all__ = ["FLOOR_NS", "input_bound", "residual", "transfers"]

FLOOR_NS = 1e6
"""Below a millisecond a step nothing is blamed: a toy's loader, loss function and Python cost that much."""
CROWDED_SHARE = 0.20
"""The share from which code outside the phases is blamed when the ranks have too few cores."""


def input_bound(segments: Segments, facts: JobFacts, step_ns: float) -> list[Finding]:
    """All ranks wait for data."""
    values = segments.parts.get("input_wait")
    if values is None:
        return []

    # Two steps are forgiven: the first batch after a pause is slow in the best of runs.
    removed = without_rare(values, 0)
    saved, ranks = _cost(segments, "input_wait", removed)
    if not _counts(saved, step_ns):
        return []

    share = saved / step_ns
    gain = speedup(segments, saved)
    summary = (
        f"{_who(ranks)} for data: {ns_text(float(removed.mean()))} of each {ns_text(step_ns)} step "
        f"({percent_text(share)}); with data always ready the run would be {factor_text(gain)} faster."
    )
    if (rare := _mostly_rare(values)) is not None:
        summary = summary[:-1] + f" (most of the waiting is in {percent_text(rare)} of the steps)."

    evidence = {**_evidence(segments, values, step_ns), **_loader_evidence(facts)}
    return [_finding(Kind.INPUT_BOUND, "input_wait", ranks, summary, advice.for_input(facts), evidence, share, gain)]


def transfers(segments: Segments, facts: JobFacts, step_ns: float) -> list[Finding]:
    """All ranks spend their time on copies to the device."""
    values = segments.parts.get("h2d")
    if values is None:
        return []

    removed = without_rare(values, 0)
    saved, ranks = _cost(segments, "h2d", removed)
    if not _counts(saved, step_ns):
        return []

    share, gain = saved / step_ns, speedup(segments, saved)
    summary = (
        f"Copies to the device take {ns_text(float(removed.mean()))} of each {ns_text(step_ns)} step "
        f"({percent_text(share)}); hidden behind computation they would make the run {factor_text(gain)} faster."
    )
    evidence = {**_evidence(segments, values, step_ns), **_loader_evidence(facts)}
    return [_finding(Kind.H2D_BOUND, "h2d", ranks, summary, advice.for_copies(facts), evidence, share, gain)]


def residual(segments: Segments, facts: JobFacts, step_ns: float) -> list[Finding]:
    """Time goes into the user's own phases, or outside all phases."""
    known = {*COMPUTE, "input_wait", "h2d", "comm", "checkpoint"}
    found = []
    for part, values in segments.parts.items():
        if part in known:
            continue

        named = part not in ("other", "user")
        # A named phase explains its rare long steps; those of nameless code are jitter until somebody names them.
        removed = without_rare(values, 0) if named else without_rare(values)
        saved, ranks = _cost(segments, part, removed)
        crowded = not named and facts.oversubscribed
        if _counts(saved, step_ns, CROWDED_SHARE if crowded else WARNING_SHARE):
            found.append(_residual(segments, part, removed, saved, ranks, step_ns))

    return found


def _residual(
    segments: Segments, part: str, removed: Floats, saved: float, ranks: tuple[int, ...], step_ns: float
) -> Finding:
    share, gain = saved / step_ns, speedup(segments, saved)
    summary = (
        f"{ns_text(float(removed.mean()))} of each {ns_text(step_ns)} step ({percent_text(share)}) is spent in "
        f"{phase_words(part)}; without it the run would be {factor_text(gain)} faster."
    )
    evidence = _evidence(segments, segments.parts[part], step_ns)
    return _finding(Kind.RESIDUAL_HEAVY, part, ranks, summary, advice.for_residual(part), evidence, share, gain)


def _cost(segments: Segments, part: str, removed: Floats) -> tuple[float, tuple[int, ...]]:
    """Return what a step would save without the part, and the ranks that have it (none named where all do).

    What only some ranks have, and not for certain (else they were found late), is not said of all: it saves nothing.
    """
    saved = saved_ns(segments, {part: segments.parts[part] - removed})
    means = removed.mean(axis=1)
    has = means >= 0.5 * float(np.max(means, initial=0))
    if has.all():
        return saved, ()

    return saved if has.mean() > 0.5 else 0.0, tuple(int(rank) for rank in segments.ranks[has])


def _counts(saved: float, step_ns: float, share: float = WARNING_SHARE) -> bool:
    return saved >= FLOOR_NS and saved >= share * step_ns


def _mostly_rare(values: Floats) -> float | None:
    """Return the share of steps that hold nearly all of the part, when these are few."""
    per_step = values.mean(axis=0)
    long = per_step > 3 * float(per_step.mean())
    held = float(per_step[long].sum()) / max(float(per_step.sum()), 1.0)
    return float(long.mean()) if held > 0.8 else None


def _who(ranks: tuple[int, ...]) -> str:
    if not ranks:
        return "The run waits"

    return f"{capitalized(ranks_text(ranks))} {'waits' if len(ranks) == 1 else 'wait'}"


def _evidence(segments: Segments, values: Floats, step_ns: float) -> dict[str, object]:
    return {
        "step_ms": step_ns / 1e6,
        "phase_ms": float(values.mean()) / 1e6,
        "phase_p50_ms": float(np.median(values)) / 1e6,
        "phase_ms_by_rank": _by_rank(segments, values),
        "compute_ms": segments.compute_ns / 1e6,
        "steps": values.shape[1],
    }


def _by_rank(segments: Segments, values: Floats) -> dict[str, float]:
    means = values.mean(axis=1) / 1e6
    return {str(rank): float(mean) for rank, mean in zip(segments.ranks[:16].tolist(), means[:16], strict=True)}


def _loader_evidence(facts: JobFacts) -> dict[str, object]:
    if facts.loader is None:
        return {}

    told = {
        "dataset": facts.loader.dataset,
        "num_workers": facts.loader.num_workers,
        "in_memory": facts.loader.in_memory,
    }
    return {key: value for key, value in told.items() if value is not None}


def _finding(
    kind: Kind,
    phase: str,
    ranks: tuple[int, ...],
    summary: str,
    action: str,
    evidence: dict[str, object],
    share: float,
    gain: float,
) -> Finding:
    return Finding(
        kind=kind,
        severity=kind.severity_for(share),
        ranks=ranks,
        phase=phase,
        summary=summary,
        next=action,
        evidence=evidence,
        cost_share=share,
        speedup_if_fixed=gain,
    )
