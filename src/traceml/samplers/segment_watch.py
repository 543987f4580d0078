"""Blocks of device memory that torch gives back to the driver and requests again, from its own counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["SegmentWatch"]

_FIRST_NS = 5 * 10**9
_LATER = 4
"""Later rows come after a quarter of the time so far, so that a long run has few of them."""


class _Count(NamedTuple):
    t_ns: int
    step: int
    requested: int
    given_back: int


class SegmentWatch:
    """Notes the turnover of each device; one that only requests memory, as all do at first, is not noted.

    A row `segments` has `{"device", "from_step", "step", "requested", "given_back"}`, counted between the two steps.
    """

    def __init__(self, note: Callable[..., None]) -> None:
        self._note = note
        self._began_ns: dict[int, int] = {}
        self._before: dict[int, _Count] = {}

    def take(self, t_ns: int, step: int, device: int, figures: Mapping[str, Any]) -> None:
        """Take a sample.

        Args:
            t_ns: its monotonic timestamp.
            step: the open training step; -1 without one.
            device: number of the device.
            figures: what `torch.cuda.memory_stats` returned.
        """
        now = _Count(t_ns, step, *(int(figures.get(f"segment.all.{name}", 0)) for name in ("allocated", "freed")))
        before = self._before.get(device)
        if step < 0:
            return

        if before is None or step < before.step:
            self._began_ns[device], self._before[device] = t_ns, now
        elif t_ns - before.t_ns >= max(_FIRST_NS, (before.t_ns - self._began_ns[device]) // _LATER):
            self._before[device] = now
            self._append(device, before, now)

    def _append(self, device: int, before: _Count, now: _Count) -> None:
        requested, given_back = now.requested - before.requested, now.given_back - before.given_back
        if requested > 0 and given_back > 0:
            self._note(
                "segments", device=device, from_step=before.step, step=now.step, requested=requested,
                given_back=given_back,
            )  # fmt: skip
