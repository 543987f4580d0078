"""The cause of a job's slowdown in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from traceml.formatting import factor_text, percent_text
from traceml.whatif.operations import BACKWARD, COMPUTE, FORWARD, JobTrace

__all__ = ["cause_of"]

# A job with less has no stragglers worth mending; half of the lost time makes a group the cause: sections 4.1 and 5 of
# the paper.
_SLOW = 1.1
_MOST = 0.5
# Forward and backward times of micro-batches that correlate this much follow their sequences' lengths: section 5.3.
_CORRELATED = 0.9
# A stage explains as much as its one slow worker does; more work of the stage explains at least this much more.
_MORE = 0.1
_ON_ONE_WORKER = (*COMPUTE, "optimizer", "gc")

Worker = tuple[int, int]


def cause_of(
    job: JobTrace,
    *,
    slowdown: float,
    by_kind: Mapping[str, float],
    worst: Sequence[Worker],
    worst_share: float | None,
    worker_share: float | None,
    stage_share: float | None,
) -> str:
    """Return what makes a job slow, in one or two sentences.

    Args:
        slowdown: of the whole job.
        by_kind: slowdown by kind of operation.
        worst: workers to blame, as (dp_rank, stage).
        worst_share: share of the lost time that these explain; all shares are None without lost time.
        worker_share: share of it that the slowest 3 % of the workers explain.
        stage_share: share of it that the last stage explains.
    """
    if slowdown < _SLOW or worst_share is None or worker_share is None or stage_share is None:
        return f"Stragglers cost little: without any, a step would be {factor_text(slowdown)} as fast."

    if stage_share >= _MOST and _is_whole_stage(job, worst, stage_share - worker_share):
        alone = " (or its only worker is slow)" if len(job.dp_ranks) == 1 else ""
        return (
            f"The last pipeline stage, {job.stages[-1]}, explains {_capped(stage_share)} of the lost time: it has more "
            f"work than the others{alone}. Move layers from it to other stages."
        )

    if worst_share >= _MOST:
        return _slow_workers(job, worst, worst_share, by_kind)

    if (correlation := length_correlation(job)) >= _CORRELATED:
        return (
            "The micro-batches differ in work on all workers: forward and backward times go together (correlation "
            f"{correlation:.2f}), as with sequences of different lengths. Balance the lengths over micro-batches."
        )

    kind, score = max(by_kind.items(), key=lambda item: item[1])
    where = "on many workers" if kind in _ON_ONE_WORKER else "between many workers"
    return f"The duration of {kind} varies {where}: this alone makes a step {factor_text(score)} as long."


def _is_whole_stage(job: JobTrace, worst: Sequence[Worker], more: float) -> bool:
    """Return whether the last stage has more work than others, rather than slow workers.

    Args:
        more: share of the lost time that the stage explains, minus that of the workers.
    """
    if len(job.stages) == 1:
        return False  # nothing to compare it with

    whole = {(dp_rank, job.stages[-1]) for dp_rank in job.dp_ranks}
    return more >= _MORE or (more > -_MORE and whole <= set(worst))


def _slow_workers(job: JobTrace, worst: Sequence[Worker], share: float, by_kind: Mapping[str, float]) -> str:
    names = ", ".join(
        f"rank {job.rank_of(*worker)} (data-parallel rank {worker[0]}, stage {worker[1]})" for worker in worst[:3]
    )
    more = f" and {len(worst) - 3} more workers" if len(worst) > 3 else ""
    return (
        f"{names}{more} explain{'s' if len(worst) == 1 else ''} {_capped(share)} of the lost time: "
        f"{_slow_there(job, worst, by_kind)}"
    ).replace("rank", "Rank", 1)


def _slow_there(job: JobTrace, worst: Sequence[Worker], by_kind: Mapping[str, float]) -> str:
    kind, ratio = max(((kind, _ratio(job, kind, worst)) for kind in COMPUTE), key=lambda pair: pair[1])
    largest, score = max(by_kind.items(), key=lambda item: item[1])
    if ratio < _SLOW and largest not in COMPUTE:
        mend = " Collect garbage at the same steps on all workers." if largest == "gc" else ""
        return f"{largest} takes longer there, which makes a step {factor_text(score)} as long.{mend}"

    return (
        f"{kind} takes {factor_text(ratio)} as long there as on other workers. "
        "Look at the hardware of the host, or replace it."
    )


def _capped(share: float) -> str:
    return percent_text(min(share, 1.0))


def _ratio(job: JobTrace, kind: str, workers: Sequence[Worker]) -> float:
    """Return how much longer an operation takes on these workers than on the median worker."""
    means = {
        (dp_rank, stage): float(
            job.duration_s[
                [i for i, each in enumerate(job.operations) if (each.kind, each.stage) == (kind, stage)], place
            ].mean()
        )
        for place, dp_rank in enumerate(job.dp_ranks)
        for stage in job.stages
    }
    others = [mean for worker, mean in means.items() if worker not in workers] or list(means.values())
    return float(np.mean([means[worker] for worker in workers]) / np.median(others))


def length_correlation(job: JobTrace) -> float:
    """Return how much the backward times of micro-batches follow their forward times, -1..1.

    The mean over workers of the correlation over all micro-batches of all steps; the last stage, whose forward
    contains the loss, is left out where there are others.
    """
    stages = job.stages[:-1] or job.stages
    pairs = {
        (each.kind, each.stage, each.chunk, each.micro_batch): i
        for i, each in enumerate(job.operations)
        if each.stage in stages and each.kind in (FORWARD, BACKWARD)
    }
    correlations = []
    for stage in stages:
        keys = [key[1:] for key in pairs if key[0] == FORWARD and key[1] == stage and (BACKWARD, *key[1:]) in pairs]
        forwards, backwards = (job.duration_s[[pairs[kind, *key] for key in keys]] for kind in (FORWARD, BACKWARD))
        for place in range(len(job.dp_ranks)):
            both = forwards[:, place].ravel(), backwards[:, place].ravel()
            if both[0].size > 2 and min(times.std() for times in both) > 0:
                correlations.append(float(np.corrcoef(*both)[0, 1]))

    return float(np.mean(correlations)) if correlations else 0.0
