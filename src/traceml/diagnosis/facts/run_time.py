"""The run's wall time, split without remainder, and its productive and repeated steps over all attempts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["HEAVY_SHARE", "PARTS", "SET_UP_STEPS", "EvaluationParts", "RunTime", "UsefulTime", "useful_time"]

PARTS = (
    "startup", "steps", "evaluation", "checkpoint", "between_epochs", "idle", "stopped", "restart", "unexplained",
)  # fmt: skip
"""The parts of a run's wall time:

- `startup`: from the run's start to the first batch, and what the first steps take longer than the others
- `steps`: training steps, without saving and without the start of epochs
- `evaluation`: evaluation batches, with the time until `model.train()` or the next training batch
- `checkpoint`: saving inside steps
- `between_epochs`: ending and starting the data loader's iterator and its workers
- `idle`: after the last step or evaluation
- `stopped`: the process did not run
- `restart`: from the last step of an attempt to the first batch of the next one
- `unexplained`: the rest, such as the time between the cells of a notebook
"""


SET_UP_STEPS = 10
"""First steps of a run that a diagnosis leaves out, as they include set-up."""
HEAVY_SHARE = 0.25
"""A part of the wall time that is worth a word: start-up or evaluation is reported from this share on."""


class UsefulTime(msgspec.Struct, frozen=True):
    """Steps of a rank, each counted once; those that a later attempt makes again are repeated."""

    # time in steps that were made for the first time, without waiting for data, saving, and the step in which an
    # attempt failed
    productive_s: float = 0.0
    productive_steps: int = 0
    repeated_s: float = 0.0  # time in steps that an earlier attempt had made already, with waiting and saving
    repeated_steps: int = 0


class EvaluationParts(msgspec.Struct, frozen=True):
    """Parts of the time of evaluations, over all ranks."""

    input_share: float = 0.0  # waiting for data, 0..1
    forward_share: float = 0.0  # calls of the model
    batch_ns: float = 0.0  # time of a batch, the mean
    batches: float = 0.0  # of one evaluation, the mean


class RunTime(msgspec.Struct, frozen=True):
    """Wall time of a run."""

    wall_s: float  # from its start to its end, or until now
    # by part (`PARTS`), the mean over the ranks that determine it; the parts add up to `wall_s`
    seconds: Mapping[str, float] = {}
    evaluations: int = 0  # times that evaluation interrupted the training, on one rank
    evaluating_s: float = 0.0  # of the evaluation, in one that is not over, which does not count as one
    # steps that count, and those that an attempt repeats
    useful: UsefulTime = msgspec.field(default_factory=UsefulTime)
    compile_s: float = 0.0  # of the start-up (after a restart: of that), compiling functions for the first steps
    set_up_s: float = 0.0  # the same of all by which the first steps took longer than the others
    first_data_s: float = 0.0  # the same of waiting for data before the first step
    evaluators: tuple[int, ...] = ()  # ranks that evaluate where most others do not, in order
    evaluators_s: float = 0.0  # their seconds of evaluation, the mean
    others_evaluate_s: float = 0.0  # those of the other ranks, less than half as long
    short_evaluations: int = 0  # evaluations that were much shorter than the longest one
    short_evaluations_s: float = 0.0  # seconds of those
    evaluates_before: bool = False  # whether each of them comes before training steps, the first before all
    evaluates_only_first: bool = False  # whether all of them come before the first training step
    evaluation_parts: EvaluationParts = EvaluationParts()

    @property
    def goodput(self) -> float:
        """Share in steps, without waiting for data, saving, and steps that an attempt repeats."""
        return min(self.useful.productive_s / self.wall_s, 1.0) if self.wall_s > 0 else 0.0

    @classmethod
    def of(cls, wall_s: float, known: Mapping[str, float], evaluations: int = 0) -> RunTime:
        """Return a wall time with its known parts; the rest is unexplained.

        Parts that exceed the wall time, as clocks of several hosts differ, are cut to it in proportion.
        """
        parts = {part: max(known.get(part, 0.0), 0.0) for part in PARTS}
        whole = sum(parts.values())
        if whole > wall_s > 0:
            parts = {part: seconds * wall_s / whole for part, seconds in parts.items()}
            whole = wall_s

        parts["unexplained"] += max(wall_s - whole, 0.0)
        return cls(wall_s, parts, evaluations)

    def share(self, *parts: str) -> float:
        """Return the share of the wall time that some parts have, 0..1."""
        return sum(self.seconds.get(part, 0.0) for part in parts) / self.wall_s if self.wall_s > 0 else 0.0

    def repeated_evaluation(self, seconds: float) -> float:
        """Return the share of an evaluation time that comes several times: not that of one test, or one check."""
        short = min(self.short_evaluations_s / seconds, 1.0) if seconds > 0 else 0.0
        long = 1 - short if self.evaluations - self.short_evaluations > 1 else 0.0
        return long + (short if self.short_evaluations > 1 else 0.0)

    @property
    def in_steps(self) -> float:
        """Share of the wall time in training steps, with saving and the start of epochs."""
        return self.share("steps", "checkpoint", "between_epochs")

    @property
    def is_steps(self) -> bool:
        """Whether nearly all of the wall time is steps."""
        return self.wall_s <= 0 or self.in_steps >= 1 - HEAVY_SHARE


def useful_time(attempts: Iterable[tuple[NDArray[np.void], int, int]]) -> UsefulTime:
    """Return the useful time of a rank.

    Args:
        attempts: in order, the bins of its steps (`StepSums.steps.bins`), the steps in the checkpoint with which it
            began, where its own steps count from 0, and the time of the step in which it failed, if that is in the
            bins, nanoseconds; else 0.
    """
    seen, productive_ns, repeated_ns, productive, repeated = -1, 0.0, 0.0, 0, 0.0
    for bins, resumes_at, failed_ns in attempts:
        counts_on = len(bins) > 0 and bins["first_step"].min() > 0
        before = 0 if counts_on else resumes_at
        first, last = bins["first_step"] + before, bins["last_step"] + before
        new = np.clip((last - np.maximum(first - 1, seen)) / (last - first + 1), 0, 1)
        own_ns = bins["total_ns"] - bins["input_wait_ns"] - bins["checkpoint_ns"]
        productive_ns += max(float((new * own_ns).sum()) - failed_ns, 0.0)
        repeated_ns += float(((1 - new) * bins["total_ns"]).sum())
        repeated += float(((1 - new) * bins["rows"]).sum())
        productive += int(bins["rows"].sum()) - bool(failed_ns)
        seen = max(seen, int(last.max(initial=-1)) - bool(failed_ns))

    again = round(repeated)
    return UsefulTime(productive_ns / 1e9, productive - again, repeated_ns / 1e9, again)
