"""Ranks whose process did not run for a while, and the steps in which that was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.wall_parts import Stop
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, Severity
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.formatting import capitalized, count_text, duration_text, plural, ranks_text

__all__ = ["stopped_ranks", "without_stopped_steps"]

MIN_S = 5.0
"""Ranks that were stopped for less in all are not reported, unless it is a tenth of the run's time."""
_TOGETHER_S = 2.0
_MAX_SHARE = 0.99
_MIN_OF_STEP = 0.5  # a step with a stop lasts longer than this share of it


def stopped_ranks(window: AlignedSteps, facts: JobFacts) -> Finding | None:
    """Return the finding about ranks that were stopped and continued.

    Args:
        window: the steps; while the run continues, only stops in these count.
    """
    stops = _recent(window, facts.stops) if facts.time is None else facts.stops
    seconds = {rank: sum(stop.seconds for stop in of_rank) for rank, of_rank in stops.items() if of_rank}
    if not seconds:
        return None

    worst = max(seconds, key=lambda rank: (seconds[rank], -rank))
    wall_s = _window_s(window, worst) if facts.time is None else facts.time.wall_s
    share = min(seconds[worst] / wall_s, _MAX_SHARE) if wall_s > 0 else 0.0
    if seconds[worst] < MIN_S and share < WARNING_SHARE:
        return None

    ranks = _stopped_with(worst, stops)
    held = len(ranks) < facts.world_size and _have_waited(window, worst, max(stops[worst]))
    return _finding(ranks, stops[worst], share, others_wait=held)


def without_stopped_steps(window: AlignedSteps, facts: JobFacts) -> AlignedSteps:
    """Return the window without the steps in which a rank was stopped: they show nothing of its code."""
    kept = np.ones(len(window), bool)
    for row, rank in enumerate(window.ranks.tolist()):
        for stop in facts.stops.get(rank, ()):
            if stop.part == "steps" and (column := _column_of(window, row, stop)) is not None:
                kept[column] = False

    return window if kept.all() else window.select(kept)


def _column_of(window: AlignedSteps, row: int, stop: Stop) -> int | None:
    """Return the step in which a stop was: the longest of those that were open at about that time."""
    near: NDArray[np.intp] = np.flatnonzero((window.steps >= stop.first_step) & (window.steps <= stop.last_step))
    if not len(near):
        return None

    column = int(near[window.total[row, near].argmax()])
    return column if window.total[row, column] >= _MIN_OF_STEP * stop.seconds * 1e9 else None


def _have_waited(window: AlignedSteps, rank: int, stop: Stop) -> bool:
    """Return whether the step of a stop was as long on all ranks."""
    rows = np.flatnonzero(window.ranks == rank)
    column = _column_of(window, int(rows[0]), stop) if len(rows) and stop.part == "steps" else None
    return column is not None and bool(window.total[:, column].min() >= _MIN_OF_STEP * stop.seconds * 1e9)


def _recent(window: AlignedSteps, stops: Mapping[int, Sequence[Stop]]) -> dict[int, list[Stop]]:
    first = int(window.steps[0]) if len(window) else 0
    return {rank: [stop for stop in of_rank if stop.last_step >= first] for rank, of_rank in stops.items()}


def _window_s(window: AlignedSteps, rank: int) -> float:
    rows = np.flatnonzero(window.ranks == rank)
    return float(window.total[rows[0]].sum(dtype=np.float64)) / 1e9 if len(rows) else 0.0


def _stopped_with(worst: int, stops: Mapping[int, Sequence[Stop]]) -> tuple[int, ...]:
    """Return the ranks that had the longest stop of one rank at the same time."""
    longest = max(stops[worst], key=lambda stop: stop.seconds)
    return tuple(
        sorted(rank for rank, of_rank in stops.items() if rank == worst or any(_is_same(longest, s) for s in of_rank))
    )


def _is_same(one: Stop, other: Stop) -> bool:
    if one.began_s is None or other.began_s is None:
        return False

    return abs(one.began_s - other.began_s) <= _TOGETHER_S and abs(one.seconds - other.seconds) <= _TOGETHER_S


def _finding(ranks: tuple[int, ...], stops: Sequence[Stop], share: float, *, others_wait: bool) -> Finding:
    longest = max(stops, key=lambda stop: stop.seconds)
    is_suspended = longest.part == "suspended"
    stops = [stop for stop in stops if (stop.part == "suspended") is is_suspended]  # one of the other kind is not told
    seconds = sum(stop.seconds for stop in stops)
    subject = f"{capitalized(ranks_text(ranks))} {'was' if len(ranks) == 1 else 'were'}"
    times = "" if len(stops) == 1 else f" {plural(len(stops), 'time')}"
    most = "" if len(stops) == 1 else f", the longest {duration_text(longest.seconds)}"
    held = " The other ranks had to wait." if others_wait else ""
    return Finding.of(
        Kind.STOPPED,
        severity=Severity.WARNING if share >= WARNING_SHARE else Severity.INFO,
        ranks=ranks,
        summary=(
            f"{subject} stopped{times} for {duration_text(seconds)}{most}{_when(longest)}: "
            f"{_MACHINE if is_suspended else _PROCESS}.{held}"
        ),
        next=_FOR_MACHINE if is_suspended else _FOR_PROCESS,
        evidence={
            "stopped_s": seconds,
            "stops": len(stops),
            "longest_s": longest.seconds,
            "suspended": is_suspended,
            **({} if longest.last_step < 0 else {"step": longest.last_step}),
            **({} if longest.began_s is None else {"began_s": int(longest.began_s)}),
        },
        cost_share=share,
    )


_PROCESS = "the process did not run, and neither computed nor waited for a core"
_MACHINE = "the machine was suspended"
_FOR_PROCESS = (
    "Find out who stopped it: SIGSTOP (kill -STOP, Ctrl-Z), a scheduler that suspends jobs (scontrol suspend), a "
    "debugger, a frozen container (docker pause), or a virtual machine that was paused."
)
_FOR_MACHINE = "Keep the machine awake while it trains: systemd-inhibit, or its settings for the lid and for power."


def _when(stop: Stop) -> str:
    if stop.part == "startup" or stop.last_step < 0:
        return ", before the first step"

    return f", {'in' if stop.part == 'steps' else 'at'} step {count_text(stop.last_step)}"
