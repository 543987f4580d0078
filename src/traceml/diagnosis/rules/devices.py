"""Devices that report faults (XID events, memory errors), compute with a lowered clock, or have programs of others."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from traceml.diagnosis.facts.device_events import GpuHealth
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.machine_use import POWER_LIMIT, SET_LIMIT, LoweredClock
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, Severity
from traceml.diagnosis.steps.own_work import COMPUTE
from traceml.diagnosis.steps.speedup import speedup_of_share
from traceml.formatting import count_text, percent_text, plural

__all__ = ["device_contention", "device_faults", "throttled", "without_changes_by_others"]

_BUSY_SHARE = 0.8
"""A device that computes for less of the time has room for both."""
_MAX_SHARE = 0.9
# NVIDIA's catalog of XID errors. Those that only follow the end of a process (43, 45) are left out.
_BY_PROGRAM = {13: "a kernel of the program failed", 31: "a kernel of the program used an invalid address"}
_BY_HARDWARE = {
    48: "a memory error that ECC could not correct",
    63: "memory is to be replaced by spare rows",
    64: "memory could not be replaced by spare rows",
    74: "an NVLink error",
    79: "the device has fallen off the bus",
    92: "many memory errors that were corrected",
    94: "a memory error that ended one program",
    95: "a memory error that may have hit all programs",
    119: "its firmware did not answer",
    120: "its firmware failed",
}
_RESET = "Have the device reset (nvidia-smi --gpu-reset, or a reboot of its host), and train on another one until then"


def device_faults(facts: JobFacts) -> Finding | None:
    """Return the finding about faults of devices, about the worst one."""
    found = [(severity, each) for each in facts.health.devices.values() if (severity := _severity(each)) is not None]
    if not found:
        return None

    severity, worst = max(found, key=lambda each: (each[0] is Severity.CRITICAL, len(each[1].xids)))
    return Finding.of(
        Kind.DEVICE_FAULT,
        severity=severity,
        summary=f"GPU {worst.index}{facts.of_host(worst.rank)}: {'; '.join(_faults(worst, facts.resumes_at))}.",
        next=_advice(worst, severity),
        evidence={
            "devices": sorted({each.index for _, each in found}),
            "xids": [xid for xid, _ in worst.xids],
            "ecc_errors": worst.ecc_errors,
            "new_ecc_errors": worst.new_errors,
            "remap_pending": worst.remap_pending > 0,
            "remap_failed": worst.remap_failed > 0,
        },
    )


def _severity(health: GpuHealth) -> Severity | None:
    numbers = {xid for xid, _ in health.xids}
    if numbers & _BY_HARDWARE.keys() or health.new_errors or health.remap_failed > 0:
        return Severity.CRITICAL

    return Severity.WARNING if numbers & _BY_PROGRAM.keys() or health.remap_pending > 0 else None


def _faults(health: GpuHealth, resumes_at: int) -> list[str]:
    words = [
        f"XID {xid} ({text}){'' if step < 0 else f' in step {count_text(step + resumes_at)}'}"
        for xid, step in dict(health.xids).items()
        if (text := _BY_HARDWARE.get(xid) or _BY_PROGRAM.get(xid))
    ]
    if health.new_errors:
        words.append(f"{plural(health.new_errors, 'memory error')} that ECC could not correct since the run began")

    if health.remap_failed > 0:
        words.append("no spare rows are left to replace damaged memory")
    elif health.remap_pending > 0:
        words.append("damaged memory is replaced at the next reset")

    return words


def _advice(health: GpuHealth, severity: Severity) -> str:
    if severity is Severity.CRITICAL:
        return f"{_RESET}; the kernel's log has more (dmesg, NVRM: Xid)."

    if health.xids:
        return "Run it with CUDA_LAUNCH_BLOCKING=1, or under compute-sanitizer, to see which kernel failed."

    return f"{_RESET}."


def throttled(facts: JobFacts) -> Finding | None:
    """Return the finding about lowered clocks, about the device that lost most."""
    highest = {key: each.max_clock_mhz for key, each in facts.health.devices.items() if each.max_clock_mhz > 0}
    clocks = facts.samples.lowered_clocks() or facts.samples.capped_clocks(highest)
    # At the power limit that a device is made for, a lower clock is usual.
    usual = {key for key, each in facts.health.devices.items() if each.has_default_power}
    found = [(rank, one) for rank, one in clocks if one.reason != POWER_LIMIT or (rank, one.index) not in usual]
    if not found:
        return None

    rank, worst = max(found, key=lambda each: (each[1].lost, each[1].share))
    instead = "" if worst.usual_mhz is None else f" instead of {worst.usual_mhz:.0f}"
    return Finding.of(
        Kind.THROTTLED,
        summary=(
            f"In {percent_text(worst.share)} of the samples in which it computed, GPU {worst.index}"
            f"{facts.of_host(rank)} ran at {worst.clock_mhz:.0f} MHz{instead}, because of: "
            f"{worst.reason}{_at(worst)}."
        ),
        next=_for_clock(worst.reason),
        evidence={
            "devices": sorted({one.index for _, one in found}),
            "reason": worst.reason,
            "share": worst.share,
            "clock_mhz": worst.clock_mhz,
            **known_facts(usual_clock_mhz=worst.usual_mhz),
            "temperature_c": worst.temperature_c,
            "power_w": worst.power_w,
        },
    )


def _at(worst: LoweredClock) -> str:
    known = [f"{worst.temperature_c:.0f} C"] if worst.temperature_c > 0 else []
    known += [f"{worst.power_w:.0f} W"] if worst.power_w > 0 else []
    return f" ({', '.join(known)})" if known else ""


def _for_clock(reason: str) -> str:
    if reason.startswith("temperature"):
        return "Look at the cooling of the host (fans, airflow, other jobs on it), or train on another one."

    if reason == SET_LIMIT:
        return "Ask who set the limit (nvidia-smi -q -d CLOCK), and lift it: nvidia-smi -rgc, and -rac."

    if reason == POWER_LIMIT:
        return "Compare the device's power limit with that of others (nvidia-smi -q -d POWER), and ask who lowered it."

    return "Look at the host's power supply and cooling (nvidia-smi -q -d PERFORMANCE), and train on another one."


def device_contention(facts: JobFacts) -> Finding | None:
    """Return the finding about devices that other programs use, about the one that has least left."""
    found = [
        (rank, each)
        for rank, each in facts.samples.shared_devices()
        if each.others >= WARNING_SHARE and each.utilization >= _BUSY_SHARE
    ]
    if not found:
        return None

    rank, worst = max(found, key=lambda each: each[1].others)
    where, share = f"GPU {worst.index}{facts.of_host(rank)}", worst.others
    return Finding.of(
        Kind.DEVICE_CONTENTION,
        summary=(
            f"Kernels of other programs ran on {where} for {percent_text(worst.others)} of the time spent in "
            f"steps. It computed for {percent_text(worst.utilization)} of that time, and does one program's work "
            "at a time."
        ),
        next=(
            "See which programs these are (nvidia-smi), and end them, or train on a device that nobody uses "
            "(CUDA_VISIBLE_DEVICES)."
        ),
        evidence={
            "devices": sorted({each.index for _, each in found}),
            "others_share": worst.others,
            "device_busy_share": worst.utilization,
        },
        cost_share=share,
        speedup_if_fixed=speedup_of_share(min(share, _MAX_SHARE)),
    )


def without_changes_by_others(timing: Sequence[Finding], contention: Sequence[Finding]) -> list[Finding]:
    """Return findings about times of steps; computation that is longer at times is a remark beside other programs."""
    if not contention:
        return list(timing)

    return [
        replace(each, severity=Severity.INFO)
        if each.kind in (Kind.SLOWDOWN, Kind.JITTER) and each.phase in COMPUTE and "function" not in each.evidence
        else each
        for each in timing
    ]
