"""Rows as they arrive, for the live verdict: one scatter per tick for all ranks, one diagnosis a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from traceml.aggregator.streams import Stream
from traceml.database.schema import DEVICE_STEPS, HOST, INFO, NAMES, PROCESS, STEPS, USER_PHASES, Table
from traceml.diagnosis.job_facts import JobFactsBuilder, RankExit
from traceml.diagnosis.window import StepWindow, slots_for
from traceml.transport.framing import decode_log

__all__ = ["LiveRows"]

_OF_THE_STREAM = (NAMES.name, INFO.name)  # these tell of the stream itself, whether or not the window shows it
_ROOM_FOR_RANKS = 16384  # made at once; a larger world grows as its ranks come


class _RowBatch:
    """Frames of one packed table that wait for the next scatter."""

    __slots__ = ("counts", "parts", "ranks", "table")

    def __init__(self, table: Table) -> None:
        self.table = table
        self.ranks: list[int] = []
        self.counts: list[int] = []
        self.parts: list[bytes] = []

    def add(self, stream: Stream, n: int, data: bytes) -> None:
        self.ranks.append(stream.rank)
        self.counts.append(n)
        self.parts.append(data)

    def empty(self, into: Callable[[Any, Any], None]) -> int:
        """Hand all rows on in one call; return how many they were."""
        rows = np.frombuffer(b"".join(self.parts), self.table.dtype)
        into(np.repeat(np.array(self.ranks, np.int64), self.counts), rows)
        for waiting in (self.ranks, self.counts, self.parts):
            waiting.clear()

        return len(rows)


class LiveRows:
    """The newest steps of a run's ranks, and the facts that explain them.

    Args:
        world_size: ranks in the run, as far as it is known.
    """

    def __init__(self, world_size: int) -> None:
        self.facts = JobFactsBuilder(world_size)
        self.resize(world_size)
        self.fresh = False
        """Whether something came since the last diagnosis."""
        self._steps = _RowBatch(STEPS)
        self._device = _RowBatch(DEVICE_STEPS)
        self._takers: dict[str, Callable[[Stream, int, bytes], None]] = {
            STEPS.name: self._steps.add,
            DEVICE_STEPS.name: self._device.add,
            USER_PHASES.name: self._take_user_phases,
            PROCESS.name: self._take_process,
            HOST.name: self._take_host,
            NAMES.name: self._take_names,
            INFO.name: self._take_info,
        }

    def resize(self, world_size: int) -> None:
        """Start new windows for another number of ranks: how many steps are kept depends on it."""
        self.window = StepWindow(slots_for(world_size), min(world_size, _ROOM_FOR_RANKS))
        self.facts.world_size = world_size

    def join(self, stream: Stream) -> None:
        """Let a rank in; what an earlier incarnation of it left in the window is forgotten."""
        self.facts.host(stream.rank, stream.who.host)
        self.window.clear(stream.rank)

    def end(self, stream: Stream) -> None:
        """Note how a rank ended; the others' steps are no longer compared with it."""
        self.facts.exit(RankExit.of(stream.rank, str(stream.state), stream.exit, stream.who.host))
        self.window.end(stream.rank)
        self.fresh = True

    def take(self, stream: Stream, table: str, n: int, data: bytes) -> None:
        """Take rows which the store has taken."""
        taker = self._takers.get(table)
        if taker is not None and (stream.in_window or table in _OF_THE_STREAM):
            taker(stream, n, data)

    def scatter(self) -> None:
        """Put what came since the last tick into the windows."""
        if self._steps.parts:
            self._steps.empty(self.window.scatter)
            self.fresh = True

        if self._device.parts:
            self._device.empty(self.window.scatter_device)

    def _take_user_phases(self, stream: Stream, n: int, data: bytes) -> None:  # noqa: ARG002
        self.window.scatter_user(stream.rank, np.frombuffer(data, USER_PHASES.dtype), stream.names)

    def _take_process(self, stream: Stream, n: int, data: bytes) -> None:  # noqa: ARG002
        self.facts.process_rows(stream.rank, np.frombuffer(data, PROCESS.dtype))

    def _take_host(self, stream: Stream, n: int, data: bytes) -> None:  # noqa: ARG002
        self.facts.host_rows(stream.rank, np.frombuffer(data, HOST.dtype))

    def _take_names(self, stream: Stream, n: int, data: bytes) -> None:  # noqa: ARG002
        for row in decode_log(data):
            if isinstance(row.get("id"), int) and isinstance(row.get("name"), str):
                stream.names[row["id"]] = row["name"]

    def _take_info(self, stream: Stream, n: int, data: bytes) -> None:  # noqa: ARG002
        for row in decode_log(data):
            if row.get("kind") == "exit":
                # Kept with the stream too: how a rank ended is asked for when its connection is gone.
                stream.exit.update({key: value for key, value in row.items() if key not in ("kind", "t_ns")})
            elif stream.in_window:
                self.facts.info(stream.rank, row)
