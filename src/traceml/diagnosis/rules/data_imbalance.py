"""Work that follows the size of the batches: then it makes no rank slow and no step irregular, but lengths differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis.advice import for_large_batches
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.speedup import new_step_times, speedup
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import factor_text, gain_text, ns_text, percent_text, ranks_text

__all__ = ["data_imbalance", "with_batch_sizes", "without_largest_batches"]

MIN_VARIATION = 0.05
"""Standard deviation of the batches' sizes, as share of their mean, from which on they differ."""
MIN_EXPLAINED = 0.5
"""Share of the differences in own computation that follow the size."""
MAX_GROWTH = 2.5
"""Work grows with the square of a size at most, as attention does, and a little more by the noise of both."""
ALWAYS_SHARE = 0.9
"""A rank with the largest batch in this share of the steps is named."""

MIN_RATIO = 1.2
"""Batches of late ranks are mentioned if they are larger than those of the others by this factor."""

_MIN_MEASURED = 20

_EVEN_BATCHES = (
    "Give all ranks batches of about the same size in each step: sort samples by length into buckets, pack short ones "
    "together, or fill batches up to a number of tokens."
)


def data_imbalance(window: AlignedSteps, work: OwnWork) -> tuple[list[Finding], dict[str, Floats]]:
    """Return the finding, and the computing parts without what follows the size of the batches.

    Rules that look for slow ranks and irregular steps judge what remains. The cost is the waiting for the rank with
    the largest batch of each step; a single rank waits for nobody, so it has no finding.
    """
    sizes = window.elements
    if not len(sizes) or (sizes <= 0).any() or sizes.std() < MIN_VARIATION * sizes.mean():
        return [], {}

    parts = [part for part in COMPUTE if part in work.parts]
    # Work can follow the size in steps with a measurement: in others it is a mean.
    is_measured = len(work.sync_intervals) == len(work.step) and int(work.measured.sum()) >= _MIN_MEASURED
    away, judged = sizes - sizes.mean(), work.measured if is_measured else np.ones(len(work.step), bool)
    of_judged, away_judged = (work, away) if judged.all() else (work.of_steps(judged), away[:, judged])
    own_ns = sum((of_judged.parts[part] for part in parts), np.zeros_like(of_judged.own))
    slope, explained = _fit(away_judged, own_ns)
    if not 0 < slope * sizes.mean() <= MAX_GROWTH * own_ns.mean() or explained < MIN_EXPLAINED:
        return [], {}

    slopes = {part: np.float32(max(_fit(away_judged, of_judged.parts[part])[0], 0.0)) for part in parts}
    even = {part: _without(of_judged.parts[part], away_judged, slopes[part]) for part in parts}
    cost = of_judged.step_ns - float(new_step_times(of_judged, even).mean())
    of_all = even if of_judged is work else _without_where_known(work, away, slopes, judged)
    if not work.grouped or len(work.ranks) < 2 or cost < least_cost_ns(work.step_ns):
        return [], of_all

    return [_finding(of_judged, sizes[:, judged], explained, cost)], of_all


def with_batch_sizes(finding: Finding, window: AlignedSteps) -> Finding:
    """Return a finding about late ranks with the size of their batches, if it is far above that of the others.

    Where other programs use the cores, work follows the size too little for a finding of its own.
    """
    sizes, is_late = window.elements, np.isin(window.ranks, finding.ranks)
    is_of_compute = finding.blames_ranks and (finding.phase is None or finding.phase in COMPUTE)
    if not is_of_compute or not len(sizes) or (sizes <= 0).any() or not 0 < is_late.sum() < len(is_late):
        return finding

    ratio = float(sizes[is_late].mean() / sizes[~is_late].mean())
    if ratio < MIN_RATIO:
        return finding

    whose = "Its" if len(finding.ranks) == 1 else "Their"
    more = finding.evidence["own_ms"] > ratio * finding.evidence["others_ms"]
    return replace(
        finding,
        summary=f"{finding.summary} {whose} batches have {factor_text(ratio)} as many elements as those of the others.",
        next=for_large_batches(finding.ranks) + (f" Then: {finding.next}" if more else ""),
        evidence={**finding.evidence, "size_ratio": ratio},
    )


