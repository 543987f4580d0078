"""Devices that compute with a lowered clock."""

from __future__ import annotations

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.machine_use import SET_LIMIT, LoweredClock
from traceml.diagnosis.findings import Finding, known
from traceml.diagnosis.kinds import Kind
from traceml.formatting import percent_text

__all__ = ["throttled"]


def throttled(facts: JobFacts) -> list[Finding]:
    """Return the finding about lowered clocks, about the device that lost most."""
    highest = {key: each.max_clock_mhz for key, each in facts.health.devices.items() if each.max_clock_mhz > 0}
    by_rank = facts.samples.lowered_clocks() or facts.samples.capped_clocks(highest)
    found = [(rank, one) for rank, several in by_rank.items() for one in several]
    if not found:
        return []

    rank, worst = max(found, key=lambda each: (each[1].lost, each[1].share))
    instead = "" if worst.usual_mhz is None else f" instead of {worst.usual_mhz:.0f}"
    return [
        Finding.of(
            Kind.THROTTLED,
            summary=(
                f"In {percent_text(worst.share)} of the samples in which it computed, GPU {worst.index}"
                f"{facts.of_host(rank)} ran at {worst.clock_mhz:.0f} MHz{instead}, because of: "
                f"{worst.reason}{_at(worst)}."
            ),
            next=_advice(worst.reason),
            evidence={
                "devices": sorted({one.index for _, one in found}),
                "reason": worst.reason,
                "share": worst.share,
                "clock_mhz": worst.clock_mhz,
                **known(usual_clock_mhz=worst.usual_mhz),
                "temperature_c": worst.temperature_c,
                "power_w": worst.power_w,
            },
        )
    ]


def _at(worst: LoweredClock) -> str:
    known = [f"{worst.temperature_c:.0f} C"] if worst.temperature_c > 0 else []
    known += [f"{worst.power_w:.0f} W"] if worst.power_w > 0 else []
    return f" ({', '.join(known)})" if known else ""


def _advice(reason: str) -> str:
    if reason.startswith("temperature"):
        return "Look at the cooling of the host (fans, airflow, other jobs on it), or train on another one."

    if reason == SET_LIMIT:
        return "Ask who set the limit (nvidia-smi -q -d CLOCK), and lift it: nvidia-smi -rgc, and -rac."

    if reason == "power limit":
        return "Compare the device's power limit with that of others (nvidia-smi -q -d POWER), and ask who lowered it."

    return "Look at the host's power supply and cooling (nvidia-smi -q -d PERFORMANCE), and train on another one."
