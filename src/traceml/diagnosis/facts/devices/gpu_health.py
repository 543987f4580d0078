"""Faults of devices, as the ranks that sample them have noted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["GpuHealth", "GpuHealthHistory"]

_MAX_XIDS = 16
_COUNTERS = ("ecc_errors", "remap_pending", "remap_failed", "max_clock_mhz")


@dataclass(slots=True)
class GpuHealth:
    """A device.

    Attributes:
        index: NVML's number of it.
        ecc_before: memory errors that ECC could not correct, when the run began; -1 where that is not known.
        ecc_errors: the same now.
        remap_pending, remap_failed: whether memory waits for a reset to be replaced, or cannot be.
        max_clock_mhz: highest clock; -1 where it is not known.
        xids: its first XID events: number and open step.
    """

    rank: int
    index: int
    ecc_before: int = -1
    ecc_errors: int = -1
    remap_pending: int = -1
    remap_failed: int = -1
    max_clock_mhz: int = -1
    xids: list[tuple[int, int]] = field(default_factory=list)

    @property
    def new_errors(self) -> int:
        """Memory errors since the run began."""
        return max(self.ecc_errors - self.ecc_before, 0)


class GpuHealthHistory:
    """Health of each device, by rank and NVML's number."""

    def __init__(self) -> None:
        self.devices: dict[tuple[int, int], GpuHealth] = {}

    def add(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a row `gpu_health` of the `info` log; one that is damaged is left out."""
        index, xid, step = row.get("index"), row.get("xid"), row.get("step")
        if not isinstance(index, int):
            return

        known = self.devices.setdefault((rank, index), GpuHealth(rank, index))
        if isinstance(xid, int) and isinstance(step, int) and len(known.xids) < _MAX_XIDS:
            known.xids.append((xid, step))

        for name in _COUNTERS:
            if isinstance(row.get(name), int):
                setattr(known, name, row[name])

        if known.ecc_before < 0:
            known.ecc_before = known.ecc_errors
