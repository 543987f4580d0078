"""Ingest of frames: check, drop repeated rows, store, acknowledge after the commit. Each row is stored once."""

from __future__ import annotations

import io
import logging
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

import msgpack
import msgspec

from traceml.aggregator.artifacts import Artifacts
from traceml.aggregator.streams.stream import RankStream
from traceml.database.info_kinds import wrong_fields
from traceml.database.schema import BLOBS, INFO, LOGGED, NAMES, TABLES, Table
from traceml.database.store.store import StoreWriter
from traceml.errors import ProtocolError, StoreError
from traceml.transport.framing import decode_log
from traceml.transport.server import RefusedError

if TYPE_CHECKING:
    from traceml.aggregator.live_rows import LiveRows

__all__ = ["Ingest", "IngestStatistics"]

_RETRY_S = 1.0
_REMIND_S = 60.0
_NOTICE_S = 10.0  # a rank gives up a connection after 30 s of silence
_STEP = struct.Struct("<q")
_SEQ_LIMIT = 2**62

_log = logging.getLogger("traceml")


def _layout(table: Any) -> tuple[int, int]:
    """Return (bytes per row, offset of the step in it), 0 for a log and -1 for a table without steps."""
    if not isinstance(table, Table):
        return 0, -1

    return table.row_bytes, 8 * table.index["step"] if "step" in table.index else -1


_LAYOUTS = {name: _layout(table) for name, table in TABLES.items()}


_Types = dict[str, type | tuple[type, ...]]
# Fields of logs that all readers of a store rely on: required ones, and others where a row has them.
_REQUIRED: dict[str, _Types] = {
    NAMES.name: {"id": int, "name": str}, LOGGED.name: {"kind": str},
}  # fmt: skip
_OPTIONAL: dict[str, _Types] = {
    LOGGED.name: {
        "t_ns": int, "step": int, "experiment": int, "params": dict, "tags": (dict, list), "facts": dict,
        "backends": list, "options": dict, "registered": dict, "sys_path": list, "environ": dict, "counts": list,
        "edges": list,
    },
    INFO.name: {"t_ns": int},
}  # fmt: skip


def _check_maps(table: str, maps: Sequence[Mapping[str, Any]]) -> None:
    """Check rows of a log, which other programs read from the store.

    Raises:
        ProtocolError: a field is missing, or has another type.
    """
    required, optional = _REQUIRED.get(table, {}), _OPTIONAL.get(table, {})
    for row in maps:
        wrong = [key for key, kind in required.items() if not isinstance(row.get(key), kind)]
        wrong += [key for key in row.keys() & optional if not isinstance(row[key], (optional[key], NoneType))]
        if wrong:
            raise ProtocolError(
                f"{wrong[0]!r} of a row of {table!r} is missing or of a wrong type: {row.get(wrong[0])!r:.50}"
            )


def _drop_wrong(row: dict[str, Any]) -> str:
    """Drop the fields of a row of `info` that no reader understands; return them with values, empty without any."""
    return ", ".join(f"{name}={row.pop(name)!r:.50} of {row['kind']!r}" for name in wrong_fields(row))


class IngestStatistics(msgspec.Struct, frozen=True):
    """Counts of rows stored, rows sent again after a reconnect, commits, and failed commits."""

    rows: int
    repeated: int
    commits: int
    failed_commits: int
    stalled: bool


