"""Time that the aggregator spends on the stores of its runs."""

from __future__ import annotations

import pytest

from tests.aggregator.conftest import step_rows
from tests.aggregator.test_registry import hello, join
from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.aggregator import Aggregator


@pytest.mark.parametrize("count", [1, 3])
def test_open_runs_share_the_time_of_maintenance(tmp_path, monkeypatch, count):
    """Whatever their number, they keep the aggregator from its ranks for the same time, after a tick and beside."""
    budgets: list[float] = []
    monkeypatch.setattr(ActiveRun, "maintain", lambda _run, budget_s, _cursors: budgets.append(budget_s))
    aggregator = Aggregator(tmp_path / "runs", "token", delivery_nice=0)
    joined = [join(aggregator.registry, hello(run=f"job{number}")) for number in range(count)]
    for run, stream in joined:
        run.ingest.take(stream, "steps", 0, 1, step_rows(0, 1))

    aggregator._tick()
    after_tick = sum(budgets)
    for run, _ in joined:
        aggregator._watch_run(run, diagnose=False)
        run.close()

    assert len(budgets) == 2 * count
    assert after_tick == pytest.approx(0.015)
    assert sum(budgets) == pytest.approx(2 * after_tick)
