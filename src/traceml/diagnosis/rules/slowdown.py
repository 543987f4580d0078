"""Change over time: steps that grow, jump and stay, jump and recover, or are slow at first.

The rules look at the usual step in equal bins of the whole run. A run is described by the simplest shape that explains
it: level, levels with one or two jumps, or a straight line (Theil-Sen, H. Theil 1950; P. K. Sen 1968).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import BlamedLine
from traceml.diagnosis.facts.trainings.trainer_calls import own_line
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.rules.changes import SideChange, changes
from traceml.diagnosis.steps.segments import COMPUTE, Segments
from traceml.diagnosis.steps.window import Window
from traceml.formatting import count_text, factor_text, ns_text, percent_text, phase_words

__all__ = ["StepHistory", "slowdown"]

MIN_BINS = 12
"""Fewer bins have no shape."""
MIN_STEPS_PER_BIN = 4
"""A bin has so many steps, as single ones are noise."""
MIN_FACTOR = 1.2
"""A slow part is slower by this factor."""
MIN_FACTOR_ALIKE = 1.25
"""The same where all phases are slower: on shared hosts, speed varies."""
MIN_ALIKE_NS = 10e9
"""And the slow part lasts so long: programs that come and go take cores for seconds."""
SIMILAR_FACTOR = 0.5
"""If the rest of the step is slower by this share of the blamed phase's factor, all phases are."""
MIN_Z_SCORE = 6.0
"""A jump is this many standard errors, by the deviation of bins from their level."""
MIN_TAU = 0.7
"""Growth is steady if the bins' order agrees with time by this much (Kendall's tau)."""
DOMINANT_SHARE = 0.7
"""The phase that has this share of the difference is blamed."""
_MAX_BINS = 64
_END = 1 << 62
_MIN_SEGMENT = 3
_SIMPLER = 0.8  # a slow part between two others has to explain the run better than a jump by this factor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StepHistory:
    """Usual step by bin of the whole run: the median over its steps of the mean over all ranks.

    Attributes:
        first_step: first step of each bin.
        steps: number of steps in each bin.
        step_ns: step time of each bin.
        parts_ns: phase -> the same.
    """

    first_step: NDArray[np.int64]
    steps: NDArray[np.int64]
    step_ns: Floats
    parts_ns: Mapping[str, Floats]

    @classmethod
    def of(cls, window: Window, segments: Segments) -> StepHistory:
        """Return the history of a window, in up to 64 bins of equal width in steps.

        Args:
            window: aligned steps.
            segments: its own work; the rest of a step is waiting for other ranks.
        """
        first, last = int(window.steps[0]), int(window.steps[-1])
        width = max(-(-(last - first + 1) // _MAX_BINS), -(-MIN_STEPS_PER_BIN * (last - first + 1) // len(window)))
        numbers, starts = np.unique((window.steps - first) // width, return_index=True)
        ends = [*starts[1:].tolist(), len(window.steps)]

        def usual(values: NDArray[np.floating[Any]]) -> Floats:
            return np.array([np.median(values[at:end]) for at, end in zip(starts.tolist(), ends, strict=True)])

        parts = {name: values.mean(axis=0, dtype=np.float64) for name, values in segments.parts.items()}
        waiting = np.maximum(segments.step - sum(parts.values()), 0)
        if len(starts) > 1 and ends[-1] - starts[-1] < MIN_STEPS_PER_BIN:  # of too few steps
            numbers, starts, ends = numbers[:-1], starts[:-1], ends[:-1]

        by_bin = {name: usual(values) for name, values in {**parts, "comm": waiting + parts.get("comm", 0)}.items()}
        return cls(first + numbers * width, np.diff([*starts, ends[-1]]), usual(segments.step), by_bin)


@dataclass(frozen=True, slots=True)
class _Change:
    """A slow part of the run, bins [first, last), and what steps take in it and outside."""

    shape: str
    first: int
    last: int
    before_ns: float
    after_ns: float

    @property
    def factor(self) -> float:
        return self.after_ns / max(self.before_ns, 1.0)

    @property
    def bins(self) -> slice:
        return slice(self.first, self.last)


def slowdown(bins: StepHistory, facts: JobFacts) -> list[Finding]:
    """Return the finding about steps that became slower, or were slow at first.

    Args:
        bins: history of the whole run.
        facts: about the job.
    """
    if len(bins.steps) < MIN_BINS:
        return []

    change = _growth(bins.step_ns) or _jump(bins.step_ns)
    if change is None or not _is_clear(bins, change):
        return []

    mean = float(np.average(bins.step_ns, weights=bins.steps))
    lost = float(((bins.step_ns - change.before_ns) * bins.steps)[change.bins].sum() / bins.steps.sum())
    if lost < least_cost_ns(mean):
        return []

    return [_finding(bins, change, lost, mean, facts)]


def _is_clear(bins: StepHistory, change: _Change) -> bool:
    """Return whether the slow part is slow enough; where a busy host makes the same picture, also long enough."""
    part = _part(bins, change)
    if part is not None and part not in COMPUTE:
        return change.factor >= MIN_FACTOR

    lasted_ns = float((bins.step_ns * bins.steps)[change.bins].sum())
    return change.factor >= MIN_FACTOR_ALIKE and lasted_ns >= MIN_ALIKE_NS


def _growth(values: Floats) -> _Change | None:
    """Return a steady growth over the whole run, if a line explains it better than a jump."""
    at = np.arange(len(values), dtype=float)
    first, second = np.triu_indices(len(values), 1)
    differences = values[second] - values[first]
    slope = float(np.median(differences / (at[second] - at[first])))
    level = float(np.median(values - slope * at))
    tau = float(np.sign(differences).mean())
    if slope <= 0 or tau < MIN_TAU:
        return None

    jump = min(range(_MIN_SEGMENT, len(values) - _MIN_SEGMENT + 1), key=lambda end: _fit(values, 0, end))
    if _spread(values - _levels(values, jump)) < _spread(values - level - slope * at):
        return None

    end = level + slope * at[-1]
    return _Change("growth", 0, len(values), max(level, 1.0), end)


def _jump(values: Floats) -> _Change | None:
    """Return the slow part of a run with two levels: at its end, at its beginning, or between."""
    ordered, count = np.sort(values), len(values)
    if ordered[-2] < MIN_FACTOR * ordered[1]:  # medians of three or more bins are between these
        return None

    simple = [(0, at) for at in range(_MIN_SEGMENT, count)] + [(at, count) for at in range(_MIN_SEGMENT, count - 1)]
    between = [
        (first, last)
        for first in range(_MIN_SEGMENT, count - _MIN_SEGMENT)
        for last in range(first + _MIN_SEGMENT, count - _MIN_SEGMENT + 1)
    ]
    fits = [min((_fit(values, *part), part) for part in parts) for parts in (simple, between)]
    first, last = fits[1][1] if fits[1][0] < _SIMPLER * fits[0][0] else fits[0][1]
    inside, outside = values[first:last], np.concatenate([values[:first], values[last:]])
    slow, usual = float(np.median(inside)), float(np.median(outside))
    if slow < usual and (first == 0 or last == count):  # the rest is the slow part
        first, last, slow, usual = (last, count, usual, slow) if first == 0 else (0, first, usual, slow)

    residuals = np.concatenate([inside - np.median(inside), outside - np.median(outside)])
    spread = max(_spread(residuals), _spread(np.diff(values)) / np.sqrt(2), 1e-3 * usual)
    if slow - usual < MIN_Z_SCORE * spread * np.sqrt(1 / len(inside) + 1 / len(outside)):
        return None

    return _Change("stays" if last == count else "first" if first == 0 else "recovers", first, last, usual, slow)


def _fit(values: Floats, first: int, last: int) -> float:
    """Return the absolute deviation of the values from two levels, inside and outside of a part."""
    return _deviation(values[first:last]) + _deviation(np.concatenate([values[:first], values[last:]]))


def _deviation(values: Floats) -> float:
    """Return the sum of absolute deviations from the median: the upper half less the lower one, without the median."""
    ordered, count = np.sort(values), len(values)
    return float(ordered[(count + 1) // 2 :].sum() - ordered[: count // 2].sum())


def _levels(values: Floats, at: int) -> Floats:
    parts = np.split(values, [at])
    return np.concatenate([np.full(len(part), np.median(part)) for part in parts])


def _spread(values: Floats) -> float:
    """Return the standard deviation by the median of absolute deviations."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _finding(bins: StepHistory, change: _Change, lost: float, mean: float, facts: JobFacts) -> Finding:
    beside = _beside(bins, change, facts)
    crowded = _is_crowded(change, beside)
    # Where cores were taken, whatever runs takes longer: no phase or line is the cause.
    part = None if crowded else _part(bins, change)
    share = lost / mean
    phase_share = 0.0 if part is None else _share(bins, part)
    line = None if part is None else own_line(facts.lines, part, phase_share)
    since = int(bins.first_step[change.first])
    end = bins.first_step[change.last] if change.last < len(bins.steps) else None
    per_step = (change.after_ns - change.before_ns) / max(int(bins.first_step[-1] - bins.first_step[0]), 1)
    evidence = {
        "shape": change.shape,
        "since_step": since,
        **({} if end is None else {"until_step": int(end)}),
        "factor": change.factor,
        "before_ms": change.before_ns / 1e6,
        "after_ms": change.after_ns / 1e6,
        **({"growth_ms_per_step": per_step / 1e6} if change.shape == "growth" else {}),
        **({"changed": {each.name: [each.before, each.then] for each in beside}} if beside else {}),
        **(line.evidence(phase_share) if line else {}),
    }
    return Finding(
        kind=Kind.SLOWDOWN,
        severity=Kind.SLOWDOWN.severity_for(share),
        phase=part,
        summary=_summary(change, since, end, per_step, share, "" if crowded else _where(part, line))
        + _meanwhile(beside),
        next=beside[0].advice if beside and (crowded or line is None) else _advice(change, part, line),
        evidence=evidence,
        cost_share=share,
        speedup_if_fixed=1 / max(1 - share, 0.01),
    )


def _share(bins: StepHistory, part: str) -> float:
    """Return a phase's share of the step."""
    return float((bins.parts_ns[part] * bins.steps).sum() / max((bins.step_ns * bins.steps).sum(), 1.0))


def _beside(bins: StepHistory, change: _Change, facts: JobFacts) -> list[SideChange]:
    """Return what else changed: in the slow steps against the others, or in the last third against the first."""
    third = len(bins.steps) // 3
    starts = [*bins.first_step.tolist(), _END]
    hosts: set[str | None] = set(facts.hosts.values())
    is_limited = all(map(facts.has_memory_limit, hosts or {None}))
    memory_of = "container" if is_limited else "host"
    if change.shape == "growth":
        return changes(facts.samples.use(1, starts[third]), facts.samples.use(starts[-1 - third]), memory_of)

    then = facts.samples.use(starts[change.first], starts[change.last])
    others = (1, starts[change.first]) if change.first else (starts[change.last], _END)
    return changes(facts.samples.use(*others), then, memory_of)


def _is_crowded(change: _Change, beside: Sequence[SideChange]) -> bool:
    """Return whether the loss of cores explains half of what the steps lost."""
    waited = next((each.then - each.before for each in beside if each.name == "cpu_wait_share"), 0.0)
    taken = any(each.takes_cores and each.name != "cpu_wait_share" for each in beside)
    return waited >= (0.25 if taken else 0.5) * (1 - 1 / change.factor)


def _meanwhile(beside: Sequence[SideChange]) -> str:
    return "".join(f" {'Meanwhile' if not at else 'And'} {each.text}." for at, each in enumerate(beside[:2]))


def _part(bins: StepHistory, change: _Change) -> str | None:
    """Return the phase that has most of the difference, and grew by far more than the rest; None if all grew."""
    usual, slow = _levels_of(bins, change)
    differences = {name: slow[name] - usual[name] for name in usual}
    whole = sum(value for value in differences.values() if value > 0)
    part = max(differences, key=lambda name: differences[name], default=None)
    if part in (None, "comm") or not differences[part] >= DOMINANT_SHARE * whole > 0:
        return None

    rest, more = (sum(values.values()) - values[part] for values in (usual, differences))
    similar = SIMILAR_FACTOR * differences[part] / max(usual[part], 1.0)
    return part if more / max(rest, 1.0) < similar else None


def _levels_of(bins: StepHistory, change: _Change) -> tuple[dict[str, float], dict[str, float]]:
    """Return the usual time and the slow time of each phase."""
    slow = np.zeros(len(bins.steps), bool)
    slow[change.bins] = True
    usual = ~slow
    if change.shape == "growth":
        third = len(slow) // 3
        usual, slow = np.arange(len(slow)) < third, np.arange(len(slow)) >= len(slow) - third

    return _medians(bins, usual), _medians(bins, slow)


def _medians(bins: StepHistory, at: NDArray[np.bool_]) -> dict[str, float]:
    return {name: float(np.median(values[at])) for name, values in bins.parts_ns.items()}


def _where(part: str | None, line: BlamedLine | None) -> str:
    if part is None:
        return ", in all phases alike"

    return f", in {phase_words(part)}" + (line.of_it if line else "")


def _summary(change: _Change, since: int, end: int | None, per_step: float, share: float, where: str) -> str:
    times = f"{ns_text(change.before_ns)} to {ns_text(change.after_ns)}"
    cost = f"; that costs {percent_text(share)} of step time."
    if change.shape == "growth":
        return f"Steps grow by {ns_text(per_step)} each, from {times}{where}{cost}"

    longer = f"a step takes {factor_text(change.factor)} as long ({times}){where}{cost}"
    if change.shape == "stays":
        return f"Since step {count_text(since)} {longer}"

    until = count_text(None if end is None else int(end))
    if change.shape == "first":
        return f"Until step {until} {longer}"

    return f"From step {count_text(since)} to step {until} {longer}"


def _advice(change: _Change, part: str | None, line: BlamedLine | None) -> str:
    if line is not None and change.shape == "growth":
        return f"Look at {line.place} for what it keeps or repeats: a list, a history or a graph that grows."

    if line is not None:
        return f"Look at what {line.place} does then and not otherwise."

    if part is None:
        return (
            "All phases are slower, so the code is not the cause: look for other programs on the host, clocks lowered "
            "by heat or power, and swapping at that time."
        )

    if part == "input_wait":
        return "Look at the data from that step on: larger files, another shard, a page cache that no longer holds it."

    return (
        f"Look at what changes in {phase_words(part)} then: batch size, sequence length, recompilation, a growing list."
    )
