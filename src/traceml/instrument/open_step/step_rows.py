"""Rows of a step: its own, and those of the epoch, the batch's fingerprint, evaluation and user phases in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traceml.database.schema import PHASE_COLUMNS, Phase, StepFlag, pack_bits
from traceml.instrument.open_step.ended_parts import EndedParts
from traceml.instrument.phase_timer import FIRST_USER, OTHER

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile

__all__ = ["StepRows"]

_INPUT_WAIT, _USER = int(Phase.INPUT_WAIT), int(Phase.USER)
_CALLBACK, _EPOCH = int(StepFlag.CALLBACK), int(StepFlag.EPOCH)
_COLUMNS = ("step", "t_end_ns", "total_ns", *PHASE_COLUMNS, "backward_own_ns", "elements", "samples", "bits")


class StepRows:
    """Appends the rows that the clock makes, except those of usual steps: see `clock_implementations`.

    Args:
        users: name ids of user phases, by index; grows.
    """

    def __init__(self, flight: FlightFile, users: list[int]) -> None:
        self.ring = flight.ring("steps")
        self._users = users
        self._append_step = self.ring.appender(*_COLUMNS)
        self.append_evaluation = flight.ring("evals").appender(
            "step", "t_end_ns", "ns", "batches", "input_wait_ns", "forward_ns"
        )
        self._append_epoch = flight.ring("epochs").appender("step", "t_end_ns", "ns", "create_ns", "drain_ns", "first")
        self._append_fingerprint = flight.ring("fingerprints").appender("step", "fingerprint")
        self._append_user = flight.ring("user_phases").appender("step", "name_id", "ns", "count")

    def append(self, step: int, parts: EndedParts) -> None:
        """Append the row of a step, after those of what was in it."""
        times, flags = parts.times, parts.row_flags
        columns = times[:OTHER]
        columns[_USER] = self.append_user_phases(step, times) if self._users else 0
        own_ns = parts.own_ns if flags & _CALLBACK else -1
        if parts.fingerprint:
            self._append_fingerprint(step, parts.fingerprint)

        if flags & _EPOCH:
            is_first = int(not self.ring.appended)
            self._append_epoch(step, parts.end_ns, times[_INPUT_WAIT], parts.create_ns, parts.drain_ns, is_first)

        bits = pack_bits(parts.micro_batches, flags, parts.sequence)
        data = parts.elements, parts.samples
        self._append_step(step, parts.end_ns, parts.total_ns, *columns, own_ns, *data, bits)

    def append_user_phases(self, step: int, times: list[int]) -> int:
        """Append the rows of a step's user phases, given its time by bucket; return their time."""
        total = 0
        for index, name_id in enumerate(self._users):
            at = FIRST_USER + 2 * index
            if at + 1 < len(times) and (times[at] or times[at + 1]):
                self._append_user(step, name_id, times[at], times[at + 1])
                total += times[at]

        return total
