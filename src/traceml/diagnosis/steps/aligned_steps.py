"""Aligned steps: the same steps of all ranks, as arrays for the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis.steps.step_split import Floats, mean_own, named_times, split_backward

__all__ = ["AlignedSteps", "Ints", "block_begins", "spread_ranges"]

Ints = NDArray[np.int64]


def block_begins(steps: Ints) -> NDArray[np.bool_]:
    """Return which steps, in order, have no predecessor among them: the first of each block of consecutive ones."""
    return np.asarray(np.diff(steps, prepend=-2) != 1)


def spread_ranges(values: Floats, most: int, length: int) -> Floats:
    """Return values of single steps; of more than `most`, ranges of `length` that are spread evenly over them."""
    if len(values) <= most:
        return values

    starts = np.linspace(0, len(values) - length, most // length).astype(int)
    return np.concatenate([values[start : start + length] for start in starts])


class AlignedSteps(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Steps that all ranks have."""

    ranks: Ints  # the ranks, one per row of the arrays
    steps: Ints  # the training steps, one per column
    times: Mapping[str, Floats]  # phase (`PHASES`) -> nanoseconds, rank x step. They add up to `total`.
    total: Floats  # wall time of each step in nanoseconds, without waiting for the evaluation of other ranks
    backward_own: Floats  # backward until the last local gradient, at most all of it; NaN if not measured
    user: Mapping[str, Floats] = {}  # the user's phases by name, in nanoseconds; their sum is `times["user"]`
    missing_ranks: tuple[int, ...] = ()  # ranks with rows, but with none of these steps
    device: bool = False  # whether device times replace the CPU times of the device's phases; see `step_split`
    elements: Floats = np.empty((0, 0), np.float32)  # size of the batches of each step, 0 if unknown
    samples: Floats = np.empty((0, 0), np.float32)  # number of samples in them, 0 if unknown
    # whether its optimizer called its closure several times, rank x step; empty if none did
    closures: NDArray[np.bool_] = np.empty((0, 0), bool)
    # rank -> the ranks of its host that it represents, itself among them, where hosts are merged
    represents: Mapping[int, tuple[int, ...]] = {}
    # by rank and step, own work of the longest of those beyond that of the rank itself; empty without any
    excess_of_represented: Floats = np.empty((0, 0), np.float32)

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def mean_elements(self) -> Floats:
        """Elements of the batches of each step, the mean of all ranks; empty if unknown."""
        return self.elements.mean(axis=0) if len(self.elements) else np.empty(0, np.float32)

    @cached_property
    def begins(self) -> NDArray[np.bool_]:
        """Steps whose predecessor is not in the window: the first step of each block of consecutive ones."""
        return block_begins(self.steps)

    @cached_property
    def wait(self) -> Floats:
        """Waiting for other ranks and for the network: inside backward, and in collectives; NaN if unknown."""
        return self.times["backward"] - self.backward_own + self.times["comm"]

    @cached_property
    def measured(self) -> NDArray[np.bool_]:
        """Steps in which every rank measured its own backward."""
        if not len(self.ranks):
            return np.zeros(len(self.steps), bool)

        return np.asarray(~np.isnan(self.backward_own).any(axis=0))

    @cached_property
    def own_mean(self) -> Floats:
        """Mean own backward of each rank over the steps that measured it; NaN if none did."""
        return mean_own(self.backward_own)

    @property
    def own_backward(self) -> Floats:
        """Own backward of each step. Where it was not measured, it is the rank's mean, without the noise of waiting.

        It is never longer than the step's backward.
        """
        mean = np.minimum(self.own_mean[:, None].astype(np.float32), self.times["backward"])
        return np.where(np.isnan(self.backward_own), mean, self.backward_own)

    def named_times(self) -> dict[str, Floats]:
        """Return the phases of each step, the user's phases by name; they add up to `total`."""
        return named_times(self.times, self.user)

    def mean_split(self, *, grouped: bool) -> dict[str, Floats]:
        """Return mean nanoseconds per step by phase and rank: own work, and waiting as `comm`."""
        steps = max(len(self), 1)
        means = {name: values.sum(axis=1, dtype=np.float64) / steps for name, values in self.named_times().items()}
        return split_backward(means, self.own_mean, grouped=grouped)

    def select(self, columns: slice | NDArray[np.bool_]) -> AlignedSteps:
        """Return the same ranks with some of the steps."""
        return self._cut(lambda values: values[:, columns], steps=self.steps[columns])

    def of_ranks(self, rows: NDArray[np.bool_]) -> AlignedSteps:
        """Return the same steps of some of the ranks."""
        ranks = self.ranks[rows]
        represents = {rank: self.represents[rank] for rank in ranks.tolist() if rank in self.represents}
        return self._cut(lambda values: values[rows], ranks=ranks, represents=represents)

    def _cut(self, cut: Callable[[Floats], Floats], **changed: Any) -> AlignedSteps:
        """Return the part of the times that `cut` takes; sizes, closures and excess may be unknown."""
        optional = {name: getattr(self, name) for name in ("elements", "samples", "closures", "excess_of_represented")}
        return replace(
            self,
            times={name: cut(values) for name, values in self.times.items()},
            total=cut(self.total),
            backward_own=cut(self.backward_own),
            user={name: cut(values) for name, values in self.user.items()},
            **{name: cut(values) for name, values in optional.items() if len(values)},
            **changed,
        )
