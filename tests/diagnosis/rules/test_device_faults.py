"""Findings about devices that report faults, and reports that are none."""

from __future__ import annotations

import pytest

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.rules.devices import device_faults

GOOD = {"ecc_errors": 0, "remap_pending": 0, "remap_failed": 0, "max_clock_mhz": 1980}


def facts(*rows: dict[str, object], hosts: tuple[str, ...] = ("h0",)) -> JobFacts:
    builder = JobFactsBuilder(len(hosts))
    for rank, host in enumerate(hosts):
        builder.host(rank, host)

    for row in rows:
        builder.info(len(hosts) - 1, {"kind": "gpu_health", "index": 3, "step": 57, **row})

    return builder.build()


def found(*rows: dict[str, object], hosts: tuple[str, ...] = ("h0",)) -> Finding:
    return device_faults(facts(*rows, hosts=hosts))


def test_an_event_of_the_hardware_is_critical() -> None:
    """With its meaning, its step, and the host where there are several."""
    finding = found(GOOD, {"xid": 79}, {"xid": 43}, hosts=("h0", "h1"))

    assert (finding.kind, finding.severity, finding.is_urgent) == (Kind.DEVICE_FAULT, Severity.CRITICAL, True)
    assert finding.summary == "GPU 3 of h1: XID 79 (the device has fallen off the bus) in step 57."
    assert finding.headline == "GPU 3 reports a fault"
    assert finding.evidence["xids"] == [79, 43]
    assert "reset" in finding.next


def test_an_event_of_the_program_is_a_warning() -> None:
    """The device is sound, and a reset would not help."""
    finding = found(GOOD, {"xid": 31, "step": -1})

    assert finding.severity is Severity.WARNING
    assert finding.summary == "GPU 3: XID 31 (a kernel of the program used an invalid address)."
    assert "compute-sanitizer" in finding.next


def test_memory_errors_of_this_run_are_reported() -> None:
    """Those since its begin; earlier ones are not its concern."""
    finding = found({**GOOD, "ecc_errors": 4}, {**GOOD, "ecc_errors": 6, "remap_pending": 1})

    assert finding.severity is Severity.CRITICAL
    assert "2 memory errors that ECC could not correct since the run began" in finding.summary
    assert "replaced at the next reset" in finding.summary


@pytest.mark.parametrize(
    ("row", "words", "severity"),
    [
        ({"remap_pending": 1}, "damaged memory is replaced at the next reset", Severity.WARNING),
        ({"remap_failed": 1}, "no spare rows are left", Severity.CRITICAL),
    ],
)
def test_rows_that_wait_or_fail_are_reported(row: dict[str, object], words: str, severity: Severity) -> None:
    """Also without an error in this run."""
    finding = found({**GOOD, **row})

    assert words in finding.summary
    assert finding.severity is severity


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [GOOD],
        [{**GOOD, "ecc_errors": 7}],
        [dict.fromkeys(GOOD, -1)],
        [{"xid": 43}, {"xid": 45}],
        [{"index": "3", "xid": 79}],
    ],
    ids=["nothing", "sound", "old errors", "unknown", "end of a process", "damaged"],
)
def test_what_is_no_fault_is_silent(rows: list[dict[str, object]]) -> None:
    """Devices without ECC, and events that only follow the end of a process."""
    assert device_faults(facts(*rows)) is None
