"""Append logged values to the rank's tables.

A number goes into the ring `metrics`, anything else into the log `logged`; beyond the memory bound they go to a journal
on disk. Nothing here waits for the aggregator or for a tracker.
"""

from __future__ import annotations

import logging
import struct
import weakref
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from traceml.clock import own_time as time
from traceml.database.flight.row_rings import MAX_MAP_BYTES, pack_map
from traceml.database.schema import LOGGED, METRICS, Slot
from traceml.instrument.dynamo import skip_leaf_code
from traceml.instrument.native.extension import extension
from traceml.privacy import secrets_only
from traceml.recorder.current_recorder import on_change, state
from traceml.track.rank.logged_values import DeferredValue, checked_name, number_of, plain, step_of
from traceml.track.rank.logging_recorder import recorder_for_logging

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.settings import Config

__all__ = ["Logger", "deferred_values", "usual_writer"]

_log = logging.getLogger("traceml")

_time_ns = time.time_ns
_STEP, _TRAINING_THREAD, _LOGGED = int(Slot.STEP), int(Slot.TRAINING_THREAD), int(Slot.LOGGED)
_ROW_BYTES = METRICS.row_bytes
# Masked before they are stored; everything else is masked when it is delivered.
_MASKED = {"params", "tags"}

_Usual = Callable[[str, Any, int | None], bool]

_loggers: weakref.WeakSet[Logger] = weakref.WeakSet()


