"""Devices: faults that they report, and memory that a rank gives back to the driver and requests again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

__all__ = ["GpuHealth", "GpuHealthHistory", "SegmentTurnover", "TurnoverHistory"]

_MAX_XIDS = 16
_COUNTERS = (
    "ecc_errors", "remap_pending", "remap_failed", "max_clock_mhz", "power_limit_w", "default_power_limit_w",
)  # fmt: skip
_LOWERED = 0.98


class GpuHealth(msgspec.Struct):
    """A device."""

    rank: int
    index: int  # NVML's number of it
    ecc_before: int = -1  # memory errors that ECC could not correct, when the run began; -1 where that is not known
    ecc_errors: int = -1  # the same now
    remap_pending: int = -1  # whether memory waits for a reset to be replaced
    remap_failed: int = -1  # whether it cannot be replaced
    max_clock_mhz: int = -1  # highest clock; -1 where it is not known
    power_limit_w: int = -1  # power that it may draw; -1 where that is not known
    default_power_limit_w: int = -1  # power that it may draw unless somebody changes it
    xids: list[tuple[int, int]] = []  # its first XID events: number and open step

    @property
    def new_errors(self) -> int:
        """Memory errors since the run began."""
        return max(self.ecc_errors - self.ecc_before, 0)

    @property
    def has_default_power(self) -> bool:
        """Whether it may draw the power that it is made for: at that limit, a lower clock is usual under full load."""
        return self.power_limit_w >= _LOWERED * self.default_power_limit_w > 0


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


_NEWEST = 3


class SegmentTurnover(NamedTuple):
    """An interval of steps: the blocks that torch requested from the driver in it, and gave back to it."""

    device: int
    first_step: int
    last_step: int
    requested: int
    given_back: int

    @property
    def per_step(self) -> float:
        """Blocks that were given back and requested again, per step."""
        return min(self.requested, self.given_back) / max(self.last_step - self.first_step, 1)


class TurnoverHistory:
    """The newest intervals of each rank and device."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], list[SegmentTurnover]] = {}

    def add(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a row `segments` of the `info` log; one that is damaged is left out."""
        values = [row.get(name) for name in ("device", "from_step", "step", "requested", "given_back")]
        if all(isinstance(value, int) for value in values):
            found = SegmentTurnover(*values)  # type: ignore[arg-type]
            self._kept.setdefault((rank, found.device), []).append(found)
            del self._kept[rank, found.device][:-_NEWEST]

    def forget(self, rank: int) -> None:
        """Forget a rank: another process of it has joined."""
        for key in [key for key in self._kept if key[0] == rank]:
            del self._kept[key]

    def steady(self, latest: int, least: float) -> dict[tuple[int, int], SegmentTurnover]:
        """Return the newest interval of ranks and devices that turn over at least `least` blocks per step all the time.

        Args:
            latest: newest step; an interval that ended long before it is over.
        """
        return {
            key: kept[-1]
            for key, kept in self._kept.items()
            if len(kept) > 1
            and all(each.per_step >= least for each in kept)
            and latest - kept[-1].last_step <= max(2 * (kept[-1].last_step - kept[0].first_step), 1)
        }
