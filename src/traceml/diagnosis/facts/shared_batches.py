"""Batches of ranks: which ranks share them, what they consist of, and how ranks communicate in their steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import MAX_LOGGED_NUMBERS
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.facts.trainings.group_use import GroupUse

__all__ = ["COMPARED_WORKERS", "BatchHistory"]

MIN_BATCHES = 3
"""Ranks have the same batches if they had in at least this many steps, and in all of which both are known."""
COMPARED_WORKERS = 3
"""Loader workers whose first batches of an epoch are compared: as many have a fingerprint."""
MAX_LOGGED_SHARE = 0.01
"""Tensors of at most `MAX_LOGGED_NUMBERS` elements, and of this share of a model's parameters, are no gradients."""
_KEPT = 64


class _RankData(msgspec.Struct):
    """A rank's model and its data, as far as the rank has told."""

    batches: dict[int, int] = {}  # step -> fingerprint, the newest
    has_model: bool = False
    parameters: int = 0  # of the model
    gradient_ranks: tuple[int, ...] = ()  # those that average gradients with it
    gradient_size: int = 0  # how many these are
    carried: int | None = None  # elements of the largest tensor of its collectives
    first_input: tuple[Any, ...] | None = None  # kind of the model's first input
    tokens: bool = False
    batch_first: bool = True


