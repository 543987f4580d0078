"""Sender of the rank's rows to the aggregator: a cursor per table, frames, resends, reconnects.

The ring is the only buffer. Sent rows stay there until they are acknowledged: after a reconnect the sender continues
where the aggregator's welcome says, and rows that the ring has overwritten meanwhile are counted exactly.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from traceml.clock import jittered, monotonic_ns, random_share
from traceml.clock import own_time as time
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import LINES, SAMPLED_TABLES
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError, ProtocolError
from traceml.formatting import left_text
from traceml.recorder.sending.send_cursor import SendCursor
from traceml.recorder.sending.uploads import FileUploader
from traceml.transport.client import ClockOffset, Connection
from traceml.transport.client_handshake import TemporaryRefusalError

__all__ = ["RowSender"]

_log = logging.getLogger("traceml")

_FRAME_ROWS = 64
_DIAL_TIMEOUT_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_REFUSED_PAUSE_S = 60.0
_CLOCK_INTERVAL_NS = 60 * 10**9
_CLOCK_AGAIN_NS = 5 * 10**9  # the aggregator had no core to answer: a short run would have no measurement
# A peer that is gone without a word keeps the connection open for hours: a relay, a cut network, a frozen host.
_SILENCE_NS, _LONGEST_SILENCE_NS = 30 * 10**9, 480 * 10**9
_FIRST_SECONDS_NS = 3 * 10**9  # the first rows go out at each wake: users wait for the first output
_LONGEST_SAMPLE_NS = 60 * 10**9
# No live verdict waits for these, so in a large job they are sent less often, as the welcome asks.
_SAMPLED = frozenset(table.name for table in (*SAMPLED_TABLES, LINES))
_NOT_STORED = "the aggregator cannot store rows now (%s); training continues"
_MISSING_WARNING_NS = 15 * 10**9  # without an aggregator since the start: longer than one needs to start

Command = Callable[[Mapping[str, Any]], Any]


class RowSender:
    """Sender of rows to one aggregator. Owned by one thread; no call blocks longer than its timeout.

    Args:
        dial: connects within this many seconds, or raises what `transport.client.connect` raises.
        flush_interval_s: longest time that a row waits.
        commands: commands that the aggregator may send to this rank, by name.
        files: uploader of files to the run's folder; their chunks are sent last.
        on_welcome: called with the aggregator's welcome after each connection.
        is_deferred: returns True as long as no aggregator is to be asked for.
        is_ending: returns True at the end: a connection that breaks then is tried again and no news, and a warning of
            its own tells what is not stored.
    """

    def __init__(
        self,
        flight: FlightFile,
        dial: Callable[[float], Connection],
        *,
        flush_interval_s: float = 1.0,
        commands: Mapping[str, Command] | None = None,
        files: FileUploader | None = None,
        on_welcome: Callable[[Mapping[str, Any]], None] = lambda _welcome: None,
        is_deferred: Callable[[], bool] = lambda: False,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self._dial, self._is_ending = dial, is_ending
        self._commands = commands or {}
        self._flush_ns = self._sample_flush_ns = int(flush_interval_s * 1e9)
        # Names before the rows that use them.
        self._logs = [SendCursor(log) for log in sorted(flight.logs.values(), key=lambda log: log.name != "names")]
        self._rings = [SendCursor(ring) for ring in flight.rings.values()]
        self._files, self._on_welcome, self._is_deferred = files, on_welcome, is_deferred
        self._blobs = [SendCursor(files.blobs)] if files is not None else []
        self._connection: Connection | None = None
        self._started_ns = self._flushed_ns = monotonic_ns()
        self._samples_flushed_ns = 0
        self._clock_due_ns = 0
        self._next_try_ns = 0
        self._pause_s = _FIRST_PAUSE_S
        self._acked: dict[str, int] = {}
        self._heard_ns = 0
        self._silence_ns = _SILENCE_NS
        self._refused = False
        self._warned: set[str] = set()
        self._closed_bytes = 0
        self._steps = flight.ring("steps")
        self._fast = [flight.ring(name) for name in ("steps", "metrics")]
        self._seen = {ring.name: 0 for ring in self._fast}
        self.dialed = threading.Event()
        """Set unless it waits for an aggregator to answer, which may start only then."""
        self.dialed.set()
        self.connections = 0
        """Number of connections so far."""
        self.trouble = ""
        """Reason why the last try to connect failed; empty while connected."""
        self.was_answered = False
        """Whether the last try to connect was answered, if only by a refusal."""
        self.clock: ClockOffset | None = None
        """Offset of the aggregator's clock, as measured last."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connection is not None

    @property
    def bytes_sent(self) -> int:
        """Bytes put on the wire so far, over all connections."""
        return self._closed_bytes + (self._connection.bytes_sent if self._connection else 0)

    @property
    def rows_lost(self) -> int:
        """Rows that were overwritten, or dropped by a full log, before they were stored."""
        return sum(cursor.table.dropped for cursor in self._cursors)

    @property
    def rows_appended(self) -> int:
        """Rows appended so far, all tables."""
        return sum(cursor.table.appended for cursor in self._cursors)

    @property
    def rows_acked(self) -> int:
        """Rows that are durable in the store, all tables, lost ones below them included."""
        return sum(cursor.table.acked for cursor in self._cursors)

    @property
    def steps_lost(self) -> int:
        """Steps that were overwritten before they were stored, exact after `finish`."""
        return self._rings[0].losses.rows

    @property
    def steps_waiting(self) -> int:
        """Steps in memory that are not stored."""
        steps = self._steps
        return steps.appended - steps.read_from(steps.acked, 1).first if steps.appended > steps.acked else 0

    @property
    def is_unknown(self) -> bool:
        """Whether this process has steps, and no aggregator has been asked to take them yet."""
        return bool(self._steps.appended) and not self.connections and not self.trouble

    @property
    def steps_sent(self) -> bool:
        """Whether any step is on the wire or stored."""
        return self._rings[0].sent > 0

    @property
    def all_stored(self) -> bool:
        """Whether everything that was appended is acknowledged."""
        return all(cursor.table.acked >= cursor.table.appended for cursor in self._cursors)

    @property
    def _cursors(self) -> list[SendCursor]:
        return self._logs + self._rings + self._blobs

    @property
    def _kept(self) -> str:
        """Text for warnings: rows that are kept without an aggregator. A child that only logs keeps almost no steps."""
        steps = f"the last {self._steps.capacity:,} steps and " if self._steps.capacity >= _FRAME_ROWS else ""
        return f"{steps}all logged values are kept"

    def note_warned(self, error: AggregatorUnavailableError | AggregatorRefusedError) -> None:
        """Note that the user was warned already that no aggregator answers, or that it refuses."""
        self._warned.add("refused" if isinstance(error, AggregatorRefusedError) else "missing")

    def attach(self, connection: Connection) -> None:
        """Use a new connection, and continue at the rows that its welcome asks for."""
        self._connection = connection
        self._acked = dict(connection.acked)
        self.connections += 1
        self.trouble = ""
        self._pause_s = _FIRST_PAUSE_S
        self._flushed_ns = self._clock_due_ns = 0
        self._heard_ns = monotonic_ns()
        for cursor in self._cursors:
            cursor.resume(connection.acked.get(cursor.table.name, 0))

        self._pace_samples(connection.welcome.get("sample_interval_s"))
        self._on_welcome(connection.welcome)
        if self._files is not None:
            self._files.connected(connection.welcome)

    def detach(self, reason: str | None = None) -> None:
        """Close the connection, if any, and connect again at once; with a reason, say bye first."""
        if self._connection is not None:
            _log.debug("closing the connection: %s", reason or "no bye")
            self._closed_bytes += self._connection.bytes_sent
            self._connection.close(reason)
            self._connection = None

        self._next_try_ns = 0

    def abandon(self) -> None:
        """Close the connection in a forked child: while the child holds it, the parent's end cannot be detected."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def pump(self, *, flush: bool = False) -> None:
        """Run one cycle: connect if that is due, read answers, send the rows that are due (all, with `flush`)."""
        if self._connection is None and not self._reconnect():
            return

        try:
            self._exchange(flush)
        except (OSError, ProtocolError) as error:
            self._disconnected(error)

    def pause_s(self, usual_s: float) -> float:
        """Return the time to sleep: less than usual if a ring would fill by more than a quarter in that time."""
        if self._connection is not None and self._connection.unsent_bytes:
            return min(usual_s, 0.05)

        for ring in self._fast:
            grown, self._seen[ring.name] = ring.appended - self._seen[ring.name], ring.appended
            usual_s = min(usual_s, usual_s * ring.capacity / 4 / max(grown, 1))

        return max(0.01, usual_s)

    def finish(self, reason: str, *, timeout_s: float, keep_trying: bool) -> bool:
        """Send everything, say bye, and wait until it is stored; return whether it is.

        Args:
            keep_trying: keep trying for that long when no aggregator answers; else try once.
        """
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            self._next_try_ns = 0
            self.pump(flush=True)
            connection = self._connection
            if connection is None:
                if self._refused or not keep_trying:
                    break

                time.sleep(min(0.1, left_s))
            elif connection.unsent_bytes or any(c.sent < c.table.appended for c in self._cursors):
                self._await(min(left_s, 0.1))
            elif self._say_bye(connection, reason, left_s):
                break

        self.detach()
        if not self.all_stored:
            self._rings[0].count_overwritten()

        return self.all_stored

    def _exchange(self, flush: bool) -> None:
        connection = self._connection
        assert connection is not None
        self._take_answers(0.0)
        now = monotonic_ns()
        self._check_silence(now)
        if now >= self._clock_due_ns:
            measured = connection.measure_clock()
            self._clock_due_ns = now + (_CLOCK_AGAIN_NS if measured is None else _CLOCK_INTERVAL_NS)
            self.clock = measured or self.clock

        if connection.unsent_bytes:
            return  # the aggregator is behind: rows wait in the ring, not in a second buffer

        early = now - self._started_ns < _FIRST_SECONDS_NS
        all_now = flush or early or now - self._flushed_ns >= self._flush_ns
        samples_now = flush or now - self._samples_flushed_ns >= self._sample_flush_ns
        samples_now |= all_now and self._sample_flush_ns <= self._flush_ns
        if all_now:
            self._flushed_ns = now

        if samples_now:
            self._samples_flushed_ns = now

        self._send(1 if all_now else _FRAME_ROWS, 1 if samples_now else _FRAME_ROWS)

    def _check_silence(self, now_ns: int) -> None:
        """Give up a connection on which rows have waited too long for an acknowledgement.

        Raises:
            ConnectionError: nothing was heard for that long.
        """
        connection = self._connection
        assert connection is not None
        if not connection.unsent_bytes and all(cursor.sent <= cursor.table.acked for cursor in self._cursors):
            self._heard_ns = now_ns

        silent_ns = now_ns - self._heard_ns
        if silent_ns > self._silence_ns:
            # An aggregator that is only slow is not asked so soon again, least of all by thousands of ranks.
            self._silence_ns = min(2 * self._silence_ns, _LONGEST_SILENCE_NS)
            raise ConnectionError(f"no answer for {left_text(silent_ns / 1e9)}")

    def _pace_samples(self, interval_s: Any) -> None:
        """Send samples as seldom as the aggregator asks, each rank at another time."""
        asked_ns = int(interval_s * 1e9) if isinstance(interval_s, int | float) else 0
        self._sample_flush_ns = max(self._flush_ns, min(asked_ns, _LONGEST_SAMPLE_NS))
        self._samples_flushed_ns = monotonic_ns() - int(random_share() * self._sample_flush_ns)

    def _send(self, at_least: int, samples: int) -> None:
        """Send every table with at least this many waiting rows or samples."""
        connection = self._connection
        assert connection is not None
        least = dict.fromkeys(_SAMPLED, samples)
        # The rings' ends are read before the names': the name of each row below its end is already in the log.
        ends = [(cursor, cursor.table.appended, least.get(cursor.table.name, at_least)) for cursor in self._rings]
        due = [(cursor, end) for cursor, end, wanted in ends if end - cursor.sent >= wanted]
        logs = [(cursor, cursor.table.appended) for cursor in self._logs] if due or at_least == 1 else []
        blobs = [(cursor, cursor.table.appended) for cursor in self._blobs]
        for cursor, end in logs + due + blobs:
            for first, n, data in cursor.frames(end):
                connection.send_rows(cursor.table.name, first, n, data)
                if connection.unsent_bytes:
                    return

    def _take_answers(self, timeout_s: float) -> None:
        connection = self._connection
        assert connection is not None
        messages = connection.receive(timeout_s)
        for message in messages:
            if message["t"] == "command":
                connection.send(_reply(message, self._commands))
            elif message["t"] == "stalled":
                self._warn_once("stalled", _NOT_STORED + f", and {self._kept} until it can", message.get("why"))

        is_acked = connection.acked != self._acked
        if messages or is_acked:
            self._heard_ns, self._silence_ns = monotonic_ns(), _SILENCE_NS

        if is_acked:
            self._acked = dict(connection.acked)
            for cursor in self._cursors:
                cursor.table.acked = min(self._acked.get(cursor.table.name, 0), cursor.table.appended)

    def _await(self, timeout_s: float) -> None:
        """Wait until the socket takes more bytes, or for answers."""
        try:
            self._take_answers(timeout_s)
        except (OSError, ProtocolError) as error:
            self._disconnected(error)

    def _say_bye(self, connection: Connection, reason: str, timeout_s: float) -> bool:
        """Say bye; return whether the aggregator has everything. After a broken connection another try may follow."""
        try:
            connection.finish(reason, timeout_s=timeout_s)
        except (OSError, ProtocolError) as error:
            _log.debug("the connection broke while the bye was sent: %s", error)

        for cursor in self._cursors:
            cursor.table.acked = min(connection.acked.get(cursor.table.name, 0), cursor.table.appended)

        self.detach()
        return self.all_stored

    def _reconnect(self) -> bool:
        now = monotonic_ns()
        if now < self._next_try_ns:
            return False

        if self._is_deferred():
            self._started_ns = now
            return False

        try:
            self.dialed.clear()
            self.attach(self._dial(_DIAL_TIMEOUT_S))
        except AggregatorRefusedError as error:
            self._refused = self.was_answered = True
            self.trouble = str(error)
            self._warn_once("refused", f"%s; {self._kept}, and the connection is retried every minute", error)
            self._retry_after(_REFUSED_PAUSE_S)
            return False
        except AggregatorUnavailableError as error:
            _log.debug("%s", error)
            self.trouble, self.was_answered = error.reason, error.refused
            if not self.connections and now - self._started_ns > _MISSING_WARNING_NS:
                self._warn_once(
                    "missing",
                    f"no aggregator answers yet (%s); {self._kept} until one does",
                    error.reason.rstrip("."),
                )
            self._retry_after(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return False
        finally:
            self.dialed.set()

        if self.connections > 1:
            _log.info("reconnected to the aggregator")

        return True

    def _disconnected(self, error: Exception) -> None:
        refused = isinstance(error, AggregatorRefusedError)
        if isinstance(error, TemporaryRefusalError):
            self._warn_once("stalled", _NOT_STORED + f", {self._kept}, and the connection is retried", error)
        elif self._is_ending():
            _log.debug("the connection broke at the end: %s", error)
        else:
            self._warn_once(
                "lost",
                f"lost the aggregator (%s); training continues, {self._kept}, and the connection is retried",
                error,
            )

        self.detach()
        # A thousand ranks that lost one aggregator must not reconnect in the same instant.
        self._retry_after(_REFUSED_PAUSE_S if refused else _FIRST_PAUSE_S)

    def _retry_after(self, pause_s: float) -> None:
        _log.debug("the next try to connect follows after at most %.1f s", pause_s)
        self._next_try_ns = monotonic_ns() + int(jittered(pause_s) * 1e9)

    def _warn_once(self, key: str, text: str, error: object) -> None:
        _log.log(logging.DEBUG if key in self._warned else logging.WARNING, text, error)
        self._warned.add(key)


def _reply(message: Mapping[str, Any], commands: Mapping[str, Command]) -> dict[str, Any]:
    """Run a command of the aggregator; return the answer."""
    name = str(message.get("name"))
    answer: dict[str, Any] = {"t": "reply", "id": message.get("id")}
    command = commands.get(name)
    if command is None:
        return answer | {"error": f"this rank knows no command {name!r}; it knows {', '.join(commands)}"}

    try:
        return answer | {"result": command(message.get("args") or {})}
    except Exception as error:  # noqa: BLE001 - the error goes back as the answer
        return answer | {"error": f"{type(error).__name__}: {error}"}
