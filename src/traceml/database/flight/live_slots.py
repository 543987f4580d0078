"""The open slots of a rank that still runs, read from its flight file by another process of its host.

Process: aggregator and agent, for a rank that cannot answer.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import msgspec

from traceml.database.flight.flight_header import COUNTERS_AT, MAGIC, OPEN_SLOTS_AT, own_mapping
from traceml.database.flight.open_phase import open_phase
from traceml.database.schema import LINE_PHASES, OPEN_SLOTS, PACKED, STEPS, Slot
from traceml.own_files import opened_own

__all__ = ["LiveSlots", "read_live_slots"]

_SLOTS = struct.Struct(f"@{OPEN_SLOTS}q")
_COUNT = struct.Struct("@q")
_STEPS_AT = COUNTERS_AT + 64 * PACKED.index(STEPS)
_RECENT_NS = 10**9
_BYTES = _STEPS_AT + _COUNT.size


class LiveSlots(msgspec.Struct, frozen=True):
    """Open slots at one moment, and the number of steps that had ended."""

    slots: tuple[int, ...]
    steps: int

    @property
    def heartbeat_ns(self) -> int:
        """Monotonic timestamp of the last time the recorder's thread woke, 0 before the first."""
        return self.slots[Slot.HEARTBEAT]

    @property
    def recorder_thread(self) -> int:
        """The kernel's id of the recorder's thread, 0 before its start."""
        return self.slots[Slot.RECORDER_THREAD]

    @property
    def is_ending(self) -> bool:
        """Whether the process has begun to end."""
        return self.slots[Slot.EXIT_START] > 0

    @property
    def in_step(self) -> bool:
        """Whether a step is open."""
        return self.slots[Slot.STEP_START] > 0

    @property
    def step(self) -> int:
        """The open step, else the last one that ended; -1 before the first."""
        step = self.slots[Slot.STEP]
        return step if self.in_step else max(step, self.steps) - 1

    @property
    def phase(self) -> str:
        """The innermost open phase, as in `schema.LINE_PHASES`, or `exit`."""
        return "exit" if self.is_ending else LINE_PHASES[open_phase(self.slots, self.steps > 0)[0]]

    @property
    def line_id(self) -> int:
        """Id in `names` of the user's line that was sampled last; -1 if that was long before the recorder fell silent.

        In the phase that is open any sample shows where it is; one of another phase, where it just was.
        """
        phase, since_ns = open_phase(self.slots, self.steps > 0)
        at_ns = self.slots[Slot.LINE_AT]
        is_of_phase = self.slots[Slot.LINE_PHASE] == phase and at_ns >= since_ns > 0
        return self.slots[Slot.LINE] if at_ns and (is_of_phase or self.heartbeat_ns - at_ns <= _RECENT_NS) else -1


def read_live_slots(path: Path) -> LiveSlots | None:
    """Return the open slots in a flight file; None if it cannot be read, or is not one."""
    own = own_mapping(path)  # closing a second descriptor of an own file would drop its lock
    if own is not None:
        return _parsed(own[:_BYTES])

    try:
        with opened_own(path) as descriptor:
            return _parsed(os.pread(descriptor, _BYTES, 0))
    except OSError:
        return None


def _parsed(data: bytes) -> LiveSlots | None:
    if len(data) < _BYTES or not data.startswith(MAGIC):
        return None

    return LiveSlots(_SLOTS.unpack_from(data, OPEN_SLOTS_AT), _COUNT.unpack_from(data, _STEPS_AT)[0])
