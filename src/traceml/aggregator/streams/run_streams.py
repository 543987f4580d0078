"""The streams of a run: added, connected and ended, with their states in the store."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from traceml.aggregator.ingest import Ingest
from traceml.aggregator.live_rows import LiveRows
from traceml.aggregator.run_facts import RunFacts
from traceml.aggregator.streams.admission import Admission
from traceml.aggregator.streams.stream import Incarnation, RankStream, StreamPeer, StreamState
from traceml.aggregator.streams.stream_ends import note_oom, resumed_at
from traceml.aggregator.streams.stream_table import StreamTable
from traceml.database.info_kinds import InfoKind
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.records import names_of
from traceml.database.store.store import StoreWriter
from traceml.database.store.store_file import last_written_s
from traceml.diagnosis.facts.ends import ATTEMPT
from traceml.run_folder import PAGE_NAME, REPORT_NAME, RUN_FOLDERS, STORE_NAME
from traceml.transport.hello import WORLD_LIMIT, Hello

__all__ = ["RunStreams"]

# All ranks together send at most about this many frames of samples per table.
_SAMPLE_FRAMES_PER_S = 100
_LONGEST_SAMPLES_S = 60.0

_log = logging.getLogger("traceml")


class RunStreams:
    """A run's store, its streams and their states; `ActiveRun` adds its life."""

    def __init__(self, path: Path, key: str, *, named: bool) -> None:
        self.path = path
        self.key = key
        self.named = named
        self._table = StreamTable()
        self._touched_s = time.monotonic()
        # A run that this aggregator only finishes ended with the last sign of its ranks, perhaps days ago.
        self._is_attended = False
        self._signs_s: list[float] = []
        self._last_written_s = last_written_s(path / STORE_NAME)
        self._ended_by: dict[str, Any] = {}  # signal that ended the newest attempt; see `ActiveRun.note_ending`
        self._facts = RunFacts(path.name, key, named=named)
        self.admission = Admission(self._facts, self._table, named=named, on_helper=self._note_helper)
        self.store = StoreWriter(path / STORE_NAME)
        for folder in RUN_FOLDERS:
            with suppress(OSError):  # where a file needs it, it is made with an error that says why not
                (path / folder).mkdir(exist_ok=True)

        self.live = LiveRows(1)
        self.live.on_loaded = self._note_loaded
        self.ingest = Ingest(self.store, self.live, self._pause_senders)
        self._resume()
        self._facts.write(self.store)

    @property
    def id(self) -> str:
        """Its folder's name."""
        return self.path.name

    @property
    def state(self) -> str:
        """running, finished, stopped, failed, hung or lost, as of `RunStatus`."""
        return self._facts.state

    @property
    def about(self) -> dict[str, str]:
        """Its name and project."""
        return {name: str(self._facts.values.get(name, "")) for name in ("name", "project")}

    @property
    def ended(self) -> bool:
        """Whether it is over; a rank that reconnects opens it again."""
        return self._facts.ended

    @property
    def attempt(self) -> int:
        """The newest attempt of any rank."""
        return self._facts.attempt

    @property
    def world_size(self) -> int:
        """Number of ranks of the newest attempt."""
        return self._facts.world_size

    @property
    def started_s(self) -> float:
        """Its start, epoch seconds."""
        return float(self._facts.values["started"])

    @property
    def now_s(self) -> float:
        """Epoch seconds of this moment, by its own clock."""
        return self._facts.now_s()

    @property
    def sample_interval_s(self) -> float:
        """Longest time that a rank holds its samples."""
        return min(max(1.0, self.world_size / _SAMPLE_FRAMES_PER_S), _LONGEST_SAMPLES_S)

    @property
    def streams(self) -> list[RankStream]:
        """All streams, in the order in which they came."""
        return self._table.all

    @property
    def connected(self) -> list[RankStream]:
        """The streams that are connected now."""
        return [stream for stream in self.streams if stream.connected]

    @property
    def connected_ranks(self) -> list[RankStream]:
        """Those of them that are diagnosed ranks, each its rank's newest incarnation."""
        return [stream for stream in self.connected if stream.is_diagnosed and not stream.is_helper]

    @property
    def is_connected(self) -> bool:
        """Whether any rank is connected now."""
        return any(stream.connected for stream in self.streams)

    @property
    def is_complete(self) -> bool:
        """Whether each rank of the newest attempt has connected."""
        return bool(self.streams) and len(self._table.of_attempt(self.attempt)) >= self.world_size

    def has_rank(self, rank: int) -> bool:
        """Return whether a rank of the newest attempt has connected."""
        return self._table.of_rank(self.attempt, rank) is not None

    def lacks(self, identity: Mapping[str, Any]) -> bool:
        """Return whether a rank of the newest attempt has not connected."""
        attempt = self._facts.attempt_of(int(identity.get("attempt") or 0), str(identity.get("host", "")))
        return attempt == self.attempt and self._table.of_rank(attempt, identity["rank"]) is None

    def expect(self, identity: Mapping[str, Any]) -> None:
        """Set world size and hang timeout, if no rank has connected, from the flight file of one that never did.

        Args:
            identity: of its flight file.
        """
        world_size, timeout_s = identity.get("world_size"), identity.get("hang_timeout_s")
        if self.streams or not (isinstance(world_size, int) and isinstance(timeout_s, int | float)):
            return

        before = dict(self._facts.values)
        if self.world_size < world_size <= WORLD_LIMIT:
            self._resize(world_size)

        self._facts.values["hang_timeout_s"] = float(timeout_s)
        self.live.set_hang_rule(float(timeout_s), aborts=identity.get("on_hang") == "abort")
        if self._facts.values != before:
            self._facts.write(self.store)

    def stream_of(self, incarnation: Incarnation, rank: int) -> RankStream | None:
        """Return the stream of a recorder that was connected before."""
        return self._table.of_process(incarnation, rank)

    def join(self, hello: Hello, attempt: int, peer: StreamPeer) -> RankStream:
        """Add a new rank, or a helper of one, to an attempt.

        Raises:
            StoreError: the store cannot be written.
        """
        self._reopen()
        if hello.spawned_by and hello.world_size > 1:
            self._table.starters.add(hello.spawned_by)

        if self.admission.has_started_ranks(hello):
            self._facts.begin_with(hello)
            self._facts.write(self.store)

        if self.admission.is_helper(hello):
            stream = self._add_stream(
                attempt, hello.rank, Incarnation.from_hello(hello), hello.local_rank, hello.flight, is_helper=True
            )
            self.connect(stream, hello, peer)
            return stream

        self._update_facts(hello, attempt)  # first: the windows that the stream joins are sized by the world
        stream = self._add_stream(attempt, hello.rank, Incarnation.from_hello(hello), hello.local_rank, hello.flight)
        self.store.update_stream(
            stream.id, world_size=hello.world_size, started=self._facts.now_s(), command=hello.command[:1000]
        )
        self.connect(stream, hello, peer)
        return stream

    def connect(self, stream: RankStream, hello: Hello, peer: StreamPeer) -> None:
        """Connect a stream, new or known."""
        self._reopen()
        if stream.ended:
            _log.info("%r has reconnected", stream)
            if stream.state is StreamState.LOST and stream.is_diagnosed:
                self.live.join(stream)

        self._is_attended = True
        stream.state = StreamState.RUNNING
        stream.flight = hello.flight
        stream.connect(peer)
        self._table.disconnected.pop(stream, None)
        self.store.update_stream(stream.id, state="running", flight=hello.flight, clock=list(hello.clock))
        if self.ingest.stalled:
            peer.pause(True)

    def disconnected(self, stream: RankStream) -> None:
        """Record that a connection is gone."""
        stream.disconnect()
        self._touched_s = time.monotonic()
        if not stream.ended:
            self._table.disconnected[stream] = None

    def _note_helper(self, stream: RankStream) -> None:
        self.store.update_stream(stream.id, helps=True)

    def _note_loaded(self, stream: RankStream, row: dict[str, Any]) -> None:
        """Store where a restarted rank continues, if what it has read is a checkpoint of an earlier attempt."""
        if isinstance(row.get("place"), int):
            stream.loaded.add(row["place"])
            self._note_resumed(stream)

    def _note_resumed(self, stream: RankStream) -> None:
        at = max((resumed_at(stream, place, self.streams) for place in stream.loaded), default=0)
        if at > stream.resumes_at:
            stream.resumes_at = at
            self.store.update_stream(stream.id, resumes_at=at)
            self.live.note_checkpoint(stream)

    def _pause_senders(self, why: str) -> None:
        """Stop reading from ranks, and send them the reason; without one resume."""
        for stream in self.connected:
            if stream.peer is not None:
                stream.peer.pause(bool(why))
                if why:
                    stream.peer.send({"t": "stalled", "why": why})

    def _update_facts(self, hello: Hello, attempt: int) -> None:
        """Update the run's facts from a rank's hello."""
        facts, before = self._facts, dict(self._facts.values)
        if attempt > self.attempt:
            facts.values["attempt"] = attempt
            self.live.begin_attempt()
            self._ended_by = {}  # it ended the attempt before, or a node of that
            self.store.event(ATTEMPT, {"attempt": attempt})
            for stream in self.streams:
                stream.is_diagnosed = stream.attempt >= attempt and not stream.is_helper

        if attempt >= self.attempt and hello.world_size != self.world_size:
            self._resize(hello.world_size)

        if not self.streams:
            facts.name_after(hello)

        facts.add_rank(hello, attempt)
        if facts.values != before:  # most of ten thousand ranks change nothing
            facts.write(self.store)

    def _resize(self, world_size: int) -> None:
        self._facts.values["world_size"] = world_size
        self.live.resize(world_size)

    def _add_stream(
        self,
        attempt: int,
        rank: int,
        incarnation: Incarnation,
        local_rank: int,
        flight: str,
        *,
        is_helper: bool = False,
    ) -> RankStream:
        identity = StreamIdentity(
            rank, attempt, incarnation.host, incarnation.pid, incarnation.start_ticks, incarnation.recorder
        )
        number = self.store.stream(
            identity, state="running", local_rank=local_rank, boot_id=incarnation.boot, flight=flight
        )
        stream = RankStream(number, rank, attempt, incarnation, flight=flight)
        self.store.update_stream(number, seen_here=stream.seen_here)
        stream.is_diagnosed = attempt >= self.attempt
        stream.is_helper = is_helper
        self._table.add(stream)
        if is_helper:
            self._note_helper(stream)
        else:
            self.live.join(stream)

        return stream

    def _end_stream(self, stream: RankStream, state: StreamState, *, is_total_known: bool = True) -> None:
        """Set the final state of a rank.

        Args:
            is_total_known: whether it is known how many rows the rank appended, so that missing ones can be counted.
        """
        stream.state = state
        self._table.disconnected.pop(stream, None)
        self._touched_s = time.monotonic()
        # Who only finishes a run, perhaps days later, has not seen its end.
        ended_s = self._facts.now_s() if self._is_attended else max(self._signs_s, default=self._last_written_s)
        if state is not StreamState.FINISHED:
            stream.exit.setdefault("at_s", stream.exit.get("reported_s", ended_s))
            note_oom(stream)

        stream.exit.pop("unsent", None)
        if not is_total_known:
            stream.exit["unsent"] = True

        ended = {"ended": ended_s, "exit": stream.exit, "total_unknown": not is_total_known}
        self.store.update_stream(stream.id, state=str(state), **ended)
        self.store.event("rank", {"rank": stream.rank, "attempt": stream.attempt, "state": str(state),
                                  "exit": stream.exit})  # fmt: skip
        if stream.is_diagnosed:
            self.live.end(stream)
        if stream.attempt < self.attempt and "saved_in" in stream.exit:  # its checkpoint may have been read since
            for later in sorted(self.streams, key=lambda each: each.attempt):
                if later.attempt > stream.attempt:
                    self._note_resumed(later)

    def _reopen(self) -> None:
        """Open the store of a run that was over, because a rank has reconnected."""
        if not self.ended:
            return

        self.store = StoreWriter(self.path / STORE_NAME)
        self.live.resize(self.world_size)
        self.ingest = Ingest(self.store, self.live, self._pause_senders)
        self._continue()
        self._touched_s = time.monotonic()
        self._facts.write(self.store)

    def _resume(self) -> None:
        """Continue a store that an earlier aggregator began."""
        with StoreReader(self.path / STORE_NAME) as reader:
            facts = reader.meta().get("run")
            if facts is None:
                return

            self._facts.values |= facts
            self.live.resize(self.world_size)
            for stream in restored_streams(reader, self.store):
                stream.is_diagnosed = stream.attempt >= self.attempt
                self._table.add(stream)
                if not stream.ended:
                    self._table.disconnected[stream] = None

                self.live.resume(stream)

            ends = [facts.get("ended"), *(record.facts.get("ended") for record in reader.streams())]
            self._signs_s += [float(end) for end in ends if end is not None]

        self._continue()
        self.store.event("resumed", {"was": facts["state"]})

    def _continue(self) -> None:
        """Remove the end of the run, and the reports of it: readers take the store until there are new ones."""
        self._facts.reopen()
        for name in (REPORT_NAME, PAGE_NAME):
            with suppress(OSError):
                (self.path / name).unlink()


