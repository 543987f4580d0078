"""Steps at which a script began to train another model, or more of it, as a sweep and a training in stages do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["TrainedModels"]

MAX_RANKS = 8
"""Ranks whose models are compared: they stand for the others."""
_DESCRIBED = {"model": ("model", "parameters"), "optimizer": ("optimizer", "tensors")}


class TrainedModels:
    """Notes when models and optimizers of another size appear; equal ones, as of folds, are the same."""

    def __init__(self) -> None:
        self._known: dict[int, set[tuple[Any, ...]]] = {}
        self._steps: set[int] = set()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps before which another one appeared, ascending; the first ones of a run are not among them."""
        return tuple(sorted(self._steps))

    def info(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the facts of a rank's model or optimizer."""
        names, step = _DESCRIBED.get(str(row.get("kind"))), row.get("step")
        if names is None or rank >= MAX_RANKS or not isinstance(step, int):
            return

        described = (row.get("kind"), *(row.get(name) for name in names))
        known = self._known.setdefault(rank, set())
        if described not in known:
            known.add(described)
            self._steps |= {step} if step > 0 else set()