class Logger:
    """Logger of one experiment. Any thread may call it, also in a forked child.

    Its first call finds the recorder, or starts one. It does nothing while tracing is off.

    Args:
        experiment: the experiment's number; 0 is the run's own.
        announce: returns the fields of the experiment's row, given the settings in force, or None for no row. Each
            process that logs for the experiment appends that row first.

    Attributes:
        append_usual: appends a usual value, given its name, the value and the step or None, and returns whether it was
            one; `metric` takes every value. None before the first value, and where it is not built: it is in C. While
            tracing is off it takes all values and does nothing.
    """

    __slots__ = (
        "__weakref__",
        "_announce",
        "_at",
        "_buffer",
        "_count",
        "_deferred",
        "_entries",
        "_flight",
        "_is_off",
        "_lock",
        "_mask",
        "_masker",
        "_number",
        "_pack_into",
        "_ring",
        "_slot",
        "_slots",
        "append_usual",
    )

    def __init__(
        self, experiment: int = 0, announce: Callable[[Config], dict[str, Any] | None] = lambda _config: None
    ) -> None:
        self._number = experiment
        self._announce = announce
        self._entries: dict[str, list[int]] = {}  # name -> [its number, the next step where none is given]
        self._deferred: deque[tuple[Any, ...]] = deque()
        self._flight: FlightFile | None = None
        self._is_off = False  # until the recorder changes: a call then costs a fraction of the search for it
        self.append_usual: _Usual | None = None
        _loggers.add(self)

    def __repr__(self) -> str:
        return f"Logger(experiment={self._number}, names={len(self._entries)})"

    def metric(self, name: str, value: Any, step: int | None = None, kind: int = 0, t_ns: int = 0) -> None:
        """Append one value.

        Args:
            name: any text.
            value: a number, or an object that holds one (a tensor, a numpy scalar); anything else is kept as text.
            step: the step; by default the training step, else a counter per name.
            kind: source of the value: a number of `MetricKind`.
            t_ns: epoch nanoseconds; by default now.
        """
        try:
            entry = self._entries.get(name)
        except TypeError:  # it cannot be hashed, and is no name
            entry = None

        if entry is None:
            entry = self._enter(name)
            if entry is None:
                return

        self._note_progress()
        if step is None:
            step = self._slots[_STEP]
            if step < 0:
                step = entry[1]
                entry[1] = step + 1

        if type(value) is not float:
            value = number_of(value)
            if type(value) is not float:
                self._append_other(name, value, step, kind, t_ns or _time_ns())
                return

        if not t_ns:
            t_ns = _time_ns()

        ring, count, slot = self._ring, self._count, self._slot
        try:
            with self._lock:
                n = count[slot]
                if n < ring.limit:
                    at = self._at + (n & self._mask) * _ROW_BYTES
                    self._pack_into(self._buffer, at, t_ns, step, entry[0], value, kind, self._number)
                    if count[slot] == n:  # else a signal handler has just logged into the same slot
                        count[slot] = n + 1
                        return
        except struct.error:
            step = step_of(step)

        if not ring.append(t_ns, step, entry[0], value, kind, self._number):
            self._deferred.append((t_ns, step, entry[0], value, kind))

    def row(self, kind: str, *, step: int | None = None, t_ns: int = 0, **facts: Any) -> bool:
        """Append a map to `logged`; return whether it was taken.

        Args:
            kind: kind of the row; see `database.schema.LOGGED`.
            facts: its other fields, converted for msgpack.
        """
        flight = self._flight or self._bind()
        if flight is None:
            return False

        self._note_progress()
        fields = {"kind": kind, "t_ns": t_ns or _time_ns(), "experiment": self._number}
        if step is not None:
            fields["step"] = step

        values = {key: plain(value) for key, value in facts.items()}
        for key in _MASKED & values.keys():
            values[key] = self._masker.mask_value(key, values[key])

        row = fields | values
        return flight.log(LOGGED.name).append(row, urgent=True) or self._take_apart(row)

    def _take_apart(self, row: dict[str, Any]) -> bool:
        """Append what can be sent of a row that is too large for one frame; return whether all of it was taken."""
        size = len(pack_map(row))
        if size <= MAX_MAP_BYTES or self._flight is None:  # there was no room for it
            return False

        self._flight.log(LOGGED.name).dropped -= 1  # what is left out of it is told below
        for key in _MASKED:
            items = row.get(key, {})
            if len(items) > 1:
                parts: list[dict[str, Any]] = [{key: {name: value}} for name, value in items.items()]
                return all([self.row(key, t_ns=row["t_ns"], **part) for part in parts])  # noqa: C419 - each of them

        what, name = row["kind"], str(row.get("name") or next(iter(row.get(row["kind"], ("",))), ""))
        why = f"it has {size / 1e6:.1f} MB, and a row at most {MAX_MAP_BYTES / 1e6:.1f} MB. Log a file (log_artifact)"
        _log.warning("%s %r is not logged: %s", what, name[:200], why)
        self.row("refused", t_ns=row["t_ns"], name=name, what=what, why=why)
        return False

    @property
    def experiment(self) -> int:
        """The experiment's number."""
        return self._number

    @experiment.setter
    def experiment(self, number: int) -> None:
        self._number = number
        if self._flight is not None:
            self.append_usual = usual_writer(self._flight, self._entries, number)

    @property
    def values(self) -> int:
        """Number of values that this process has logged so far, for any experiment."""
        return 0 if self._flight is None else self._ring.appended + len(self._deferred)

    @property
    def has_begun(self) -> bool:
        """Whether it has found a recorder."""
        return self._flight is not None

    def begin(self) -> bool:
        """Find the recorder and announce the experiment, unless that is done; return whether anything is recorded."""
        return (self._flight or self._bind()) is not None

    def next_step(self, name: str, step: int | None) -> int:
        """Return the step of a value outside `metrics`: the given one, the training's, or a count per name."""
        if step is not None:
            return step_of(step)

        entry = self._entries.get(name) or self._enter(name)
        if entry is None:
            return 0

        current = self._slots[_STEP]
        if current >= 0:
            return int(current)

        entry[1] += 1
        return entry[1] - 1

    def flush_deferred(self, *, wait: bool = False) -> None:
        """Append deferred values, on the recorder's thread; with `wait`, wait for devices."""
        while self._deferred:
            t_ns, step, number, value, kind = self._deferred[0]
            if isinstance(value, DeferredValue):
                if not (wait or value.ready):
                    return

                value = value.number()

            self._ring.append(t_ns, step, number, value, kind, self._number)
            self._deferred.popleft()

    def unbind(self, *, forked: bool = False) -> None:
        """Forget the recorder; the next call finds another. In a forked child, deferred values belong to the parent."""
        self._entries = {}
        self._flight = self.append_usual = None
        self._is_off = False
        if forked:
            self._deferred.clear()

    def _note_progress(self) -> None:
        """Count what the training thread logs: another thread may log what the host does while the training hangs."""
        slots = self._slots
        if get_ident() == slots[_TRAINING_THREAD]:
            slots[_LOGGED] += 1

    def _enter(self, name: str) -> list[int] | None:
        """Return a new name's entry; None while nothing is recorded."""
        flight = self._flight or self._bind()
        if flight is None:
            return None

        number = flight.names.id_of(checked_name(name))
        if number is None:
            self._ring.dropped += 1
            return None

        return self._entries.setdefault(name, [number, 0])

    def _bind(self) -> FlightFile | None:
        if self._is_off and state.starter is None:
            return None

        recorder = recorder_for_logging()
        flight = recorder.flight if recorder is not None else None
        if recorder is None or flight is None:
            if state.recorder is not None and not (state.recorder.enabled or state.recorder.is_over):
                self._is_off, self.append_usual = True, _ignore

            return None

        ring = flight.metrics
        self._ring, self._slots = ring, flight.open_slots
        self._lock = ring.lock
        self._pack_into, self._buffer, self._at, self._mask = ring.pack_into, ring.buffer, ring.offset, ring.mask
        self._count, self._slot = ring.count, ring.slot
        self._masker = secrets_only(recorder.config.mask)
        self._flight = flight
        skip_leaf_code(__name__.rpartition(".")[0])
        self.append_usual = usual_writer(flight, self._entries, self._number)
        recorder.every_cycle(_flush_all)
        facts = self._announce(recorder.config)
        if facts is not None:
            self.row("experiment", **facts)

        return flight

    def _append_other(self, name: str, value: Any, step: int, kind: int, t_ns: int) -> None:
        """Append a value that is not a float: defer a tensor on a device, keep anything else as text."""
        if isinstance(value, DeferredValue):
            entry = self._entries.get(name)
            if entry is not None:
                self._deferred.append((t_ns, step_of(step), entry[0], value, kind))

            return

        self.row("value", step=step_of(step), t_ns=t_ns, name=name, value=value, source=kind)


def _ignore(_name: str, _value: Any, _step: int | None) -> bool:
    return state.starter is None  # else another thread starts a recorder, which takes the value


def usual_writer(flight: FlightFile, entries: dict[str, list[int]], experiment: int) -> _Usual | None:
    """Return the function that appends usual values to a flight file; None if it is not built.

    Args:
        entries: known names; see `Logger`.
    """
    native, ring = extension(), flight.metrics
    if native is None:
        return None

    memory = ring.buffer, ring.offset, ring.mask, ring.count, ring.slot
    writer: _Usual = native.metric_writer(
        entries, ring, ring.lock.acquire, ring.lock.release, flight.open_slots, memory, experiment
    )
    return writer


def deferred_values() -> int:
    """Return the number of values that wait for their device."""
    return sum(len(logger._deferred) for logger in list(_loggers))


def _flush_all(wait: bool) -> None:
    for logger in list(_loggers):
        logger.flush_deferred(wait=wait)


def _unbind_all(forked: bool) -> None:
    for logger in list(_loggers):
        logger.unbind(forked=forked)


on_change(_unbind_all)