def restored_streams(reader: StoreReader, store: StoreWriter) -> Iterator[RankStream]:
    """Yield the streams of a store as they were, disconnected."""
    names: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for number, row in reader.log_rows("names"):
        names[number].update(names_of([row]))

    exits: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for number, row in reader.log_rows("info"):
        if row.get("kind") == InfoKind.EXIT:
            exits[number] |= {key: value for key, value in row.items() if key not in ("kind", "t_ns")}

    for record in reader.streams():
        facts, identity = record.facts, record.identity
        incarnation = Incarnation(identity.host, facts.get("boot_id", ""), identity.pid, identity.start_ticks,
                          identity.recorder)  # fmt: skip
        stream = RankStream(record.id, identity.rank, identity.attempt, incarnation, flight=facts.get("flight", ""))
        stream.is_helper = bool(facts.get("helps"))
        stream.is_relayed = bool(facts.get("relayed"))
        stream.clock_shift_ns = int(facts.get("clock_shift_ns", 0))
        stream.resumes_at = int(facts.get("resumes_at", 0))
        stream.seen_here = bool(facts.get("seen_here")) and stream.on_this_boot
        stream.state = StreamState(record.state)
        stream.exit = facts.get("exit", {}) | exits[record.id]
        stream.disconnected_s = time.monotonic()
        stream.next = {table: store.next_seq(record.id, table) for table in reader.tables}
        stream.names = names[record.id]
        yield stream
