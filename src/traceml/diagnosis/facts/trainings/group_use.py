"""Use of the process group: whether the ranks of a job may wait for each other in their steps.

One rule for report, verdict, charts, exports and trackers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.info_kinds import InfoKind
from traceml.database.schema import unpack_bits

__all__ = ["GroupUse"]


class GroupUse(msgspec.Struct):
    """Facts on the process group of a job. Plain values, so that they can be stored as JSON."""

    size: int = 0  # ranks of the default process group, 0 without one
    backends: dict[str, str] = {}  # by type of device
    has_model: bool = False  # whether a model is known
    is_parallel: bool = False  # whether a model communicates by itself
    communicates: bool = False  # whether a step had a collective
    sequence: tuple[int, int] | None = None  # least and most collectives that a rank had called at the end of a step

    def info(self, row: Mapping[str, Any]) -> None:
        """Take a row of `schema.INFO` of any kind."""
        if row.get("kind") == InfoKind.GROUP:
            self.group(row)
        elif row.get("kind") == InfoKind.MODEL:
            self.model(row)

    def group(self, row: Mapping[str, Any]) -> None:
        """Take the facts of a process group."""
        self.size = max(self.size, int(row.get("group_size") or 0))
        pairs = (each.partition(":") for each in str(row.get("backends") or "").split(","))
        self.backends |= {device: backend for device, _, backend in pairs if backend}

    def model(self, row: Mapping[str, Any]) -> None:
        """Take the facts of a model."""
        self.has_model = True
        self.is_parallel = self.is_parallel or bool(row.get("parallel"))

    def steps(self, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.STEPS` of any rank."""
        if self.communicates or not len(rows):
            return

        sequence = unpack_bits(rows["bits"]).sequence
        least, most = int(sequence.min()), int(sequence.max())
        before = self.sequence or (least, most)
        self.sequence = min(least, before[0]), max(most, before[1])
        self.communicates = bool(rows["comm_ns"].any()) or self.sequence[0] != self.sequence[1]

    @property
    def is_unused(self) -> bool:
        """Whether ranks share a group, but no step had a collective, and no model is parallel."""
        return self.size > 1 and self.has_model and not self.communicates and not self.is_parallel

    def is_grouped(self, ranks: int) -> bool:
        """Return whether the ranks of a job, so many of them, may wait for each other."""
        return ranks > 1 and not self.is_unused
