"""Intake of rows for the diagnosis: from tables to kept steps and job facts.

The aggregator adds frames from the wire; a reader of a store adds frames from the store.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import (
    DEVICE_STEPS,
    EPOCHS,
    EVALS,
    FINGERPRINTS,
    GPU,
    HOST,
    LIMITS,
    LINES,
    LOADER_WORKERS,
    LOSSES,
    PACKED,
    PAUSES,
    PROCESS,
    STEPS,
    TORCH_MEMORY,
    USER_PHASES,
    Table,
)
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.steps.aligned_steps import AlignedSteps, Ints
from traceml.diagnosis.steps.kept_steps import KeptSteps, Rows, SampledSteps, SpreadSteps

__all__ = ["RowIntake"]


class RowIntake:
    """Collects rows of all ranks of a run."""

    def __init__(self, slots: int, ranks: int = 0) -> None:
        self.facts_builder = JobFactsBuilder(max(ranks, 1))
        self.kept = KeptSteps(slots, ranks)
        self.kept.numbers = self.facts_builder.numbers
        self.history: SpreadSteps | None = None  # steps that are spread over the run, if `keep_history` was called
        self.names = self.facts_builder.names
        self._added: dict[str, list[tuple[int, bytes]]] = {STEPS.name: [], DEVICE_STEPS.name: []}
        self._takers: dict[str, Callable[[int, Rows], None]] = {
            USER_PHASES.name: self._take_user_phases,
            PROCESS.name: self.facts_builder.process_rows,
            HOST.name: self.facts_builder.host_rows,
            GPU.name: self.facts_builder.gpu_rows,
            TORCH_MEMORY.name: self.facts_builder.memory.device_rows,
            LOADER_WORKERS.name: self.facts_builder.worker_rows,
            LIMITS.name: self.facts_builder.limits.add,
            EPOCHS.name: self.facts_builder.epoch_rows,
            LINES.name: self._take_lines,
            EVALS.name: self._take_evaluation,
            LOSSES.name: self.facts_builder.losses.add,
            FINGERPRINTS.name: self.facts_builder.batches.add,
            PAUSES.name: self.facts_builder.pauses.add,
        }

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that the diagnosis needs."""
        return *self._added, *self._takers

    def resize(self, slots: int, ranks: int) -> None:
        """Drop the kept steps and keep new ones, for another number of ranks."""
        self._replace(KeptSteps(slots, ranks))

    def keep_history(self, ranks: int) -> None:
        """Keep steps that are spread over a run that is not over, from now on, unless it has too many ranks."""
        self.history = SpreadSteps.of_run(ranks)
        if self.history is not None:
            self.history.numbers = self.facts_builder.numbers

    def sample(self, steps: Ints, ranks: int) -> SampledSteps:
        """Keep only these steps from now on, ascending; return where they are kept."""
        sampled = SampledSteps(steps, ranks)
        self._replace(sampled)
        return sampled

    def end(self, ended: RankExit) -> None:
        """Record how a rank ended; the others are no longer aligned with it."""
        self.facts_builder.exit(ended)
        for kept in self._all_kept:
            kept.end(ended.rank)

    def clear(self, rank: int) -> None:
        """Drop the kept steps of a rank that starts again."""
        for kept in self._all_kept:
            kept.clear(rank)

    def add(self, table: str, rank: int, data: bytes) -> None:
        """Add rows of one rank, in order; step rows are kept with the next `flush`.

        Args:
            table: name of a packed table; tables that the diagnosis does not need are ignored.
        """
        added = self._added.get(table)
        if added is not None:
            added.append((rank, data))
        elif table in self._takers:
            self._takers[table](rank, np.frombuffer(data, _DTYPES[table]))

    def flush(self) -> bool:
        """Put the added step rows of all ranks among the kept ones at once; return whether there were any."""
        found = bool(self._added[STEPS.name])
        self._scatter(STEPS, self._take_steps)
        self._scatter(DEVICE_STEPS, self._take_device_steps)
        return found

    def snapshot(self, last: int | None = None) -> tuple[AlignedSteps, JobFacts]:
        """Return the input of the rules: the newest aligned steps, at most `last`, and the facts; see `KeptSteps`."""
        window = self.kept.aligned(last=last)
        return window, self.facts_builder.build(
            self.kept.reached(window.missing_ranks).tolist(), self.kept.end_ns.tolist()
        )

    @property
    def _all_kept(self) -> tuple[KeptSteps, ...]:
        return (self.kept,) if self.history is None else (self.kept, self.history)

    def _replace(self, kept: KeptSteps) -> None:
        kept.representatives, self.kept = self.kept.representatives, kept
        kept.numbers = self.facts_builder.numbers

    def _scatter(self, table: Table, scatter: Callable[[NDArray[np.int64], Rows], None]) -> None:
        added, self._added[table.name] = self._added[table.name], []  # what fails is not tried again
        if added:
            ranks = np.array([rank for rank, _ in added], np.int64)
            parts = [data for _, data in added]
            counts = np.array([len(data) for data in parts]) // table.row_bytes
            scatter(np.repeat(ranks, counts), np.frombuffer(b"".join(parts), table.dtype))

    def _take_steps(self, ranks: NDArray[np.int64], rows: Rows) -> None:
        for kept in self._all_kept:
            kept.scatter(ranks, rows)

        self.facts_builder.skipped.add(ranks, rows)
        self.facts_builder.batches.group.steps(rows)
        self.facts_builder.progress.steps(ranks, rows)

    def _take_device_steps(self, ranks: NDArray[np.int64], rows: Rows) -> None:
        for kept in self._all_kept:
            kept.scatter_device(ranks, rows)

    def _take_lines(self, rank: int, rows: Rows) -> None:
        self.facts_builder.lines.add(rank, rows)
        self.facts_builder.progress.line_rows(rank, rows)

    def _take_evaluation(self, rank: int, rows: Rows) -> None:
        for kept in self._all_kept:
            kept.scatter_evaluation(rank, rows)

        self.facts_builder.progress.eval_rows(rank, rows)
        self.facts_builder.lines.evaluated(rank, int(rows["t_end_ns"][-1]))

    def _take_user_phases(self, rank: int, rows: Rows) -> None:
        for kept in self._all_kept:
            kept.scatter_user(rank, rows, self.names.get(rank, {}))


_DTYPES = {table.name: table.dtype for table in PACKED}