class BatchHistory:
    """Fingerprints of batches by rank, models' gradient groups, and whether ranks communicate in their steps."""

    def __init__(self) -> None:
        self._ranks: defaultdict[int, _RankData] = defaultdict(_RankData)
        self._is_split = False
        self.reductions: tuple[float, float] | None = None
        """Backward passes of a step, and those of them that average gradients; None if unknown."""
        self.sharding: str | None = None  # `fsdp` or `fsdp2` where a model gathers its parameters in each step
        self.messages = False  # whether ranks send each other messages, as the stages of a pipeline do
        self.group = GroupUse()  # use of the process group

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.FINGERPRINTS`, in order; the newest are kept."""
        kept = self._ranks[rank].batches
        kept.update(zip(rows["step"].tolist(), rows["fingerprint"].tolist(), strict=True))
        for step in list(kept)[:-_KEPT]:
            del kept[step]

    def model(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the facts of a rank's model."""
        known = self._ranks[rank]
        known.has_model, known.parameters = True, int(row.get("parameters") or 0)
        self.group.model(row)
        if row.get("parallel") in ("fsdp", "fsdp2"):
            self.sharding = row["parallel"]

        splits = row.get("parallel") == "dtensor" and not row.get("gradient_size")
        self._is_split = self._is_split or splits or bool(row.get("gradient_ranks"))
        if row.get("gradient_ranks"):
            known.gradient_ranks = tuple(row["gradient_ranks"])

        if row.get("gradient_size"):
            known.gradient_size = int(row["gradient_size"])

    def reduction_facts(self, row: Mapping[str, Any]) -> None:
        """Take the means of backward passes and of reductions per step."""
        self.reductions = float(row.get("backwards_per_step") or 0), float(row.get("reductions_per_step") or 0)

    def collective(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the elements of the largest tensor that the collectives of a rank have carried, and of messages."""
        self._ranks[rank].carried = int(row.get("elements") or 0)
        self.messages = self.messages or bool(row.get("messages"))

    def has_own_stages(self, ranks: Collection[int], others: Collection[int]) -> bool:
        """Return whether some ranks are stages of a pipeline that train other numbers of parameters than all others."""
        mine, usual = (
            {self._ranks[rank].parameters for rank in some if rank in self._ranks} for some in (ranks, others)
        )
        return self.messages and bool(mine) and bool(usual) and 0 not in mine | usual and mine.isdisjoint(usual)

    def input(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the facts of a rank's first input of the model; the newest say what is counted."""
        known = self._ranks[rank]
        known.first_input = known.first_input or (row.get("dtype"), row.get("dimensions"), row.get("requires_grad"))
        known.tokens, known.batch_first = bool(row.get("tokens")), bool(row.get("batch_first", True))

    @property
    def tokens(self) -> bool:
        """Whether the model's input is integers by sample and position, as in language models."""
        return any(each.tokens for each in self._ranks.values())

    @property
    def batch_first(self) -> bool:
        """Whether the first dimension of the input counts samples."""
        return all(each.batch_first for each in self._ranks.values())

    @property
    def averages_gradients(self) -> bool:
        """Whether a model averages its gradients by itself: also DDP does not in local SGD, under `no_sync()`."""
        is_bypassed = self.reductions is not None and not self.reductions[1]
        return self.group.is_parallel and not is_bypassed

    @property
    def are_alone(self) -> bool:
        """Whether ranks share a group, but exchange no gradients.

        No step had a collective, or all collectives carried a few numbers, as to log a loss. No backward pass of a
        parallel model had one.
        """
        has_no_gradients = not self.group.communicates or self.only_numbers > 0
        has_several = self.group.size > 1 and len(self._with_model) > 1
        return has_several and has_no_gradients and not self.averages_gradients

    @property
    def only_numbers(self) -> int:
        """Most numbers that a collective carried, if all did on all ranks, and too few for gradients; else 0."""
        with_model = self._with_model
        parameters = min((each.parameters for each in with_model), default=0)
        most = max((parameters if each.carried is None else each.carried for each in with_model), default=0)
        return most if self.group.communicates and most <= min(MAX_LOGGED_NUMBERS, MAX_LOGGED_SHARE * parameters) else 0

    @property
    def _with_model(self) -> list[_RankData]:
        return [each for each in self._ranks.values() if each.has_model]

    def duplicates(self, world_size: int, topology: Topology) -> list[tuple[tuple[int, ...], int]]:
        """Return groups of ranks with equal batches, and the number of batches that were compared.

        Only ranks that average their gradients are compared: those of a tensor- or pipeline-parallel group share
        batches on purpose, and so do those that divide the sequences of a batch, of which one is compared.
        """
        found = []
        shares = topology.divides_sequences  # it looks at all ranks
        for averaging in self._gradient_groups(world_size):
            group = topology.with_own_batches(averaging) if shares else sorted(averaging)
            known = [rank for rank in group if len(self._ranks[rank].batches) >= MIN_BATCHES]
            if len(known) > 1:
                found += self._equal(known)

        return found

    def repeated_by_workers(self, begins: Sequence[int], workers: int) -> int:
        """Return in how many epochs all loader workers of the lowest rank made the same first batch; 0 if not in all.

        The first batches of an epoch come from one worker each.

        Args:
            begins: first step of each epoch.
            workers: of the training's loader.
        """
        batches = self._ranks[min(self._ranks)].batches if self._ranks and workers > 1 else {}
        heads = [[batches.get(begin + at) for at in range(min(workers, COMPARED_WORKERS))] for begin in begins]
        known = [head for head in heads if None not in head]
        repeats = all(len(set(head)) == 1 for head in known)
        # The same batch in each step is that of a benchmark.
        return len(known) if repeats and len(set(batches.values())) > 1 else 0

    def distinct_ranks(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks whose data count: of ranks with equal batches the lowest; empty if unknown.

        Later stages of a pipeline have none: their input is of another kind than the first stage's, or alone has
        gradients, which go to the stage before. The ranks of a
        tensor-parallel group have the same batches; without fingerprints, their number is not known.
        """
        first = self._ranks[min(ranks, default=0)].first_input
        fed = [rank for rank in ranks if self._ranks[rank].first_input in (None, first)]
        known = [rank for rank in fed if len(set(self._ranks[rank].batches.values())) >= MIN_BATCHES]
        if self._is_split and len(known) < len(fed):
            return ()

        repeated = {rank for equal, _ in self._equal(known) for rank in equal[1:]} if len(known) > 1 else set()
        return tuple(rank for rank in fed if rank not in repeated)

    def _gradient_groups(self, world_size: int) -> Iterable[tuple[int, ...]]:
        averaging = {rank: each.gradient_size for rank, each in self._ranks.items() if each.gradient_size}
        if any(size >= world_size for size in averaging.values()):
            return [tuple(sorted(averaging))]

        return sorted({each.gradient_ranks for each in self._ranks.values() if each.gradient_ranks})

    def _equal(self, ranks: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
        common = sorted(set.intersection(*(set(self._ranks[rank].batches) for rank in ranks)))
        by_batches: dict[tuple[int, ...], list[int]] = {}
        for rank in ranks:
            by_batches.setdefault(tuple(self._ranks[rank].batches[step] for step in common), []).append(rank)

        # The same batch in each step is that of a benchmark.
        same = (tuple(equal) for batches, equal in by_batches.items() if len(set(batches)) >= MIN_BATCHES)
        return [(equal, len(common)) for equal in same if len(equal) > 1]
