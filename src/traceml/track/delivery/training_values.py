"""Values for trackers that say what a job trains on: samples and tokens per second, and the loss.

They are made from frames in their order, like all derived values: state between frames is plain data for JSON.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.info_kinds import InfoKind
from traceml.database.schema import FINGERPRINTS, INFO, LOSSES
from traceml.database.store.reader import Frame, StreamRecord
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.track.tracker_state import TrainingState

__all__ = ["TRAINING_TABLES", "TrainingValues"]

TRAINING_TABLES = (INFO.name, FINGERPRINTS.name, LOSSES.name)
_KINDS = (InfoKind.MODEL, InfoKind.INPUT)
_FACTS = ("parallel", "gradient_size", "gradient_ranks", "dtype", "dimensions", "requires_grad", "tokens",
          "batch_first")  # fmt: skip
_FINGERPRINTS = 6  # of each rank
_KNOWN_RANKS = 512  # facts of further ranks are not kept
_DECIDED_STEPS = 1024  # who has data of its own is decided until then


class TrainingValues:
    """Computes the values of one run.

    Args:
        state: kept between frames, changed in place; plain values for JSON.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state

    def take(self, frame: Frame, stream: StreamRecord) -> None:
        """Take a frame of one of the tables `TRAINING_TABLES`."""
        if frame.table == LOSSES.name:
            self._take_losses(stream.rank, np.frombuffer(frame.data, LOSSES.dtype))
        elif stream.rank < _KNOWN_RANKS and not self._state.get("decided"):
            known = self._state.setdefault("facts", {}).setdefault(str(stream.rank), {})
            if frame.table == INFO.name:
                new = {row["kind"]: _facts(row) for row in frame.maps() if row.get("kind") in _KINDS}
                known.update({kind: row for kind, row in new.items() if kind == InfoKind.INPUT or kind not in known})
            else:
                rows = np.frombuffer(frame.data, FINGERPRINTS.dtype)
                prints = [*known.get("prints", []), *([int(step), int(value)] for step, value in rows.tolist())]
                known["prints"] = prints[:_FINGERPRINTS]

    def take_steps(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take step rows of a rank."""
        sizes = self._state.setdefault("sizes", {"steps": 0, "samples": 0, "elements": 0})
        if rank not in self._state.get("repeating", ()):
            sizes["steps"] += len(rows)
            sizes["samples"] += int(rows["samples"].sum())
            sizes["elements"] += int(rows["elements"].sum())

    def close(self, steps_per_s: float | None, step: int, ranks: list[int], *, last: bool = False) -> dict[str, float]:
        """Return the values of the interval that ends, by name.

        Args:
            steps_per_s: speed in the interval; None if unknown.
            step: last step of the lowest rank.
            ranks: the ranks that have made steps.
            last: whether no more rows come.
        """
        sizes, losses = self._state.pop("sizes", None), self._ready_losses(step, last=last)
        values = {"traceml/loss": float(np.mean([_mean(each) for each in losses]))} if losses else {}
        distinct, has_tokens, has_samples = self._data_ranks(ranks, step)
        if sizes is None or not sizes["samples"] or not distinct or steps_per_s is None:
            return values

        per_row = distinct * steps_per_s / sizes["steps"]
        if has_samples:
            values["traceml/samples_per_s"] = sizes["samples"] * per_row
        if has_tokens:
            values["traceml/tokens_per_s"] = sizes["elements"] * per_row

        return values

    def _take_losses(self, rank: int, rows: NDArray[np.void]) -> None:
        """Add losses to the sums of their steps: the value of a step is the mean over ranks."""
        sums = self._state.setdefault("losses", {})
        for step, loss in zip(rows["step"].tolist(), rows["loss"].tolist(), strict=True):
            total, count = sums.get(str(step), (0.0, 0))
            sums[str(step)] = [total + loss if math.isfinite(loss) and total is not None else None, count + 1]

        if len(rows):
            self._state.setdefault("loss_steps", {})[str(rank)] = int(rows["step"][-1])

    def _ready_losses(self, step: int, *, last: bool) -> list[list[Any]]:
        """Take the sums of the steps of which all ranks have sent theirs, or had an interval of time to do so."""
        sums, seen = self._state.get("losses", {}), self._state.get("loss_steps", {})
        due, self._state["loss_due"] = self._state.get("loss_due", -1), step
        up_to = max(due, min(seen.values(), default=-1))
        return [sums.pop(key) for key in list(sums) if last or int(key) <= up_to]

    def _data_ranks(self, ranks: list[int], step: int) -> tuple[int, bool, bool]:
        """Return the number of ranks with data of their own, 0 if unknown; is it text, are samples counted?"""
        if (decided := self._state.get("decided")) is not None:
            return int(decided[0]), bool(decided[1]), all(decided[2:])

        batches = self._history()
        distinct = batches.distinct_ranks(ranks)
        if distinct:
            self._state["repeating"] = sorted(set(ranks) - set(distinct))
        if step >= _DECIDED_STEPS:
            self._state["decided"] = [len(distinct), batches.tokens, batches.batch_first]
            self._state.pop("facts", None)

        return len(distinct), batches.tokens, batches.batch_first

    def _history(self) -> BatchHistory:
        batches = BatchHistory()
        for rank, known in self._state.get("facts", {}).items():
            prints = np.array([tuple(pair) for pair in known.get("prints", [])], FINGERPRINTS.dtype)
            batches.add(int(rank), prints)
            if InfoKind.MODEL in known:
                batches.model(int(rank), known[InfoKind.MODEL])
            if InfoKind.INPUT in known:
                batches.input(int(rank), known[InfoKind.INPUT])

        return batches


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _FACTS if row.get(name) is not None}


def _mean(losses: list[Any]) -> float:
    """Return the mean over ranks; NaN if one is not finite, as its sum is None."""
    total, count = losses
    return math.nan if total is None else total / count
