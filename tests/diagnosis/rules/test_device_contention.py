"""Findings about devices on which other programs compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from tests.diagnosis.fabricated import Job, window_of
from traceml.database.schema import GPU, PROCESS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
SECONDS = np.arange(30)


def shared(others_pct: ArrayLike, busy_pct: ArrayLike = 99.0) -> MachineSamples:
    """Return samples of GPU 2, one per second, in which ten steps are made."""
    gpu, process = np.zeros(len(SECONDS), GPU.dtype), np.zeros(len(SECONDS), PROCESS.dtype)
    for rows in (gpu, process):
        rows["t_ns"] = SECONDS * 10**9

    process["step"] = SECONDS * 10
    gpu["index"], gpu["others_pct"], gpu["utilization_pct"] = 2, others_pct, busy_pct
    machine = MachineSamples()
    machine.add(GPU.name, 0, gpu)
    machine.add(PROCESS.name, 0, process)
    return machine


def found(machine: MachineSamples) -> list[Finding]:
    return diagnose(window_of(ALONE), JobFacts(samples=machine))


def test_programs_that_compute_on_the_device_are_reported() -> None:
    """Before advice on computation, which would change nothing."""
    first, *_ = found(shared(np.where(SECONDS >= 15, 60.0, 0.0)))

    assert first.kind is Kind.DEVICE_CONTENTION
    assert first.headline == "Other programs compute on GPU 2: 31 % of step time"
    assert "GPU 2 for 31 % of the time" in first.summary
    assert first.evidence["devices"] == [2]
    assert first.severity is Severity.CRITICAL


def test_the_headline_has_the_share_of_the_sentence() -> None:
    """Only the gain is capped."""
    first, *_ = found(shared(96.0))

    assert first.headline == "Other programs compute on GPU 2: 96 % of step time"
    assert "GPU 2 for 96 % of the time" in first.summary
    assert first.speedup_if_fixed == pytest.approx(10)


@pytest.mark.parametrize(
    "machine",
    [
        shared(0.0),
        shared(-1.0),
        shared(5.0),
        shared(30.0, 60.0),
        shared(np.where(SECONDS < 3, 60.0, -1.0)),
        MachineSamples(),
    ],
    ids=["alone", "not known", "little", "a device with room for both", "few samples", "no device"],
)
def test_what_leaves_the_device_to_the_training_is_silent(machine: MachineSamples) -> None:
    """A display, a monitor, a notebook that only holds memory."""
    assert Kind.DEVICE_CONTENTION not in [each.kind for each in found(machine)]


def slower(own: dict[str, np.ndarray[Any, Any]], _random: np.random.Generator) -> None:
    """Forward and backward take three times as long in the second half."""
    for part in ("forward", "backward"):
        own[part][:, 400:] *= 3.0


def test_steps_that_became_slower_then_are_a_remark() -> None:
    """Computation takes longer while another program has its turns."""
    window = window_of(Job(steps=800, ranks=1, grouped=False), slower)
    alone = diagnose(window, JobFacts())
    beside = diagnose(window, JobFacts(samples=shared(np.where(SECONDS >= 15, 60.0, 0.0))))

    assert alone[0].kind is Kind.SLOWDOWN
    assert beside[0].kind is Kind.DEVICE_CONTENTION
    assert next(each for each in beside if each.kind is Kind.SLOWDOWN).severity is Severity.INFO
