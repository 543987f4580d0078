"""Fabricated runs: step rows of a data-parallel training, simulated event by event, with noise and a fault.

Ranks leave backward nearly together, as with gloo's ring; work after that sync point delays the next one. Tests and
`benchmarks/diagnosis_accuracy.py` use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from traceml.database.schema import STEPS, StepFlag, pack_bits
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.kept_steps import KeptSteps

MS = 1e6
PARTS = ("input_wait", "h2d", "forward", "backward", "optimizer", "checkpoint", "user", "other")


@dataclass(frozen=True)
class Job:
    """Training with its usual durations in milliseconds: `own` work per step, `comm` exposed communication.

    Attributes:
        wander: log deviation of each rank's speed, which wanders over some `wander_steps` steps.
        meets_every: in every n-th step only ranks wait for each other, in a collective of the script, as in local SGD.
        stolen: share of the run in which another program takes a rank's core, for `wander_steps` steps each.
    """

    ranks: int = 2
    steps: int = 220
    own: Mapping[str, float] = field(
        default_factory=lambda: {"input_wait": 0.3, "forward": 4.0, "backward": 8.0, "optimizer": 1.5, "other": 0.3}
    )
    comm: float = 0.8
    leave_ms: float = 0.5
    sigma: float = 0.1
    spikes: float = 0.0
    spike_ms: float = 10.0
    skew: float = 1.0
    skew_from: float = 0.0
    wander: float = 0.0
    wander_steps: int = 20
    stolen: float = 0.0
    callback_every: int = 1
    grouped: bool = True
    meets_every: int = 1

    def scaled(self, factor: float) -> Job:
        """Return the same job with all durations times `factor`."""
        return replace(
            self,
            own={part: value * factor for part, value in self.own.items()},
            comm=self.comm * factor,
            leave_ms=self.leave_ms * min(factor, 1.0),
        )


Fault = Callable[[dict[str, np.ndarray[Any, Any]], np.random.Generator], None]
"""Function that changes own work in place: part -> milliseconds, rank x step."""


def adds(part: str, ms: float, ranks: tuple[int, ...] | None = None, every: int = 1, chance: float = 1.0) -> Fault:
    """Return a fault: `ms` more in `part` of some ranks, in every n-th step, or by chance in each."""

    def fault(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        values = own.setdefault(part, np.zeros_like(own["forward"]))
        rows = range(len(values)) if ranks is None else ranks
        for row in rows:
            hit = (np.arange(values.shape[1]) % every == every // 2) & (random.random(values.shape[1]) < chance)
            values[row, hit] += ms * random.lognormal(0, 0.05, int(hit.sum()))

    return fault


def takes_turns(part: str, ms: float, ranks: tuple[int, ...]) -> Fault:
    """Return a fault that hits these ranks one after the other, one in each step."""

    def fault(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        for step in range(own[part].shape[1]):
            own[part][ranks[step % len(ranks)], step] += ms

    return fault


def at_once(part: str, ms: float, chance: float) -> Fault:
    """Return a fault that hits all ranks in the same, rare steps."""

    def fault(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        hit = random.random(own["forward"].shape[1]) < chance
        own.setdefault(part, np.zeros_like(own["forward"]))[:, hit] += ms

    return fault


def rows_of(job: Job, *faults: Fault, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Return each rank's step rows."""
    random = np.random.default_rng(seed)
    own = _own_work(job, random)
    for fault in faults:
        fault(own, random)

    wait = _waits(job, own, random) if job.grouped else np.zeros_like(own["forward"])
    return [_rows(job, rank, own, wait) for rank in range(job.ranks)]


def window_of(job: Job, *faults: Fault, seed: int = 0, last: int = 1000) -> AlignedSteps:
    """Return the aligned steps of a fabricated run."""
    kept = KeptSteps(1024, job.ranks)
    for rank, rows in enumerate(rows_of(job, *faults, seed=seed)):
        kept.scatter(np.full(len(rows), rank), rows)

    return kept.aligned(last=last)


