"""A run next to earlier runs of its model."""

from __future__ import annotations

import numpy as np
import pytest

from tests.runs.fleet.fabricated_fleet import PHASES_MS, fleet_report
from traceml.runs.fleet.fleet_dataset import FleetDataset
from traceml.runs.fleet.fleet_runs import read_runs
from traceml.runs.fleet.phase_history import limit_of, run_history


@pytest.fixture
def history(tmp_path):
    """Write reports, read them back, and compare the last one with the others."""

    def compare(reports):
        dataset = FleetDataset(tmp_path / "fleet")
        for report in reports:
            dataset.add(report)

        runs = read_runs(dataset.files()).runs
        return run_history(runs[-1], runs)

    return compare


def earlier(count, **facts):
    random = np.random.default_rng(1)
    return [fleet_report(number, random=random, **facts) for number in range(count)]


def outcomes(found):
    return {phase.phase: phase.outcome for phase in found.phases}


def test_a_slower_phase_is_reported(history):
    """And the step with it; the others are as usual."""
    found = history([*earlier(20), fleet_report(20, factors={"input_wait": 5.0})])

    assert outcomes(found) == {"step": "slower", "input_wait": "slower"} | dict.fromkeys(
        PHASES_MS.keys() - {"input_wait"}, "same"
    )
    phase = next(phase for phase in found.phases if phase.phase == "input_wait")
    assert phase.change == pytest.approx(4, abs=0.1)
    assert phase.low_ms < phase.usual_ms < phase.high_ms < phase.mean_ms
    assert (found.runs, found.others, found.phases[0].phase) == (20, 0, "step")


def test_a_faster_phase_is_reported(history):
    """An update may have helped."""
    found = history([*earlier(20), fleet_report(20, factors={"forward": 0.5})])

    assert (outcomes(found)["step"], outcomes(found)["forward"]) == ("faster", "faster")


def test_a_run_as_usual(history):
    """Every phase is."""
    assert set(outcomes(history(earlier(21))).values()) == {"same"}


def test_a_new_phase_has_no_change(history):
    """It is slower than nothing, without a share."""
    report = fleet_report(20)
    for phase in report.phases:
        phase.phase = {"optimizer": "checkpoint"}.get(phase.phase, phase.phase)

    phases = {phase.phase: phase for phase in history([*earlier(20), report]).phases}
    assert (phases["checkpoint"].change, phases["checkpoint"].outcome) == (None, "slower")
    assert (phases["optimizer"].mean_ms, phases["optimizer"].outcome) == (0, "faster")


def test_earlier_runs_of_the_same_id_count(history):
    """As those of a nightly job, whose id is always the same."""
    assert history(earlier(21, id="nightly")).runs == 20


@pytest.mark.parametrize(
    "other", [{"batch_size": 64}, {"hosts": ["a", "b"]}, {"world_size": 3}, {"command": "other.py"}, {"project": "nlp"}]
)
def test_only_runs_of_the_same_work_count(history, other):
    """Others of the script and project are counted; a step of theirs is other work."""
    found = history([*earlier(20, **other), fleet_report(20)])

    assert (found.runs, found.phases) == (0, [])
    assert found.others == (0 if {"command", "project"} & other.keys() else 20)


def test_too_few_runs_tell_nothing(history):
    """Seven, or runs of few steps; and a run of few steps is not compared."""
    assert history([*earlier(7), fleet_report(7)]).phases == []
    assert history([*earlier(20, steps=10), fleet_report(20)]).runs == 0
    assert history([*earlier(20), fleet_report(21, steps=10)]).phases == []


def test_later_runs_are_no_history(tmp_path):
    """An older run is compared with those before it."""
    dataset = FleetDataset(tmp_path)
    for report in earlier(21):
        dataset.add(report)

    runs = read_runs(dataset.files()).runs
    assert run_history(runs[10], runs).runs == 10


def _medians(values):
    """Return the median of each row; `np.median` takes twenty times as long for short rows."""
    count = values.shape[1]
    return np.sort(values, axis=1)[:, (count - 1) // 2 : count // 2 + 1].mean(axis=1)


@pytest.mark.parametrize("count", [8, 12, 20, 50])
def test_one_healthy_run_in_a_thousand_is_beyond_the_limit(count):
    """Of 200,000 histories with normal noise, by the rule's limit."""
    random = np.random.default_rng(count)
    values = random.normal(size=(200_000, count + 1))
    usual = _medians(values[:, :-1])
    deviation = 1.4826 * _medians(np.abs(values[:, :-1] - usual[:, None]))
    beyond = np.mean(np.abs(values[:, -1] - usual) > limit_of(count) * deviation)

    assert 0.0005 < beyond < 0.0016
