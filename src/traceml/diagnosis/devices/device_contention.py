"""Devices on which other programs compute: theirs and the training's kernels take turns."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, Severity
from traceml.diagnosis.steps.own_work import COMPUTE
from traceml.diagnosis.steps.speedup import speedup_of_share
from traceml.formatting import percent_text

__all__ = ["device_contention", "without_changes_by_others"]

_BUSY_SHARE = 0.8
"""A device that computes for less of the time has room for both."""
_MAX_SHARE = 0.9


def device_contention(facts: JobFacts) -> list[Finding]:
    """Return the finding about devices that other programs use, about the one that has least left."""
    found = [
        (rank, each)
        for rank, each in facts.samples.shared_devices()
        if each.others >= WARNING_SHARE and each.utilization >= _BUSY_SHARE
    ]
    if not found:
        return []

    rank, worst = max(found, key=lambda each: each[1].others)
    where, share = f"GPU {worst.index}{facts.of_host(rank)}", min(worst.others, _MAX_SHARE)
    return [
        Finding.of(
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
            speedup_if_fixed=speedup_of_share(share),
        )
    ]


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
