"""When nothing is wrong: where the time goes, and whether it is nearly all computation."""

from __future__ import annotations

from traceml.diagnosis import advice
from traceml.diagnosis.comm import least_wait_ns
from traceml.diagnosis.facts import Facts
from traceml.diagnosis.findings import Finding, Kind, Severity
from traceml.diagnosis.segments import COMPUTE, Segments
from traceml.diagnosis.words import lasting, part_words, percent

__all__ = ["COMPUTE_SHARE", "nothing_found"]

COMPUTE_SHARE = 0.90
"""From this share of computation on a run is told to be bound by it."""


def nothing_found(segments: Segments, facts: Facts) -> Finding:
    """Return COMPUTE_BOUND or HEALTHY: no rule has found a cost worth a finding."""
    step = segments.step_ns
    means = {part: float(values.mean()) for part, values in segments.parts.items()}
    shares = {part: mean / step for part, mean in means.items()}
    if segments.grouped:
        shares["waiting for other ranks"] = max(0.0, 1.0 - sum(shares.values()))

    evidence: dict[str, object] = {"step_ms": step / 1e6, "share_by_phase": shares, "steps": len(segments.step)}
    if segments.grouped:
        evidence["exposed_comm_ms"] = least_wait_ns(segments) / 1e6 if segments.backward_known else None

    if facts.main_wait:
        evidence["cpu_wait_share"] = facts.wait_share

    compute = segments.compute_ns / step
    heaviest = max((part for part in COMPUTE if part in means), key=lambda part: means[part], default="forward")
    if compute >= COMPUTE_SHARE and segments.backward_known:
        return Finding(
            kind=Kind.COMPUTE_BOUND,
            severity=Severity.INFO,
            phase=heaviest,
            summary=(
                f"Nothing holds the run up: {percent(compute)} of each {lasting(step)} step is computation, most of it "
                f"{part_words(heaviest)} ({lasting(means[heaviest])}, {percent(shares[heaviest])})."
            ),
            next=advice.for_compute(heaviest, facts, segments.device),
            evidence=evidence,
        )

    return Finding(
        kind=Kind.HEALTHY,
        severity=Severity.INFO,
        summary=f"Nothing holds the run up: a step takes {lasting(step)}; {_largest(shares)}.",
        next=_when_healthy(facts, shares),
        evidence=evidence,
    )


def _largest(shares: dict[str, float]) -> str:
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]
    told = [f"{percent(share)} {part_words(part)}" for part, share in largest]
    return ", ".join(told)


def _when_healthy(facts: Facts, shares: dict[str, float]) -> str:
    if facts.oversubscribed:
        return (
            f"The ranks stood ready without a core for {percent(facts.wait_share)} of their time: try fewer ranks or "
            "threads (OMP_NUM_THREADS) per host."
        )

    if shares.get("waiting for other ranks", 0) >= 0.2:
        return "Nothing needs fixing; larger batches would leave less of the step to waiting for other ranks."

    return "Nothing needs fixing; larger batches or torch.compile are the usual next gains."
