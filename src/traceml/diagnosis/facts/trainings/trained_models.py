"""Steps at which a script began to train another model, more of it, or an earlier one again, as a sweep does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["TrainedModels"]

MAX_RANKS = 8
"""Ranks whose models are compared: they stand for the others."""
MAX_RETURNS = 256
"""Earlier models that are trained again count this many times: a search trains some hundred."""
_DESCRIBED = {"model": ("model", "parameters"), "optimizer": ("optimizer", "tensors")}


class TrainedModels:
    """Notes when models and optimizers of another size are trained; equal ones, as of folds, are the same."""

    def __init__(self) -> None:
        self._now: dict[int, dict[str, tuple[Any, ...]]] = {}
        self._first: dict[int, dict[tuple[Any, ...], int]] = {}  # what was trained -> its first step
        self._training: dict[int, int] = {}  # the first step of what is trained now
        self._returns: dict[int, int] = {}
        self._steps: set[int] = set()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps before which another one appeared, ascending; the first ones of a run are not among them."""
        return tuple(sorted(self._steps))

    @property
    def returns(self) -> dict[int, int]:
        """Those of the steps before which an earlier one was trained again, with its first step."""
        return dict(self._returns)

    def info(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the facts of a rank's model or optimizer."""
        kind, step = str(row.get("kind")), row.get("step")
        names = _DESCRIBED.get(kind)
        if names is None or rank >= MAX_RANKS or not isinstance(step, int):
            return

        now = self._now.setdefault(rank, {})
        now[kind] = tuple(row.get(name) for name in names)
        first = self._first.setdefault(rank, {}).setdefault((now.get("model"), now.get("optimizer")), step)
        if first != self._training.get(rank, 0):
            self._begin(rank, step, first)

    def _begin(self, rank: int, step: int, first: int) -> None:
        if first < step and len(self._returns) >= MAX_RETURNS:
            return

        self._training[rank] = first
        self._steps.add(step)
        self._returns.pop(step, None)
        if first < step:
            self._returns[step] = first
