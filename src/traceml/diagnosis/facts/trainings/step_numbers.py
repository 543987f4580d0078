"""Numbers of a run's steps: they count from 0, or on from a checkpoint where the script says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["StepNumbers"]


class StepNumbers:
    """Numbers that the scripts of the ranks have given to their steps, in one attempt."""

    def __init__(self) -> None:
        # Rank -> (step, steps that its number and later ones count but this run has not seen), oldest first.
        self._resumed: dict[int, list[tuple[int, int]]] = {}

    def take(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a rank's row on the number that its script gave to the next step."""
        step, before = row.get("step", 0), row.get("before")
        if isinstance(step, int) and isinstance(before, int):
            known = self._resumed.setdefault(rank, [])
            if not known or known[-1][1] != before:  # a script may number each step
                known.append((step, before))

    def before(self, rank: int, last_step: int) -> int:
        """Return how many of the numbers up to a rank's last step are of no step of this run."""
        return next((before for step, before in reversed(self._resumed.get(rank, ())) if step <= last_step), 0)

    def is_given(self, rank: int | None = None) -> bool:
        """Return whether the script of a rank, or of any, has numbered its steps."""
        return bool(self._resumed) if rank is None else rank in self._resumed

    @property
    def first(self) -> int:
        """Number of the first step of this attempt, the least of the ranks."""
        firsts = [step if step == before else 0 for step, before in (each[0] for each in self._resumed.values())]
        return min(firsts, default=0)
