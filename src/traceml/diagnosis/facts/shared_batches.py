"""Batches of ranks: which ranks share them, what they consist of, and how ranks communicate in their steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import MAX_LOGGED_NUMBERS
from traceml.diagnosis.facts.trainings.group_use import GroupUse

__all__ = ["BatchHistory"]

MIN_BATCHES = 3
"""Ranks have the same batches if they had in at least this many steps, and in all of which both are known."""
MAX_LOGGED_SHARE = 0.01
"""Tensors of at most `MAX_LOGGED_NUMBERS` elements, and of this share of a model's parameters, are no gradients."""
_KEPT = 64


class BatchHistory:
    """Fingerprints of batches by rank, models' gradient groups, and whether ranks communicate in their steps."""

    def __init__(self) -> None:
        self._batches: dict[int, dict[int, int]] = {}
        self._groups: dict[int, tuple[int, ...]] = {}
        self._sizes: dict[int, int] = {}
        self._models: set[int] = set()
        self._inputs: dict[int, tuple[Any, ...]] = {}
        self._is_split = False
        self.reductions: tuple[float, float] | None = None
        """Backward passes of a step, and those of them that average gradients; None if unknown."""
        self.sharding: str | None = None
        """`fsdp` or `fsdp2` where a model gathers its parameters in each step."""
        self._tokens: dict[int, bool] = {}
        self._batch_first: dict[int, bool] = {}
        self._carried: dict[int, int] = {}
        self.messages = False
        """Whether ranks send each other messages, as the stages of a pipeline do."""
        self._parameters: dict[int, int] = {}
        self.group = GroupUse()
        """Use of the process group."""

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.FINGERPRINTS`, in order; the newest are kept."""
        kept = self._batches.setdefault(rank, {})
        kept.update(zip(rows["step"].tolist(), rows["fingerprint"].tolist(), strict=True))
        for step in list(kept)[:-_KEPT]:
            del kept[step]

    def model(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the facts of a rank's model."""
        self._models.add(rank)
        self._parameters[rank] = int(row.get("parameters") or 0)
        self.group.model(row)
        if row.get("parallel") in ("fsdp", "fsdp2"):
            self.sharding = row["parallel"]

        splits = row.get("parallel") == "dtensor" and not row.get("gradient_size")
        self._is_split = self._is_split or splits or bool(row.get("gradient_ranks"))
        if row.get("gradient_ranks"):
            self._groups[rank] = tuple(row["gradient_ranks"])

        if row.get("gradient_size"):
            self._sizes[rank] = int(row["gradient_size"])

    def reduction_facts(self, row: Mapping[str, Any]) -> None:
        """Take the means of backward passes and of reductions per step."""
        self.reductions = float(row.get("backwards_per_step") or 0), float(row.get("reductions_per_step") or 0)

    def collective(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the elements of the largest tensor that the collectives of a rank have carried, and of messages."""
        self._carried[rank] = int(row.get("elements") or 0)
        self.messages = self.messages or bool(row.get("messages"))

    def input(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the facts of a rank's first input of the model; the newest say what is counted."""
        self._inputs.setdefault(rank, (row.get("dtype"), row.get("dimensions"), row.get("requires_grad")))
        self._tokens[rank], self._batch_first[rank] = bool(row.get("tokens")), bool(row.get("batch_first", True))

    def steps(self, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.STEPS`."""
        self.group.steps(rows)

    @property
    def tokens(self) -> bool:
        """Whether the model's input is integers by sample and position, as in language models."""
        return any(self._tokens.values())

    @property
    def batch_first(self) -> bool:
        """Whether the first dimension of the input counts samples."""
        return all(self._batch_first.values())

    @property
    def are_alone(self) -> bool:
        """Whether ranks share a group, but exchange no gradients.

        No step had a collective, or all collectives carried a few numbers, as to log a loss. No backward pass of a
        parallel model had one.
        """
        is_bypassed = self.reductions is not None and not self.reductions[1]
        has_no_gradients = not self.group.communicates or self.only_numbers > 0
        trains_alone = has_no_gradients and (is_bypassed or not self.group.is_parallel)
        return self.group.size > 1 and len(self._models) > 1 and trains_alone

    @property
    def only_numbers(self) -> int:
        """Most numbers that a collective carried, if all did on all ranks, and too few for gradients; else 0."""
        parameters = min((self._parameters[rank] for rank in self._models), default=0)
        most = max((self._carried.get(rank, parameters) for rank in self._models), default=0)
        return most if self.group.communicates and most <= min(MAX_LOGGED_NUMBERS, MAX_LOGGED_SHARE * parameters) else 0

    def duplicates(self, world_size: int) -> list[tuple[tuple[int, ...], int]]:
        """Return groups of ranks with equal batches, and the number of batches that were compared.

        Only ranks that average their gradients are compared: those of a tensor- or pipeline-parallel group share
        batches on purpose.
        """
        found = []
        for group in self._gradient_groups(world_size):
            known = [rank for rank in group if len(self._batches.get(rank, ())) >= MIN_BATCHES]
            if len(known) > 1:
                found += self._equal(known)

        return found

    def distinct_ranks(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks whose data count: of ranks with equal batches the lowest; empty if unknown.

        Later stages of a pipeline have none: their input is of another kind than the first stage's, or alone has
        gradients, which go to the stage before. The ranks of a
        tensor-parallel group have the same batches; without fingerprints, their number is not known.
        """
        first = self._inputs.get(min(ranks, default=0))
        fed = [rank for rank in ranks if self._inputs.get(rank, first) == first]
        known = [rank for rank in fed if len(set(self._batches.get(rank, {}).values())) >= MIN_BATCHES]
        if self._is_split and len(known) < len(fed):
            return ()

        repeated = {rank for equal, _ in self._equal(known) for rank in equal[1:]} if len(known) > 1 else set()
        return tuple(rank for rank in fed if rank not in repeated)

    def _gradient_groups(self, world_size: int) -> Iterable[tuple[int, ...]]:
        if any(size >= world_size for size in self._sizes.values()):
            return [tuple(sorted(self._sizes))]

        return sorted(set(self._groups.values()))

    def _equal(self, ranks: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
        common = sorted(set.intersection(*(set(self._batches[rank]) for rank in ranks)))
        by_batches: dict[tuple[int, ...], list[int]] = {}
        for rank in ranks:
            by_batches.setdefault(tuple(self._batches[rank][step] for step in common), []).append(rank)

        # The same batch in each step is that of a benchmark.
        same = (tuple(equal) for batches, equal in by_batches.items() if len(set(batches)) >= MIN_BATCHES)
        return [(equal, len(common)) for equal in same if len(equal) > 1]
