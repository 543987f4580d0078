"""Device memory that is given back to the driver and requested again in each step: `empty_cache()` in the loop."""

from __future__ import annotations

from traceml.diagnosis.facts.device_events import SegmentTurnover
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import capitalized, line_text, ranks_text

__all__ = ["allocator_churn"]

MIN_PER_STEP = 0.9
"""Blocks per step that are given back and requested again, from which on the loop does it."""
_EMPTIES = " empty_cache"


def allocator_churn(facts: JobFacts) -> list[Finding]:
    """Return the finding about ranks whose allocator turns over memory in each step.

    An allocator that lacks memory does so too: that is pressure, unless the call was seen.
    """
    lacking = {(each.rank, each.device) for each in facts.memory.devices() if each.retries}
    steady = facts.turnover.steady(facts.last_step, MIN_PER_STEP)
    found = {key: each for key, each in steady.items() if key not in lacking or _place(key[0], facts)}
    if not found:
        return []

    ranks = tuple(sorted({rank for rank, _ in found}))
    worst = max(found, key=lambda key: found[key].per_step)
    return [_finding(ranks, worst[0], found[worst], facts)]


def _finding(ranks: tuple[int, ...], rank: int, turnover: SegmentTurnover, facts: JobFacts) -> Finding:
    place = _place(rank, facts)
    gives, requests = ("give", "request") if len(ranks) > 1 else ("gives", "requests")
    cause = f"empty_cache() is called at {line_text(*place)}" if place else _CAUSES
    return Finding.of(
        Kind.ALLOCATOR_CHURN,
        ranks=ranks if len(ranks) < facts.world_size else (),
        summary=(
            f"{capitalized(ranks_text(ranks))} {gives} {turnover.per_step:.1f} blocks of device memory per step back "
            f"to the driver and {requests} as many again: {cause}."
        ),
        next=(
            "Do not empty the cache in the loop: torch reuses freed memory automatically, and each call waits for the "
            "device. Against fragmentation set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
        ),
        evidence={
            "blocks_per_step": turnover.per_step,
            "device": turnover.device,
            "since_step": turnover.first_step,
            **(dict(zip(("file", "line", "function"), place, strict=True)) if place else {}),
        },
    )


_CAUSES = (
    "the script or a library calls torch.cuda.empty_cache() in the loop, or garbage_collection_threshold of "
    "PYTORCH_CUDA_ALLOC_CONF is low"
)


def _place(rank: int, facts: JobFacts) -> tuple[str, int, str] | None:
    """Return the user's line that was seen most in `empty_cache`; None if it was not seen."""
    seen = [each for each in facts.lines if each.rank == rank and (each.library or "").endswith(_EMPTIES)]
    most = max((each for each in seen if each.file), key=lambda each: each.samples, default=None)
    return None if most is None else (str(most.file), int(most.line or 0), str(most.function))