def without_largest_batches(found: Sequence[Finding], explained: Sequence[Finding]) -> list[Finding]:
    """Return findings without those about ranks that a finding about batches names as having the largest ones.

    Work follows the size by a line only nearly: what is left of theirs beside it looks like a slow rank.
    """
    of_ranks = {each.ranks: each.cost_share for each in explained if each.kind is Kind.DATA_IMBALANCE}
    return [
        each for each in found if "size_ratio" not in each.evidence or each.cost_share >= of_ranks.get(each.ranks, 0.0)
    ]


def _fit(away: Floats, own_ns: Floats) -> tuple[float, float]:
    """Return the slope of work over size, and the share of its variance that the line explains.

    The longest 1 % of the work counts as much as the next longest, so that single pauses do not hide the rest.
    """
    clipped = np.minimum(own_ns, np.quantile(own_ns, 0.99)).astype(np.float64)
    around = clipped - clipped.mean()
    variance = float((away.astype(np.float64) ** 2).sum())
    slope = float((away * around).sum()) / variance
    whole = float((around**2).sum())
    return slope, slope**2 * variance / whole if whole else 0.0


def _without_where_known(
    work: OwnWork, away: Floats, slopes: Mapping[str, np.float32], judged: NDArray[np.bool_]
) -> dict[str, Floats]:
    """Return the parts at the mean size, but for what is a mean in steps without a measurement.

    On devices that is all that they compute, else backward.
    """
    in_all = () if work.device else tuple(part for part in slopes if part != "backward")
    return {
        part: np.where(judged | (part in in_all), _without(work.parts[part], away, slope), work.parts[part])
        for part, slope in slopes.items()
    }


def _without(own_ns: Floats, away: Floats, slope: np.float32) -> Floats:
    """Return the work of one part at the mean size."""
    return np.asarray(np.maximum(own_ns - slope * away, 0), dtype=own_ns.dtype)


def _always_largest(work: OwnWork, sizes: Floats) -> tuple[int, ...]:
    """Return the rank whose batch is the largest in nearly all steps; nothing without one."""
    row = int(sizes.mean(axis=1).argmax())
    largest = sizes[row] > np.delete(sizes, row, axis=0).max(axis=0)
    return tuple(work.ranks_of(np.array([row]))) if largest.mean() >= ALWAYS_SHARE else ()


def _finding(work: OwnWork, sizes: Floats, explained: float, cost: float) -> Finding:
    share, gain = cost / work.step_ns, speedup(work.step_ns, cost)
    ranks = _always_largest(work, sizes)
    whose = f"; that is {ranks_text(ranks)} in nearly all steps" if ranks else ""
    spread = float((sizes.max(axis=0) / sizes.min(axis=0)).mean())
    return Finding.of(
        Kind.DATA_IMBALANCE,
        ranks=ranks,
        summary=(
            f"The sizes of the batches explain {percent_text(explained)} of the differences in computation: the "
            f"largest in a step is {factor_text(spread)} the smallest, and the others wait for the rank that has it"
            f"{whose}. That costs {ns_text(cost)} of each {ns_text(work.step_ns)} step "
            f"({percent_text(share)}): with equal sizes, steps would be {gain_text(gain)}."
        ),
        next=for_large_batches(ranks) if ranks else _EVEN_BATCHES,
        evidence={
            "explained_share": explained,
            "size_ratio": spread,
            "mean_elements": float(sizes.mean()),
            "waiting_ms": cost / 1e6,
            "step_ms": work.step_ns / 1e6,
        },
        cost_share=share,
        speedup_if_fixed=gain,
    )