def _own_work(job: Job, random: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    shape = (job.ranks, job.steps)
    own = {part: ms * random.lognormal(-(job.sigma**2) / 2, job.sigma, shape) for part, ms in job.own.items()}
    own = {part: np.asarray(own.get(part, np.zeros(shape))) for part in PARTS}
    if job.wander:
        speed = np.exp(job.wander * _wandering(shape, job.wander_steps, random))
        own = {part: values * speed for part, values in own.items()}

    hits = random.random(shape) < job.spikes
    if job.stolen:
        hits |= _intervals(shape, job.stolen, job.wander_steps, random) & (random.random(shape) < 0.5)

    busy = [part for part in PARTS if job.own.get(part, 0) > 0]
    weights = np.array([job.own[part] for part in busy])
    for rank, step in np.argwhere(hits):
        own[random.choice(busy, p=weights / weights.sum())][rank, step] += random.exponential(job.spike_ms)

    if job.skew != 1.0:
        start = int(job.skew_from * job.steps)
        for part in ("forward", "backward", "optimizer"):
            own[part][-1, start:] *= job.skew * random.uniform(0.9, 1.1)

    return own


def _wandering(shape: tuple[int, int], steps: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return noise of deviation 1 in each row that forgets itself over some steps."""
    kept = np.exp(-1 / steps)
    noise = random.normal(0, 1, shape)
    for step in range(1, shape[1]):
        noise[:, step] = kept * noise[:, step - 1] + (1 - kept**2) ** 0.5 * noise[:, step]

    return noise


def _intervals(
    shape: tuple[int, int], share: float, steps: int, random: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return intervals of steps in which one rank at a time loses its core."""
    found = np.zeros(shape, bool)
    for first in range(0, shape[1], steps):
        if random.random() < share:
            found[random.integers(shape[0]), first : first + steps] = True

    return found


def _waits(job: Job, own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return each rank's waiting inside backward, by playing the steps through."""
    before = own["input_wait"] + own["h2d"] + own["forward"] + own["backward"] + own["user"] + own["checkpoint"]
    after = own["optimizer"] + own["other"]
    comm = job.comm * random.lognormal(0, max(job.sigma, 0.1), job.steps)
    leave = random.exponential(max(job.leave_ms, 1e-6), before.shape)
    first = leave.min(axis=0)
    if job.meets_every == 1:  # what was before the last sync point delays all ranks alike
        since = before + np.pad(leave + after, ((0, 0), (1, 0)))[:, :-1]
        return np.maximum.reduce(since) - since + comm + leave - first

    now = np.zeros(job.ranks)
    wait = np.zeros((job.steps, job.ranks))
    columns = zip(before.T, after.T, comm, leave.T, first, wait, strict=True)
    for step, (work, later, exchange, leaves, earliest, waited) in enumerate(columns, 1):
        arrived = now + work
        if step % job.meets_every:
            now = arrived + later
            continue

        left = np.maximum.reduce(arrived) + exchange + leaves - earliest
        np.subtract(left, arrived, out=waited)
        now = left + later

    return wait.T


def _rows(
    job: Job, rank: int, own: dict[str, np.ndarray[Any, Any]], wait: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    rows = np.zeros(job.steps, STEPS.dtype)
    rows["step"] = np.arange(job.steps)
    for part in PARTS[:-1]:
        rows[f"{part}_ns"] = own[part][rank] * MS

    rows["backward_ns" if job.meets_every == 1 else "comm_ns"] += (wait[rank] * MS).astype(np.int64)
    phases = sum(rows[f"{part}_ns"] for part in ("comm", *PARTS[:-1]))
    rows["total_ns"] = phases + (own["other"][rank] * MS).astype(np.int64)
    rows["t_end_ns"] = np.cumsum(rows["total_ns"])
    measured = (
        (np.arange(job.steps) % job.callback_every == 0) & job.grouped if job.callback_every else np.zeros(1, bool)
    )
    rows["backward_own_ns"] = np.where(measured, (own["backward"][rank] * MS).astype(np.int64), -1)
    rows["bits"] = np.where(measured, pack_bits(1, StepFlag.CALLBACK, 0), pack_bits(1, 0, 0))
    return rows
