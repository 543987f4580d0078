"""Late ranks whose other threads compute: while one of these runs Python code, the training waits for the GIL.

Such a rank is slower in everything that runs Python, though it neither computes more nor waits for a core.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from traceml.diagnosis.facts.blamed_lines import BlamedLine, threads_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.formatting import cores_text, ranks_text

__all__ = ["BackgroundThreads", "background_threads"]

MIN_SIDE_CORES = 0.25
"""Other threads that use fewer cores are no cause."""
SIDE_RATIO = 3.0
"""Nor are those that use less than this multiple of what the other ranks' do."""


class BackgroundThreads(msgspec.Struct, frozen=True):
    """Cores that all threads but the main one used, of each late rank and of each other rank."""

    ranks: Sequence[int]
    cores: float
    others: float
    line: BlamedLine | None  # where half of their threads' time is; None if the samples show none

    @property
    def text(self) -> str:
        """The sentence about them."""
        whose = ranks_text(self.ranks)
        each = " each" if len(self.ranks) > 1 else ""
        where = "" if self.line is None else f", {self.line.share_text} of it in {self.line.place}"
        return (
            f" Other threads of {whose} used {cores_text(self.cores)}{each}{where} (those of the others "
            f"{cores_text(self.others)}): while one runs Python code, the training waits for the GIL."
        )

    @property
    def advice(self) -> str:
        """The next thing to do about them."""
        if self.line is not None:
            return f"Move {self.line.place} into another process on {ranks_text(self.ranks)}, or run it less often."

        return (
            f"Look at what the other threads of {ranks_text(self.ranks)} do (`py-spy dump` shows it): do that in "
            "another process, or less often."
        )


def background_threads(facts: JobFacts, ranks: Sequence[int]) -> BackgroundThreads | None:
    """Return the use of cores by other threads of late ranks; None if they use few, or the others' as many."""
    used = facts.samples.background_cores()
    mine = [used[rank] for rank in ranks if rank in used]
    others = [cores for rank, cores in used.items() if rank not in ranks]
    if len(mine) < len(ranks) or not others or min(mine) < max(MIN_SIDE_CORES, SIDE_RATIO * max(others)):
        return None

    line = threads_line([each for each in facts.thread_lines if each.rank in ranks])
    return BackgroundThreads(tuple(ranks), float(np.mean(mine)), float(np.median(others)), line)
