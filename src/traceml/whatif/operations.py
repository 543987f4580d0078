"""Operations of a hybrid-parallel job: their kinds, and their times as matrices over workers and steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BACKWARD", "COLLECTIVES", "COMPUTE", "FORWARD", "KINDS", "MEDIAN_KINDS", "TRANSFERS", "JobTrace", "Layout",
    "Operation", "Times", "reported_kind",
]  # fmt: skip

FORWARD, BACKWARD = "forward-compute", "backward-compute"
COMPUTE = (FORWARD, BACKWARD)
TRANSFERS = ("forward-send", "forward-recv", "backward-send", "backward-recv")
# Collectives that all data-parallel ranks join.
COLLECTIVES = ("params-all-gather", "grads-reduce-scatter", "separate-grads-all-reduce", "optimizer-clip-main-grad")
# Kinds whose ideal time is the median, which a few delays of the network do not move; of the others it is the mean.
MEDIAN_KINDS = frozenset((*TRANSFERS, *COLLECTIVES, "layernorm-grads-all-reduce", "embedding-grads-all-reduce"))
KINDS = (*COMPUTE, *sorted(MEDIAN_KINDS), "optimizer", "gc")
"""Kinds of operations whose place in a step is known."""

Times = NDArray[np.float64]


def reported_kind(kind: str) -> str:
    """Return the kind under which results show an operation: both ends of a transfer are one."""
    return f"{kind.partition('-')[0]}-pp-comm" if kind in TRANSFERS else kind


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a training step, the same in each step and on each data-parallel rank."""

    kind: str  # `optype` of the trace
    number: int  # `seq_id`, the order among operations of this kind on a worker
    stage: int  # pipeline stage
    chunk: int  # model chunk on the worker, -1 if none
    global_chunk: int  # model chunk in the whole pipeline, -1 if none
    micro_batch: int  # `mb_id`, -1 if none

    def __str__(self) -> str:
        return f"{self.kind} {self.number} of stage {self.stage}"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Division of the work over the ranks of a job, from its YAML file."""

    trial_name: str = ""
    dp_size: int = 1
    pp_size: int = 1
    tp_size: int = 1
    dsp_size: int = 1
    vpp_size: int = 1
    world_size: int = 1

    @property
    def product(self) -> int:
        """Ranks by the sizes of all dimensions; `vpp_size` divides stages, and adds none."""
        return self.dp_size * self.pp_size * self.tp_size * self.dsp_size


@dataclass(frozen=True, kw_only=True)
class JobTrace:
    """The operations of a job's steps."""

    layout: Layout  # how the ranks divide the work
    operations: tuple[Operation, ...]  # of one step of one data-parallel rank
    dp_ranks: tuple[int, ...]  # numbers of the data-parallel ranks
    steps: tuple[int, ...]  # numbers of the steps
    steps_left_out: int  # steps with other operations than most
    ranks: NDArray[np.int64]  # rank of each worker, shape (dp_ranks, stages)
    start_s: Times  # starts of operations in seconds, shape (operations, dp_ranks, steps)
    duration_s: Times  # their durations, same shape

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Numbers of the pipeline stages."""
        return tuple(sorted({operation.stage for operation in self.operations}))

    @cached_property
    def end_s(self) -> Times:
        """Ends of operations, as `start_s`."""
        return self.start_s + self.duration_s

    def rank_of(self, dp_rank: int, stage: int) -> int:
        """Return the rank of a worker."""
        return int(self.ranks[self.dp_ranks.index(dp_rank), self.stages.index(stage)])

    def step_times_s(self) -> Times:
        """Return the duration of each step as recorded, from its first start to its last end."""
        return np.asarray(self.end_s.max(axis=(0, 1)) - self.start_s.min(axis=(0, 1)))
