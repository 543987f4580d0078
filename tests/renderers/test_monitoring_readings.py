"""Values of a run's metrics for monitoring systems."""

from __future__ import annotations

import re

import pytest

from tests.renderers.reports import finding, killed_rank, report, slow_rank, thousand_ranks
from traceml.renderers.monitoring_metrics import BaseUnit, Instrument, Instruments
from traceml.renderers.monitoring_readings import MAX_RANKS, readings
from traceml.runs.report.report_types import GpuSection, HostSection, Report, TelemetrySection


def values(of: Report, instrument: Instrument, **kwargs: int) -> dict[tuple[str, ...], float]:
    """Return the values of one metric by its labels without the run."""
    return {each.labels[1:]: each.value for each in readings(of, **kwargs) if each.instrument is instrument}


def test_every_value_has_its_labels_and_no_series_is_twice() -> None:
    """Label values are as many as label names, and the first is the run."""
    for made in (slow_rank(), killed_rank(), thousand_ranks(), Report.empty("r")):
        found = readings(made)
        assert {each.labels[0] for each in found} == {made.run.id}
        assert all(len(each.labels) == len(each.instrument.labels) for each in found)
        keys = [(each.instrument, each.labels) for each in found]
        assert len(set(keys)) == len(keys)


def test_times_are_the_reports_in_seconds() -> None:
    """The figures of the report are divided by 1,000, and by nothing else."""
    made = slow_rank()
    phases = {phase.phase: phase for phase in made.phases}
    by_rank = values(made, Instruments.PHASE)

    assert values(made, Instruments.STEP) == {(): pytest.approx(made.steps.mean_ms / 1e3)}
    for name, phase in phases.items():
        assert values(made, Instruments.PHASE_MEAN)[name,] == pytest.approx(phase.mean_ms / 1e3)
        for mean in phase.by_rank:
            assert by_rank[str(mean.rank), name] == pytest.approx(mean.mean_ms / 1e3)


def test_the_verdict_is_a_label_and_only_the_verdict() -> None:
    """Findings after the verdict have a cost and no verdict series."""
    made = slow_rank()

    assert values(made, Instruments.VERDICT) == {("COMPUTE_STRAGGLER", "critical"): 1.0}
    costs = values(made, Instruments.COST)
    assert costs["COMPUTE_STRAGGLER", "critical"] == pytest.approx(made.verdict.cost_share)
    assert {kind for kind, _ in costs} == {"COMPUTE_STRAGGLER", "JITTER"}


def test_findings_of_one_kind_count_once_by_the_largest() -> None:
    """Two series with the same labels would make the whole answer invalid."""
    twice = tuple(finding("JITTER", severity="warning", cost_share=share) for share in (0.1, 0.3))
    made = report([{"forward": 5.0}], finding("JITTER", severity="warning", cost_share=0.2), others=twice)

    assert values(made, Instruments.COST) == {("JITTER", "warning"): 0.3}


def test_many_ranks_have_statistics_and_no_series_of_their_own() -> None:
    """The number of series does not grow with the ranks above the limit."""
    made = thousand_ranks()
    forward = next(phase for phase in made.phases if phase.phase == "forward")
    means = [mean.mean_ms / 1e3 for mean in forward.by_rank]

    assert len(made.ranks) > MAX_RANKS
    assert not values(made, Instruments.PHASE)
    assert not values(made, Instruments.RANK_STEPS)
    spread = values(made, Instruments.PHASE_SPREAD)
    assert spread["forward", "min"] == pytest.approx(min(means))
    assert spread["forward", "max"] == pytest.approx(max(means))
    assert len(readings(made)) < 200
    assert values(made, Instruments.PHASE, most_ranks=5000)


def test_what_is_not_known_has_no_value() -> None:
    """A run before its first row has neither durations nor rates, and no false zero."""
    found = {each.instrument for each in readings(Report.empty("r"))}

    assert Instruments.VERDICT in found
    assert not found & {
        Instruments.STEP,
        Instruments.STEP_RATE,
        Instruments.OVERHEAD,
        Instruments.LOST,
    }
    assert not found & {Instruments.SAMPLE_RATE, Instruments.TOKEN_RATE, Instruments.GOODPUT}


def test_telemetry_is_in_base_units() -> None:
    """Microseconds become seconds, counts stay."""
    made = report([{"forward": 5.0}])
    made.telemetry = TelemetrySection(rows_stored=10, rows_lost=3, overhead_us_per_step=4.0, failures={"display": 2})

    assert values(made, Instruments.OVERHEAD) == {(): pytest.approx(4e-6)}
    assert values(made, Instruments.LOST) == {(): 3}
    assert values(made, Instruments.FAILURES) == {("display",): 2}


def test_gpus_and_hosts_are_in_base_units() -> None:
    """Percents become ratios, and each GPU has its host and index as labels."""
    made = report([{"forward": 5.0}])
    gpu = GpuSection(
        index=3, utilization_pct=40.0, memory_used_bytes=10, memory_total_bytes=20, temperature_c=60.0, power_w=250.0
    )
    made.system.hosts = [HostSection(host="n1", cpu_pct=50.0, memory_pct=25.0, gpus=[gpu, GpuSection(index=4)])]

    assert values(made, Instruments.HOST_CPU) == {("n1",): 0.5}
    assert values(made, Instruments.HOST_MEMORY) == {("n1",): 0.25}
    assert values(made, Instruments.GPU_USE) == {("n1", "3"): pytest.approx(0.4)}
    of_gpu = (
        Instruments.GPU_MEMORY,
        Instruments.GPU_SIZE,
        Instruments.GPU_HEAT,
        Instruments.GPU_POWER,
    )
    assert [values(made, each) for each in of_gpu] == [{("n1", "3"): number} for number in (10, 20, 60.0, 250.0)]


def test_names_are_unique_and_follow_the_rules_of_prometheus() -> None:
    """A name ends in its base unit; only counters end in `_total`; no unit that is not a base unit occurs."""
    names = [each.prometheus_name for each in Instruments.all()]

    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"traceml_[a-z][a-z0-9_]*", name) for name in names)
    assert all(name.endswith("_total") == each.counter for each, name in zip(Instruments.all(), names, strict=True))
    assert not [name for name in names if re.search(r"_(ms|us|ns|kb|mb|gb|pct|percent|minutes)(_|$)", name)]
    assert all(each.unit is not BaseUnit.NONE for each in Instruments.all() if each.stem.endswith(("_peak", "_share")))
