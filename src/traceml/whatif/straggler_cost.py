"""Cost of stragglers in a job, and who they are: slowdowns by kind of operation, data-parallel rank, stage, worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from traceml.errors import TraceEmptyError
from traceml.whatif.causes import cause_of
from traceml.whatif.operations import JobTrace, Layout, reported_kind
from traceml.whatif.simulation import Choice, Simulator

__all__ = ["SCHEMA", "WhatIf", "explain_job"]

SCHEMA = "traceml.whatif/1"
_WORST_PERCENT = 3  # of the workers, at least one
_ALIKE = 0.5  # of the excess of the slowest worker: others of the 3 % are not to blame
_NOTHING_LOST = 1e-6  # of the ideal step: rounding

Key = TypeVar("Key")


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of stragglers in a job.

    Attributes:
        schema: name and version of this form.
        job: how the ranks of the job divide the work.
        steps: number of steps that were simulated.
        steps_left_out: steps with other operations than most, which were not.
        recorded_step_s: mean step time as recorded, seconds.
        simulated_step_s: mean step time of the simulation with recorded durations, seconds.
        ideal_step_s: mean step time when all operations of a kind take the same time, seconds.
        slowdown: `simulated_step_s / ideal_step_s`, S of the paper.
        by_optype: slowdown when operations of this kind alone keep their recorded durations.
        by_dp_rank: the same for the operations of a data-parallel rank.
        by_stage: the same for those of a pipeline stage.
        by_worker: score of a worker, by `dp_rank,stage`: the smaller one of its data-parallel rank's and its stage's.
        worst_workers: the 3 % of the workers with the highest scores, at least one, as ranks.
        worker_share: share of the lost time that these explain; None without lost time.
        stage_share: share of the lost time that the last stage explains; None without lost time.
        cause: the result in words.
    """

    schema: str
    job: Layout
    steps: int
    steps_left_out: int
    recorded_step_s: float
    simulated_step_s: float
    ideal_step_s: float
    slowdown: float
    by_optype: dict[str, float]
    by_dp_rank: dict[int, float]
    by_stage: dict[int, float]
    by_worker: dict[str, float]
    worst_workers: list[int]
    worker_share: float | None
    stage_share: float | None
    cause: str


def explain_job(simulator: Simulator) -> WhatIf:
    """Simulate a job without its stragglers.

    Raises:
        TraceEmptyError: a step takes no time.
    """
    job = simulator.job
    shape = (len(job.operations), len(job.dp_ranks))
    whole, nothing = np.ones(shape, bool), np.zeros(shape, bool)
    kinds = [reported_kind(operation.kind) for operation in job.operations]
    stages = [operation.stage for operation in job.operations]
    groups = [
        *(_rows_of(kinds, kind, shape) for kind in sorted(set(kinds))),
        *(_columns_of(place, shape) for place in range(len(job.dp_ranks))),
        *(_rows_of(stages, stage, shape) for stage in job.stages),
    ]
    simulated, ideal, *rest = simulator.mean_step_s(np.stack([whole, nothing, *groups])).tolist()
    if ideal <= 0:
        raise TraceEmptyError("the operations of the trace take no time: durations are 0")

    scores = iter([seconds / ideal for seconds in rest])
    by_kind = {kind: next(scores) for kind in sorted(set(kinds))}
    by_dp_rank = {dp_rank: next(scores) for dp_rank in job.dp_ranks}
    by_stage = {stage: next(scores) for stage in job.stages}
    workers = {
        (dp_rank, stage): min(by_dp_rank[dp_rank], by_stage[stage]) for dp_rank in job.dp_ranks for stage in job.stages
    }
    count = -(-len(workers) * _WORST_PERCENT // 100)
    worst = sorted(workers, key=lambda worker: (-workers[worker], job.rank_of(*worker)))[:count]
    named = [worker for worker in worst if workers[worker] - 1 >= _ALIKE * (workers[worst[0]] - 1)]
    without = [~_workers_of(job, worst), ~_rows_of(stages, job.stages[-1], shape), ~_workers_of(job, named)]
    lost = simulated - ideal if simulated > (1 + _NOTHING_LOST) * ideal else None
    shares = [lost and (simulated - seconds) / lost for seconds in simulator.mean_step_s(np.stack(without)).tolist()]
    return WhatIf(
        schema=SCHEMA,
        job=job.layout,
        steps=len(job.steps),
        steps_left_out=job.steps_left_out,
        recorded_step_s=float(job.step_times_s().mean()),
        simulated_step_s=simulated,
        ideal_step_s=ideal,
        slowdown=simulated / ideal,
        by_optype=_descending(by_kind),
        by_dp_rank=_descending(by_dp_rank),
        by_stage=_descending(by_stage),
        by_worker=_descending({f"{dp_rank},{stage}": score for (dp_rank, stage), score in workers.items()}),
        worst_workers=[job.rank_of(*worker) for worker in worst],
        worker_share=shares[0],
        stage_share=shares[1],
        cause=cause_of(
            job,
            slowdown=simulated / ideal,
            by_kind=by_kind,
            worst=named,
            worst_share=shares[2],
            worker_share=shares[0],
            stage_share=shares[1],
        ),
    )


def _rows_of(labels: Sequence[object], label: object, shape: tuple[int, int]) -> Choice:
    return np.broadcast_to(np.array([each == label for each in labels])[:, None], shape)


def _columns_of(place: int, shape: tuple[int, int]) -> Choice:
    return np.broadcast_to(np.arange(shape[1]) == place, shape)


def _workers_of(job: JobTrace, workers: Iterable[tuple[int, int]]) -> Choice:
    chosen = set(workers)
    return np.array(
        [[(dp_rank, operation.stage) in chosen for dp_rank in job.dp_ranks] for operation in job.operations]
    )


def _descending(scores: dict[Key, float]) -> dict[Key, float]:
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
