"""The fleet as an object: `traceml.fleet/1`, printed by `traceml fleet --json`."""

from __future__ import annotations

from typing import Literal

import msgspec

from traceml.runs.json_document import JsonDocument

__all__ = ["STEP", "FleetDocument", "HostJudgment", "PhaseHistory", "RunHistory", "SlowHost"]

STEP = "step"
"""Name of the whole step among the phases."""


class PhaseHistory(msgspec.Struct, kw_only=True):
    """A phase of a run, or the whole step (`step`), and the same in earlier runs, in milliseconds per step.

    `usual_ms` is the median of the earlier runs; from `low_ms` to `high_ms` a run is as usual. `change` is a share of
    `usual_ms`, None if that is 0.
    """

    phase: str
    mean_ms: float
    usual_ms: float
    low_ms: float
    high_ms: float
    change: float | None
    outcome: Literal["slower", "faster", "same"]


class RunHistory(msgspec.Struct, kw_only=True):
    """A run next to earlier runs of the same model.

    Attributes:
        runs: earlier runs that it is compared with: the same project, script, batch size, number of ranks, and model
            with its type, device, wrapper and compilation.
        others: earlier runs of the same script that are not, because one of these differs.
        phases: the whole step first; empty with fewer than eight earlier runs.
    """

    run: str
    project: str
    script: str
    model: str | None
    batch_size: int | None
    world_size: int
    started: float | None
    runs: int
    others: int
    phases: list[PhaseHistory]


class SlowHost(msgspec.Struct, kw_only=True):
    """A host that was among the slowest in most of its last jobs.

    Attributes:
        jobs: its last jobs that are judged.
        slow_jobs: those in which it was among the slowest.
        expected_jobs: those in which any host would be, by chance.
        chance: probability that a healthy host is as often among the slowest, times the number of judged hosts.
        excess: own work beyond the median of the job's other hosts, as a share of that: the median of its jobs.
        phase: the phase with the largest part of it in most of the slow jobs.
        last_run: the last of the slow jobs, last_started: its start, epoch seconds.
    """

    host: str
    jobs: int
    slow_jobs: int
    expected_jobs: float
    chance: float
    excess: float
    phase: str
    last_run: str
    last_started: float | None


class HostJudgment(msgspec.Struct, kw_only=True):
    """Hosts compared within their jobs.

    Attributes:
        hosts: all hosts of jobs on several hosts, judged: those with enough jobs.
        jobs: jobs on two or more hosts with enough steps.
        left_out: other jobs.
        slow: the slowest first.
    """

    hosts: int
    judged: int
    jobs: int
    left_out: int
    slow: list[SlowHost]


class FleetDocument(JsonDocument, msgspec.Struct, kw_only=True):
    """The result of `traceml fleet --json`.

    Attributes:
        dataset: its folder.
        runs: runs in it that meet the conditions, first_started, last_started: epoch seconds.
        history: the chosen run next to its history, None if the dataset is empty.
        hosts: the comparison of hosts.
        covers: what the figures cover, in sentences.
        damage: messages about files that cannot be read.
    """

    schema: Literal["traceml.fleet/1"] = "traceml.fleet/1"
    dataset: str
    runs: int
    first_started: float | None
    last_started: float | None
    history: RunHistory | None
    hosts: HostJudgment
    covers: list[str]
    damage: list[str]
