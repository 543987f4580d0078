"""A run's phases next to those of earlier runs of the same model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.findings import significant
from traceml.runs.fleet.fleet_runs import FleetRun
from traceml.runs.fleet.fleet_types import STEP, PhaseHistory, RunHistory
from traceml.runs.fleet.slow_hosts import MIN_STEPS

__all__ = ["LAST_RUNS", "MIN_RUNS", "limit_of", "run_history"]

MIN_RUNS = 8
LAST_RUNS = 50
_MIN_CHANGE = 0.03  # of the phase; machines differ by as much from day to day
_MIN_OF_STEP = 0.01  # of the step: a phase that takes less time matters to nobody
_MIN_SPREAD = 0.005  # of the median: step times that agree to the digit have no spread to measure by
_MAD_OF_NORMAL = 1.4826
# Earlier runs -> the distance from their median, in their deviations, that one run in a thousand has by chance; from
# a million simulated histories with normal noise. Between these, the distance is linear in 1/number.
_LIMITS = {8: 11.7, 9: 11.3, 10: 8.8, 12: 7.4, 15: 6.5, 20: 5.3, 30: 4.5, 50: 3.9}


def run_history(run: FleetRun, runs: Sequence[FleetRun]) -> RunHistory:
    """Compare a run with the earlier ones of the same model."""
    earlier = [each for each in runs if _is_before(each, run) and each.script == run.script]
    alike = [each for each in earlier if _key(each) == _key(run)]
    return RunHistory(
        run=run.run,
        project=run.project,
        script=run.script,
        model=run.model,
        batch_size=run.batch_size,
        world_size=run.world_size,
        started=run.started,
        runs=len(alike[-LAST_RUNS:]),
        others=len(earlier) - len(alike),
        phases=_phases(run, alike[-LAST_RUNS:]) if len(alike) >= MIN_RUNS and run.steps >= MIN_STEPS else [],
    )


def _is_before(other: FleetRun, run: FleetRun) -> bool:
    return other.project == run.project and (other.started or 0.0) < (run.started or 0.0) and other.steps >= MIN_STEPS


def _key(run: FleetRun) -> tuple[Any, ...]:
    """Return all that decides how much work a step is."""
    return (
        run.project, run.script, run.model, run.parameters, run.dtype, run.device, run.parallel, run.compiled,
        run.batch_size, run.world_size,
    )  # fmt: skip


def _phases(run: FleetRun, earlier: Sequence[FleetRun]) -> list[PhaseHistory]:
    step_ms = sum(run.phases.values())
    found = [_phase(STEP, step_ms, np.array([sum(each.phases.values()) for each in earlier]), step_ms)]
    for name in dict.fromkeys([*run.phases, *(name for each in earlier for name in each.phases)]):
        history = np.array([each.phases.get(name, 0.0) for each in earlier])
        found.append(_phase(name, run.phases.get(name, 0.0), history, step_ms))

    return [found[0], *sorted(found[1:], key=lambda phase: -max(phase.mean_ms, phase.usual_ms))]


def _phase(name: str, mean_ms: float, history: NDArray[np.float64], step_ms: float) -> PhaseHistory:
    usual = float(np.median(history))
    deviation = _MAD_OF_NORMAL * float(np.median(np.abs(history - usual)))
    room = max(
        limit_of(len(history)) * max(deviation, _MIN_SPREAD * usual), _MIN_CHANGE * usual, _MIN_OF_STEP * step_ms
    )
    low, high = max(usual - room, 0.0), usual + room
    return PhaseHistory(
        phase=name,
        mean_ms=significant(mean_ms) or 0.0,
        usual_ms=significant(usual) or 0.0,
        low_ms=significant(low) or 0.0,
        high_ms=significant(high) or 0.0,
        change=significant(mean_ms / usual - 1) if usual > 0 else None,
        outcome="slower" if mean_ms > high else "faster" if mean_ms < low else "same",
    )


def limit_of(runs: int) -> float:
    """Return the distance from the median, in deviations, that is unusual next to a number of earlier runs."""
    numbers = sorted(_LIMITS, reverse=True)
    return float(np.interp(1 / runs, [1 / each for each in numbers], [_LIMITS[each] for each in numbers]))
