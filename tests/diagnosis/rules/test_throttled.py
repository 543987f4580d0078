"""Findings about clocks that the driver has lowered."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, window_of
from traceml.database.schema import GPU
from traceml.diagnosis.facts.device_events import GpuHealthHistory
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
IDLE, APPLICATION, POWER, SLOWDOWN, THERMAL = 0x1, 0x2, 0x4, 0x8, 0x20


def samples(reasons: int, *, low_mhz: int = 1200, share: float = 0.5, busy_pct: float = 98.0) -> MachineSamples:
    """Return 40 samples of GPU 3, in the first of which the clock is lowered."""
    rows = np.zeros(40, GPU.dtype)
    low = np.arange(40) < 40 * share
    rows["t_ns"], rows["index"], rows["utilization_pct"] = np.arange(40) * 10**9, 3, busy_pct
    rows["sm_clock_mhz"] = np.where(low, low_mhz, 1980)
    rows["throttle_reasons"] = np.where(low, reasons, 0)
    rows["temperature_c"], rows["power_w"] = 88.0, 400.0
    machine = MachineSamples()
    machine.add(GPU.name, 0, rows)
    return machine


def found(machine: MachineSamples, highest_mhz: int | None = None) -> list[Finding]:
    health = GpuHealthHistory()
    if highest_mhz is not None:
        health.add(0, {"index": 3, "max_clock_mhz": highest_mhz})

    facts = JobFacts(samples=machine, health=health)
    return [each for each in diagnose(window_of(ALONE), facts) if each.kind is Kind.THROTTLED]


@pytest.mark.parametrize(
    ("reasons", "words", "advice"),
    [
        (THERMAL, "temperature", "cooling"),
        (THERMAL | POWER, "temperature", "cooling"),
        (SLOWDOWN, "hardware slowdown", "power supply"),
        (POWER, "power limit", "power limit"),
    ],
)
def test_the_reason_is_reported(reasons, words, advice):
    """With the device, its clock and the usual one."""
    (finding,) = found(samples(reasons))

    assert finding.evidence["devices"] == [3]
    assert finding.evidence["reason"] == words
    assert "GPU 3 ran at 1200 MHz instead of 1980" in finding.summary
    assert advice in finding.next
    assert "GPU 3" in finding.headline


@pytest.mark.parametrize(
    "machine",
    [
        samples(IDLE),
        samples(APPLICATION),
        samples(POWER, low_mhz=1800),
        samples(THERMAL, share=0.2),
        samples(THERMAL, busy_pct=10.0),
        MachineSamples(),
    ],
    ids=["idle", "set by an application", "usual power limit", "short", "not computing", "no device"],
)
def test_what_slows_nothing_down_is_silent(machine):
    """An idle device, a clock that somebody set, and a device at its power limit are usual."""
    assert found(machine) == []


@pytest.mark.parametrize(("limit_w", "kinds"), [(700, []), (400, [Kind.THROTTLED])])
def test_the_power_limit_counts_where_somebody_has_lowered_it(limit_w: int, kinds: list[Kind]) -> None:
    """At its default, a device that computes all the time cannot keep its highest clock."""
    health = GpuHealthHistory()
    health.add(0, {"index": 3, "power_limit_w": limit_w, "default_power_limit_w": 700})
    facts = JobFacts(samples=samples(POWER), health=health)

    assert [each.kind for each in diagnose(window_of(ALONE), facts) if each.kind is Kind.THROTTLED] == kinds


def test_a_clock_limit_far_below_the_highest_clock_is_reported():
    """Somebody has set it; the device could run faster."""
    (finding,) = found(samples(APPLICATION, share=1.0), 1980)

    assert "GPU 3 ran at 1200 MHz instead of 1980, because of: a clock limit that was set" in finding.summary
    assert "nvidia-smi -rgc" in finding.next


@pytest.mark.parametrize(
    ("machine", "highest_mhz"),
    [
        (samples(APPLICATION, low_mhz=1600, share=1.0), 1980),
        (samples(0, share=1.0), 1980),
        (samples(APPLICATION, share=1.0, busy_pct=10.0), 1980),
        (samples(APPLICATION, share=1.0), -1),
    ],
    ids=["a little", "no limit", "not computing", "highest clock unknown"],
)
def test_other_clocks_are_no_limit(machine, highest_mhz):
    """A clock that is low without a set limit has other reasons."""
    assert found(machine, highest_mhz) == []