class Ingest:
    """Ingest of one run's rows into its store and its live diagnosis.

    Args:
        pause_senders: pauses the run's ranks while the store cannot be written, for the given reason; with an empty
            one they resume.
    """

    def __init__(self, store: StoreWriter, live: LiveRows, pause_senders: Callable[[str], None]) -> None:
        self.artifacts = Artifacts(store.path.parent)
        self._store = store
        self._live = live
        self._pause_senders = pause_senders
        self._touched: dict[RankStream, None] = {}
        self._rows = self._repeated = self._commits = self._failed = 0
        self._failing_since_s: float | None = None
        self._retry_at_s = self._remind_at_s = self._notice_at_s = 0.0

    @property
    def stalled(self) -> bool:
        """Whether the last commit failed; rows then wait here and, with their senders paused, in the ranks."""
        return self._failing_since_s is not None

    @property
    def waiting(self) -> bool:
        """Whether rows wait for a commit."""
        return bool(self._touched) or self.stalled

    def statistics(self) -> IngestStatistics:
        """Return the counters."""
        return IngestStatistics(self._rows, self._repeated, self._commits, self._failed, self.stalled)

    def take(
        self, stream: RankStream, table: str, seq: int, n: int, data: bytes, packed: tuple[int, bytes] | None = None
    ) -> None:
        """Add `n` rows of a stream, the first of which has number `seq`.

        Args:
            seq: number of the first row.
            packed: codec and bytes of the same rows as the store has them, if they came so.

        Raises:
            RefusedError: there is no such table.
            ProtocolError: numbers and data do not match.
        """
        layout = _LAYOUTS.get(table) if type(table) is str else None
        if layout is None:
            raise RefusedError(f"unknown table {str(table)[:50]!r}")

        row_bytes, step_at = layout
        if type(seq) is not int or type(n) is not int or type(data) is not bytes or not 0 <= seq < _SEQ_LIMIT or n < 1:
            raise ProtocolError(f"a rows frame of {table!r} has no proper seq, n and data")

        if row_bytes and len(data) != n * row_bytes:
            raise ProtocolError(f"{n} rows of {table!r} are {n * row_bytes} bytes, not {len(data)}")

        wanted = stream.next.get(table, 0)
        if seq < wanted:
            seq, n, data = self._cut(stream, table, seq, n, data, wanted)
            packed = None
            if not n:
                return

        first, last = -1, -1
        if step_at >= 0:
            first = _STEP.unpack_from(data, step_at)[0]
            last = _STEP.unpack_from(data, len(data) - row_bytes + step_at)[0]
        elif not row_bytes:
            maps = decode_log(data)
            if len(maps) != n:
                raise ProtocolError(f"a rows frame of {table!r} does not hold {n} maps")

            _check_maps(table, maps)
            if table == BLOBS.name:
                data, packed = self._take_chunks(stream, maps), None
            elif table == INFO.name and any(dropped := [_drop_wrong(row) for row in maps]):
                data, packed = b"".join(map(msgpack.packb, maps)), None
                self._note_dropped(stream, dropped)

        self._store.append(stream.id, table, seq, n, data, first, last, packed)
        self._rows += n
        stream.next[table] = stream.unacked[table] = seq + n
        self._touched[stream] = None
        self._live.take(stream, table, data)

    def _note_dropped(self, stream: RankStream, dropped: list[str]) -> None:
        facts = "; ".join(filter(None, dropped))
        _log.warning("rank %d has sent facts of a wrong type, which are left out: %s", stream.rank, facts)

    def _take_chunks(self, stream: RankStream, maps: list[dict[str, Any]]) -> bytes:
        try:
            return self.artifacts.take(stream.id, maps)
        except OSError as error:
            if isinstance(error, ProtocolError):
                raise

            raise RefusedError(f"a file cannot be written: {error.strerror or error}", retry=True) from error

    def commit(self, *, force: bool = False) -> bool:
        """Commit and acknowledge; return whether nothing is left uncommitted.

        When the disk is full the rows stay in the store's buffer and in their ranks, and the next calls try again.

        Args:
            force: try at once even if the last try failed a moment ago.
        """
        if self.stalled and not force and time.monotonic() < self._retry_at_s:
            return False

        try:
            self._store.commit()
        except StoreError as error:
            self._fail(error)
            return False

        self._commits += 1
        if self.stalled:
            self._recover()

        for stream in self._touched:
            stream.acknowledge()

        self._touched.clear()
        return True

    def _cut(
        self, stream: RankStream, table: str, seq: int, n: int, data: bytes, wanted: int
    ) -> tuple[int, int, bytes]:
        """Drop rows that are stored already: after a reconnect a rank may send them again."""
        known = min(wanted - seq, n)
        self._repeated += known
        stream.unacked[table] = wanted  # the rank has not seen this ack
        self._touched[stream] = None
        return seq + known, n - known, _without_head(table, data, known)

    def _fail(self, error: StoreError) -> None:
        now_s = time.monotonic()
        self._failed += 1
        self._retry_at_s = now_s + _RETRY_S
        if self._failing_since_s is None:
            self._failing_since_s, self._remind_at_s, self._notice_at_s = now_s, now_s, now_s

        if now_s >= self._notice_at_s:
            self._notice_at_s = now_s + _NOTICE_S
            self._pause_senders(str(error))

        if now_s >= self._remind_at_s:
            self._remind_at_s = now_s + _REMIND_S
            _log.error("%s. The ranks keep their rows meanwhile; trying again every second", str(error).rstrip("."))

    def _recover(self) -> None:
        assert self._failing_since_s is not None
        _log.warning("the store can be written again after %.1f s", time.monotonic() - self._failing_since_s)
        self._failing_since_s = None
        self._pause_senders("")


def _without_head(table: str, data: bytes, rows: int) -> bytes:
    """Return what follows the first rows of a table.

    Raises:
        ProtocolError: the rows of a log are no msgpack.
    """
    row_bytes, _ = _LAYOUTS[table]
    if row_bytes:
        return data[rows * row_bytes :]

    unpacker = msgpack.Unpacker(io.BytesIO(data), max_buffer_size=max(len(data), 1))
    try:
        for _ in range(rows):
            unpacker.skip()
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"rows of a log are not msgpack: {error!r}") from error

    return data[unpacker.tell() :]
