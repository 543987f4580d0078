"""Wall time of a running run, as its live verdict knows it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np

from tests.aggregator.conftest import Serving, wait_for_acks
from tests.eventually import eventually
from traceml.clock import monotonic_ns
from traceml.database.schema import EVALS, STEPS
from traceml.transport.client import Connection

S = 10**9
STEP_NS = S // 10


def send_training(rank: Connection, evaluations_s: list[float]) -> None:
    """Send the rows of steps until now, 100 before each evaluation and at the end."""
    now, at, step = monotonic_ns(), 0, 0
    steps, evals = [], []
    for seconds in [*evaluations_s, 0.0]:
        rows = np.zeros(100, STEPS.dtype)
        rows["step"], rows["t_end_ns"] = np.arange(step, step + 100), at + STEP_NS * np.arange(1, 101)
        rows["total_ns"], rows["forward_ns"], rows["backward_ns"] = STEP_NS, STEP_NS // 3, STEP_NS // 2
        step, at = step + 100, at + 10 * S + int(seconds * S)
        steps.append(rows)
        evals += [(step, at, int(seconds * S), 8, 0, 0)] if seconds else []

    all_steps, all_evals = np.concatenate(steps), np.array(evals, EVALS.dtype)
    for rows in (all_steps, all_evals):
        rows["t_end_ns"] += now - at

    rank.send_rows("evals", 0, len(all_evals), all_evals.tobytes())
    rank.send_rows("steps", 0, len(all_steps), all_steps.tobytes())
    wait_for_acks(rank, "steps", len(all_steps))


def test_the_live_verdict_knows_the_time_outside_the_steps(serving: Callable[..., Serving]) -> None:
    """The steps compute, and nearly half of the run is evaluation."""
    evaluations_s = [10.0, 15.0]
    aggregator = serving()
    script_ms = int(1000 * (30 + sum(evaluations_s)))
    rank = aggregator.rank(clock=(monotonic_ns(), time.time_ns()), script_ms=script_ms)
    send_training(rank, evaluations_s)

    def summary() -> str:
        with aggregator.store() as reader:
            event = reader.last_event("verdict")
            return "" if event is None else str(event.data["verdict"]["summary"])

    # The time of the run continues, also before the first verdict.
    eventually(lambda: re.match(r"\d\d % of the run's .+ is evaluation: 2 times 12 s", summary()))
    rank.close("done")
