"""Relay of one run to another aggregator: a reader of its store, in the aggregator of a host.

The store is the only buffer: rows that could not be sent are read from it again. Each message has a number, and the
center confirms the last one whose rows it has stored. A new connection continues behind that message; rows that the
center has nevertheless are not sent or not stored again, as the rows of each rank are numbered.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from traceml.aggregator.run_facts import attempt_base
from traceml.database.schema import (
    DEVICE_STEPS,
    LINES,
    NAMES,
    PACKED,
    RELAYED_WHOLE,
    SAMPLED_TABLES,
    STEPS,
    TABLES,
    TELEMETRY,
)
from traceml.database.snapshots.rank_snapshot import ABORT, SNAPSHOT
from traceml.database.store.frame_compression import encode
from traceml.database.store.reader import Frame, StoreReader, StreamRecord
from traceml.diagnosis.merged_hosts.host_merger import STEPS_COMPARED, HostMerger, HostUpdate
from traceml.diagnosis.merged_hosts.host_sums import HostSums
from traceml.diagnosis.steps.representatives import HostChoice
from traceml.formatting import left_text
from traceml.ids import DEFAULT_PROJECT
from traceml.run_folder import STORE_NAME
from traceml.transport.client import Connection
from traceml.transport.hello import Hello

__all__ = ["RunRelay"]

# Telemetry counts the rows that a rank has appended, of which few are sent on.
_SAMPLES = frozenset(table.name for table in (*SAMPLED_TABLES, LINES))
_COMPARED = frozenset((STEPS.name, DEVICE_STEPS.name))
_CHOSEN = frozenset(table.name for table in PACKED) - RELAYED_WHOLE - {TELEMETRY.name}
_EVENTS = frozenset((SNAPSHOT, ABORT))
_EVENTS_SENT = 32  # in one message
_FRAMES = 256
_HISTORY_FRAMES = 4096  # read again, about a minute: ranks are compared over it, and some samples may wait
_MESSAGE_BYTES = 1 << 20
_MAX_UNSENT_BYTES = 4 << 20
_JOIN_S, _FLUSH_S = 5.0, 1.0
_TURN_S = 1.0  # for the rows of one run, until other runs have their turn


class _RelayedStream(msgspec.Struct):
    """A stream of the run, as far as it is sent."""

    rank: int
    attempt: int
    acked: dict[str, int] = {}  # by table, number of the next row that the center wants
    held: dict[str, list[Frame]] = {}  # by table, newest rows that were not sent, as its rank was not chosen
    is_joined: bool = False  # whether the center has admitted it on this connection
    is_ended: bool = False  # whether the center knows of its end


class RunRelay:
    """Sends a run to another aggregator.

    Args:
        host_id: distinguishes several aggregators of one host; the same after a restart.
        dial: connects to the center.
        safe: `safe` of an earlier relay of the run.

    Attributes:
        safe: id of a frame up to which the center has all.
    """

    def __init__(self, run_dir: Path, host_id: str, dial: Callable[[Hello], Connection], safe: int = 0) -> None:
        self.path = run_dir
        self._host_id, self._dial = host_id, dial
        self._link: Connection | None = None
        self._reader: StoreReader | None = None
        self._cursor = self.safe = safe
        self._event = 0  # the newest one that was read
        self._safe_event: int | None = None if safe else 0  # as `safe`, None before the first look
        self._number, self._stored = 0, 0
        self._marks: deque[tuple[int, int, int]] = deque()
        self._asked: frozenset[int] = frozenset()
        self._sent_rows = Counter[int]()
        self._samples_due_s, self._sample_interval_s = 0.0, 1.0
        self._is_caught_up = self._is_over = False
        self._streams: dict[int, _RelayedStream] = {}
        self._begin_attempt(-1)

    def __repr__(self) -> str:
        return f"<relay of {self.path.name}>"

    def poll(self) -> None:
        """Send what is new, connecting first where there is no connection. Call it once a second.

        Raises:
            AggregatorRefusedError: the center refuses this host.
            ConnectionError: the connection is lost; the next call makes another one.
            StoreError: the run's store cannot be read.
        """
        try:
            self._exchange(self._connected())
        except BaseException:
            self.disconnect()
            raise

    def finish(self, timeout_s: float) -> None:
        """Send what is new, and wait until it is stored there; see `poll`."""
        deadline_s = time.monotonic() + timeout_s
        self.poll()
        while not self._is_caught_up and time.monotonic() < deadline_s:
            self.poll()

        if not self.is_stored and self._link is not None:
            self._link.send({"t": "confirm"})

        while not self.is_stored and self._link is not None and (left_s := deadline_s - time.monotonic()) > 0:
            self._take(self._link.receive(left_s))

    @property
    def is_done(self) -> bool:
        """Whether the run is over, and all of it is stored in the center."""
        return self._is_over and self.is_stored

    @property
    def is_stored(self) -> bool:
        """Whether the center has stored all that was read of the run."""
        return self._is_caught_up and self._stored == self._number

    def disconnect(self) -> None:
        """Close the connection and the store."""
        self._is_caught_up = False
        if self._link is not None:
            self._link.close("relay ends")
            self._link = None

        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _connected(self) -> Connection:
        if self._link is None:
            self._reader = StoreReader(self.path / STORE_NAME)
            if self._safe_event is None:  # an earlier aggregator of this folder has sent those that are there
                self._safe_event = max((each.id for each in self._reader.events(0)), default=0)

            self._link = self._dial(self._hello())
            self._cursor, self._is_caught_up = max(self.safe - _HISTORY_FRAMES, 0), False
            self._event = self._safe_event
            self._number = self._stored = 0
            self._marks.clear()
            self._asked = frozenset()
            self._streams = {}
            self._begin_attempt(-1)

        return self._link

    def _begin_attempt(self, attempt: int, world_size: int = 1) -> None:
        """Begin to compare ranks anew: of another attempt, or of the same one over another connection."""
        self._attempt = attempt
        self._merger = HostMerger(self._host_id, world_size, self._sent_rows)
        self._choice: HostChoice | None = None

    def _exchange(self, link: Connection) -> None:
        assert self._reader is not None
        self._take(link.receive())
        run = self._reader.meta().get("run", {})  # before the rows: all of a run that has ended are there
        records = {record.id: record for record in self._reader.streams()}
        new = self._new(records.values())
        # The center admits a restarted rank after the end of the one before.
        if new and self._streams and not self._send_rest(link, self._reader, records, {each.id for each in new}):
            link.flush(_FLUSH_S)
            return

        is_first = not self._streams
        self._join(link, new, run)
        if is_first and not any(stream.acked for stream in self._streams.values()):
            self._cursor = self._event = 0  # a different center, or a new attempt

        self._is_caught_up = self._send_rest(link, self._reader, records)
        ended = all(stream.is_ended for stream in self._streams.values())
        self._is_over = self._is_caught_up and ended and run.get("ended") is not None
        if self.is_stored:
            self.safe, self._safe_event = self._cursor, self._event

        link.flush(_FLUSH_S)

    # --- ranks -------------------------------------------------------------------------------------------------------

    def _new(self, records: Iterable[StreamRecord]) -> list[StreamRecord]:
        """Return the ranks of the newest attempt that the center does not know, or that continue after their end."""
        ranks = [each for each in records if each.is_rank and not each.facts.get("relayed")]
        attempt = max((record.attempt for record in ranks), default=-1)
        newest = {record.rank: record for record in ranks if record.attempt == attempt}
        return [record for record in newest.values() if self._is_new(record)]

    def _is_new(self, record: StreamRecord) -> bool:
        known = self._streams.get(record.id)
        return known is None or (known.is_ended and record.state == "running")

    def _join(self, link: Connection, new: list[StreamRecord], run: dict[str, Any]) -> None:
        """Have the center admit ranks."""
        if new and new[0].attempt != self._attempt:
            if self._attempt >= 0:
                self._sent_rows.clear()

            self._begin_attempt(new[0].attempt, max(int(run.get("world_size", 1)), 1))

        for record in new:
            self._streams[record.id] = _RelayedStream(record.rank, record.attempt)
            self._merger.join(record.rank)
            link.send({"t": "rank", "id": record.id, "hello": _hello_of(record, run)})

        self._await_joined(link)

    def _await_joined(self, link: Connection) -> None:
        deadline_s = time.monotonic() + _JOIN_S
        while not all(stream.is_joined for stream in self._streams.values()):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"{link.address} has not admitted the ranks within {left_text(_JOIN_S)}")

            self._take(link.receive(left_s))

    def _ends(self, records: Mapping[int, StreamRecord]) -> list[list[Any]]:
        """Return the ranks that have ended since the last call, all of whose rows are sent."""
        ends = []
        newest = self._numbers_by_rank()
        for number, stream in self._streams.items():
            state, known = records[number].state, records[number].facts.get("exit", {})
            if state == "running" or stream.is_ended:
                continue

            stream.is_ended = True
            ends.append([number, state, known])
            if newest.get(stream.rank) == number:
                self._merger.end(stream.rank)

        return ends

    # --- rows --------------------------------------------------------------------------------------------------------

    def _send_rest(
        self, link: Connection, reader: StoreReader, records: Mapping[int, StreamRecord], but: Container[int] = ()
    ) -> bool:
        """Send the rows since the last call, for a second, and the ends of ranks; return whether there is no more.

        Args:
            records: its streams, read before.
            but: streams that the center does not know: their rows, and all after them, are left for later.
        """
        until_s = time.monotonic() + _TURN_S
        while link.unsent_bytes < _MAX_UNSENT_BYTES:
            whole: list[Frame] = []
            is_last = self._read(reader, records, but, whole)
            self._send(link, whole, [])
            if is_last:
                events = self._events(reader)
                for first in range(0, len(events), _EVENTS_SENT):
                    self._send(link, [], [], events=events[first : first + _EVENTS_SENT])

                ends = self._ends(records)
                self._send(link, [], ends, self._sums(reader) if ends else None)
                return True

            self._take(link.receive())
            if time.monotonic() >= until_s:
                break

        return False

    def _read(
        self, reader: StoreReader, records: Mapping[int, StreamRecord], but: Container[int], whole: list[Frame]
    ) -> bool:
        """Read rows for one message; return whether there are no more."""
        size = 0
        while size < _MESSAGE_BYTES:
            frames = reader.frames_of((*RELAYED_WHOLE, *_CHOSEN), self._cursor, _FRAMES)
            for frame in frames:
                if frame.stream in but or frame.stream not in records:
                    return True

                self._cursor, size = frame.id, size + len(frame.data)
                self._take_frame(frame, whole)

            if not frames:
                return True

        return False

    def _take_frame(self, frame: Frame, whole: list[Frame]) -> None:
        stream = self._streams.get(frame.stream)
        if stream is None or frame.thinned:
            return

        if frame.table in _COMPARED and stream.attempt == self._attempt:
            add = self._merger.add if frame.table == STEPS.name else self._merger.add_device
            add(stream.rank, frame.data)

        if frame.end > stream.acked.get(frame.table, 0):
            (whole if frame.table in RELAYED_WHOLE else stream.held.setdefault(frame.table, [])).append(frame)

    def _numbers_by_rank(self) -> dict[int, int]:
        """Return the number of the stream of each rank of this attempt."""
        return {stream.rank: number for number, stream in self._streams.items() if stream.attempt == self._attempt}

    def _sums(self, reader: StoreReader) -> list[Any]:
        """Return the sums of all steps of the attempt so far."""
        newest = self._numbers_by_rank()
        return HostSums.read(reader, {number: rank for rank, number in newest.items()}).to_row()

    def _events(self, reader: StoreReader) -> list[list[Any]]:
        """Return the events since the last call that tell what ranks without progress do, and that they were ended.

        Those of an earlier attempt are left out: the center would take them for events of the newest one.
        """
        found = reader.events(self._event)
        self._event = found[-1].id if found else self._event
        ours = [each for each in found if each.data.get("attempt", self._attempt) == self._attempt]
        asked = [(each.kind, each.data.get("stream"), each.data) for each in ours if each.kind in _EVENTS]
        return [[kind, number, data] for kind, number, data in asked if number is None or number in self._streams]

    def _send(
        self,
        link: Connection,
        whole: list[Frame],
        ends: list[list[Any]],
        sums: list[Any] | None = None,
        events: Sequence[list[Any]] = (),
    ) -> None:
        """Send one message, if there is anything to say."""
        update = self._merger.flush(self._asked)
        frames = [*whole, *self._chosen(update)]
        choice = None if update is None or update.choice.is_same(self._choice) else update.choice
        above = None if update is None or not len(update.above) else update.above.to_row()
        if choice is None and above is None and not frames and not ends and not events:
            return

        self._number += 1
        self._choice = choice or self._choice
        self._marks.append((self._number, self._cursor, self._event))
        link.send({
            "t": "update", "number": self._number, "rows": list(_packed(frames)),
            "choice": None if choice is None else choice.to_row(), "above": above, "ends": ends,
            "sums": sums, "events": list(events),
        })  # fmt: skip

    def _chosen(self, update: HostUpdate | None) -> list[Frame]:
        """Return the held rows of the chosen ranks; keep the newest ones of the others, for when they are chosen."""
        chosen: list[Frame] = []
        are_samples_due = time.monotonic() >= self._samples_due_s
        if are_samples_due:  # half an interval early: polls are about a second apart
            self._samples_due_s = time.monotonic() + self._sample_interval_s - 0.5

        for stream in self._streams.values():
            is_chosen = update is not None and stream.attempt == self._attempt and stream.rank in update.rows
            if is_chosen:
                waiting = frozenset() if are_samples_due or stream.is_ended else _SAMPLES
                chosen += [frame for table, frames in stream.held.items() if table not in waiting for frame in frames]
                stream.held = {table: frames for table, frames in stream.held.items() if table in waiting}
            else:
                stream.held = {table: _newest(frames) for table, frames in stream.held.items()}

        return chosen

    # --- messages of the center --------------------------------------------------------------------------------------

    def _take(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            kind = message["t"]
            if kind == "joined" and message.get("id") in self._streams:
                stream = self._streams[message["id"]]
                stream.acked, stream.is_joined = dict(message.get("acked", {})), True
                self._sample_interval_s = float(message.get("sample_interval_s", 1.0))
                if (stored := stream.acked.get(STEPS.name, 0)) > self._sent_rows[stream.rank]:
                    self._sent_rows[stream.rank] = stored
            elif kind == "stored":
                self._confirm(int(message["number"]))
            elif kind == "wanted":
                self._asked = frozenset(message["ranks"])

    def _confirm(self, number: int) -> None:
        self._stored = number
        while self._marks and self._marks[0][0] <= number:
            _, self.safe, self._safe_event = self._marks.popleft()

    def _hello(self) -> Hello:
        assert self._reader is not None
        run = self._reader.meta().get("run", {})
        return Hello(role="relay", run=_key(run), recorder=self._host_id, name=str(run.get("name", "")))


def _key(run: dict[str, Any]) -> str:
    """Return the job key of a run: where another run had it, its own id was added."""
    return str(run.get("job", "")).partition("#")[0]


def _hello_of(record: StreamRecord, run: dict[str, Any]) -> dict[str, Any]:
    """Return the hello that a rank has sent to this aggregator, as far as the center needs it."""
    facts, identity = record.facts, record.identity
    age_s = max(time.time() - float(run.get("started") or time.time()), 0.0)  # of the run, which began on this host
    hello = Hello(
        role="rank", run=_key(run), rank=identity.rank, world_size=int(facts.get("world_size", 1)),
        local_rank=int(facts.get("local_rank", 0)), attempt=max(identity.attempt - attempt_base(run, identity.host), 0),
        host=identity.host, pid=identity.pid, start_ticks=identity.start_ticks, recorder=identity.recorder,
        boot_id="", run_id=str(run.get("id", "")) if run.get("named") else "", name=str(run.get("name", "")),
        project=str(run.get("project", DEFAULT_PROJECT)), command=str(facts.get("command", "")),
        restarts_left=int(run.get("restarts_left") or 0), script_ms=int(1000 * age_s), schemas={},
        clock=tuple(facts.get("clock") or (0, 0)),
    )  # fmt: skip
    return asdict(hello)


def _newest(frames: list[Frame]) -> list[Frame]:
    """Return the newest frames, with as many rows as are compared; the first frame is cut."""
    rows = 0
    for at in range(len(frames) - 1, -1, -1):
        rows += frames[at].n
        if rows >= STEPS_COMPARED:
            return [frames[at].after(frames[at].end - STEPS_COMPARED), *frames[at + 1 :]]

    return frames


def _packed(frames: Iterable[Frame]) -> Iterator[list[Any]]:
    """Yield the rows of frames as a message has them, consecutive ones together; names come first."""
    ordered = sorted(frames, key=lambda frame: (frame.table != NAMES.name, frame.stream, frame.table, frame.seq))
    for (stream, table), group in groupby(ordered, key=lambda frame: (frame.stream, frame.table)):
        for run in _consecutive(group):
            codec, data = encode(TABLES[table], b"".join(frame.data for frame in run))
            yield [stream, table, run[0].seq, sum(frame.n for frame in run), int(codec), data]


def _consecutive(frames: Iterable[Frame]) -> Iterator[list[Frame]]:
    run: list[Frame] = []
    for frame in frames:
        if run and frame.seq != run[-1].end:
            yield run
            run = []

        run.append(frame)

    if run:
        yield run
