"""One run: its store, its streams, how each of them stands, and when the run is over."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from traceml.aggregator.ingest import Ingest
from traceml.aggregator.live import LiveRows
from traceml.aggregator.recovery import DeadFlight, appended_rows, recover
from traceml.aggregator.streams import Incarnation, Stream, StreamState
from traceml.clock import boot_id, process_start_ticks
from traceml.database.postmortem import FlightSnapshot, FlightState
from traceml.database.reader import StoreReader, StreamIdentity, StreamRecord
from traceml.database.store import StoreWriter
from traceml.database.store_file import STORE_NAME
from traceml.errors import StoreError
from traceml.transport.hello import Hello
from traceml.transport.server import Peer

__all__ = ["ActiveRun"]

# A rank on another host that is away this long, or a rank of this host whose process this host cannot see, is lost.
LOST_AFTER_S = 30.0
# After the last rank has ended, others of the same job may still be about to connect.
SETTLE_S = 0.5
# torchrun starts its workers again within seconds, but they import torch first.
RESTART_S = 120.0
# A run that nobody is connected to, and whose missing ranks never came.
ABANDONED_S = 60.0
# The launcher will say when the run is over; should it never, nobody waits for ever.
HELD_S = 3600.0

_log = logging.getLogger("traceml")


class ActiveRun:
    """One run, open or ended.

    Args:
        path: its folder.
        key: the job key by which its ranks find it.
        named: whether the user chose its id: then a job that comes again under this id is its next attempt.
    """

    def __init__(self, path: Path, key: str, *, named: bool) -> None:
        self.path = path
        self.key = key
        self.named = named
        self.streams: list[Stream] = []
        self._holders: dict[tuple[int, int], Stream] = {}
        self._touched_s = time.monotonic()
        self._recovered: list[FlightSnapshot] = []
        self._facts: dict[str, Any] = {
            "id": path.name, "name": path.name, "project": "default", "job": key, "named": named, "command": "",
            "world_size": 1, "attempt": 0, "attempt_base": 0, "started": time.time(), "ended": None,
            "state": "running", "hosts": [],
        }  # fmt: skip
        self._by_who: dict[tuple[Incarnation, int], Stream] = {}
        self._leaving: list[Peer] = []
        self._unfitted: list[dict[str, Any]] = []
        self._away: dict[Stream, None] = {}
        self.store = StoreWriter(path / STORE_NAME)
        self.live = LiveRows(1)
        self.ingest = Ingest(self.store, self.live, self._hold_back)
        self._resume()
        self._write_facts()

    def __repr__(self) -> str:
        return f"<run {self.id}: {self.state}, {len(self.streams)} streams>"

    @property
    def id(self) -> str:
        """Its folder's name."""
        return self.path.name

    @property
    def state(self) -> str:
        """running, finished, failed or lost."""
        return str(self._facts["state"])

    @property
    def ended(self) -> bool:
        """Whether it is over, as far as is known: a rank that comes back opens it again."""
        return self._facts["ended"] is not None

    @property
    def attempt(self) -> int:
        """The newest attempt that a rank has told of."""
        return int(self._facts["attempt"])

    @property
    def world_size(self) -> int:
        """How many ranks the newest attempt has."""
        return int(self._facts["world_size"])

    @property
    def connected(self) -> list[Stream]:
        """The streams that are connected now."""
        return [stream for stream in self.streams if stream.connected]

    @property
    def is_connected(self) -> bool:
        """Whether any rank is connected now."""
        return any(stream.connected for stream in self.streams)

    @property
    def recovered(self) -> set[Path]:
        """The flight files whose rows were taken in, but could not be stored yet."""
        return {image.path for image in self._recovered}

    def attempt_for(self, hello: Hello) -> int | None:
        """Return the attempt of this run that a newcomer belongs to, None when it is of another job.

        The same key does not prove the same job: torchrun's default address is the same each time, and a subprocess
        of a rank inherits its variables.
        """
        attempt = hello.attempt + int(self._facts["attempt_base"])
        if hello.parent:
            return attempt

        holder = self._holders.get((attempt, hello.rank))
        if holder is None:
            other_job = self.ended and attempt <= self.attempt and hello.world_size != self.world_size
            return None if other_job and not self.named else attempt

        if self._is_busy(holder, hello):
            return None

        return self.attempt + 1 if self.named else None

    def is_followed_by(self, hello: Hello) -> bool:
        """Tell whether a rank that has left this run trains again, in the same process: that is the job's next run."""
        holder = self._holders.get((hello.attempt + int(self._facts["attempt_base"]), hello.rank))
        return (
            holder is not None
            and holder.ended
            and replace(holder.who, recorder=hello.recorder) == Incarnation.of(hello)
        )

    def stream_of(self, who: Incarnation, rank: int) -> Stream | None:
        """Return the stream of a recorder that was here before."""
        return self._by_who.get((who, rank))

    def join(self, hello: Hello, attempt: int, peer: Peer) -> Stream:
        """Take a newcomer in as rank of an attempt, or as a helper of one.

        Raises:
            StoreError: the store cannot be written.
        """
        self._reopen()
        if hello.parent:
            stream = self._admit(attempt, hello.rank, Incarnation.of(hello), hello.local_rank, hello.flight, helps=True)
            self.greet(stream, hello, peer)
            return stream

        stream = self._admit(attempt, hello.rank, Incarnation.of(hello), hello.local_rank, hello.flight)
        self.store.update_stream(
            stream.id, world_size=hello.world_size, started=time.time(), command=hello.command[:1000]
        )
        self._learn(hello, attempt)
        self.greet(stream, hello, peer)
        return stream

    def greet(self, stream: Stream, hello: Hello, peer: Peer) -> None:
        """Connect a stream, be it new or back."""
        self._reopen()
        if stream.ended:
            _log.info("%r is back", stream)

        stream.state = StreamState.RUNNING
        stream.flight = hello.flight
        stream.connect(peer)
        self._away.pop(stream, None)
        self.store.update_stream(stream.id, state="running", flight=hello.flight, clock=list(hello.clock))
        if self.ingest.stalled:
            peer.pause(True)

    def adopt(self, found: DeadFlight) -> None:
        """Take in a rank that died before it could connect, or of which nothing is left but its flight file."""
        stream = self.stream_of(found.who, found.rank)
        if stream is None:
            if not self.streams:
                self._facts |= {"name": found.name, "project": found.project, "world_size": found.world_size}
                self._write_facts()

            stream = self._admit(found.attempt + int(self._facts["attempt_base"]), found.rank, found.who,
                                 found.local_rank, str(found.path), helps=found.helps)  # fmt: skip
            for told in [told for told in self._unfitted if told.get("pid") == found.who.pid]:
                self._unfitted.remove(told)
                _note_exit(stream, told)

        self._bury(stream, found.image)

    def bye(self, stream: Stream, reason: str, peer: Peer) -> None:
        """Take a rank's word that it ends; it is answered when all its rows are stored."""
        self._leaving.append(peer)
        failed = stream.exit.get("exception") or stream.exit.get("code") or reason == "failed"
        self._end_stream(stream, StreamState.FAILED if failed else StreamState.FINISHED)

    def left(self, stream: Stream) -> None:
        """Note that a connection is gone."""
        stream.disconnect()
        self._touched_s = time.monotonic()
        if not stream.ended:
            self._away[stream] = None

    def exited(self, told: dict[str, Any]) -> None:
        """Take a launcher's word on how a process ended.

        Args:
            told: `{rank, local_rank, pid, exitcode}`, negative for a signal; also `host`, where there are several;
                `time`; `stopped`, when the launcher ended it because of others; `flight`, the path of a copy of its
                flight file; instead of an exit code `lost`, when its host is out of reach.
        """
        if not isinstance(told.get("exitcode"), int) and not told.get("lost"):
            _log.info("not understood by run %s: exit %s", self.id, told)
            return

        stream = self._who_ended(told)
        if stream is None:
            self._unfitted.append(told)  # it may have left a flight file, or died even before that
            return

        if told.get("lost"):
            if not stream.ended:
                self._end_stream(stream, StreamState.LOST)

            return

        _note_exit(stream, told)
        if stream.state is StreamState.FINISHED and told["exitcode"] == 0:
            self.store.update_stream(stream.id, exit=stream.exit)  # it said so itself
        elif not stream.connected:
            self._bury(stream)

    def settle_exits(self) -> None:
        """Take in the processes that ended badly before a recorder began in them: only their launcher knows of them."""
        for told in self._unfitted:
            rank, pid, local_rank = told.get("rank"), told.get("pid") or 0, told.get("local_rank", 0)
            if not (isinstance(rank, int) and isinstance(pid, int) and isinstance(local_rank, int)):
                continue
            if not (told.get("exitcode") or told.get("lost")) or (self.attempt, rank) in self._holders:
                _log.info("nobody of run %s fits the exit %s", self.id, told)
                continue

            if rank >= self.world_size:
                self._facts["world_size"] = rank + 1
                self.live.resize(rank + 1)

            who = Incarnation(str(told.get("host") or socket.gethostname()), boot_id(), pid, 0, "")
            stream = self._admit(self.attempt, rank, who, local_rank, "")
            if told.get("lost"):
                self._end_stream(stream, StreamState.LOST)
                continue

            _note_exit(stream, told)
            self._end_stream(stream, _state_of_dead(stream, None))

        self._unfitted.clear()

    def look_around(self) -> None:
        """See after the ranks that are away: dead ones leave a flight file, silent ones are given up after a while."""
        for stream in list(self._away):
            if stream.is_dead:
                self._bury(stream)
            elif not stream.seen_here and time.monotonic() - stream.gone_s > LOST_AFTER_S:
                self._end_stream(stream, StreamState.LOST)

    def is_over(self, *, held: bool) -> bool:
        """Return whether the run can be closed.

        Args:
            held: a launcher looks after this run and will say when it is over.
        """
        quiet_s = time.monotonic() - self._touched_s
        if self.ended or self.ingest.waiting or self.is_connected or (held and quiet_s < HELD_S):
            return False

        members = [stream for (attempt, _), stream in self._holders.items() if attempt == self.attempt]
        if any(not stream.ended for stream in members) or any(s.helps and not s.ended for s in self.streams):
            return False  # its process lives, or it has not been away for long: it may come back

        if len(members) < self.world_size:
            return quiet_s > ABANDONED_S

        broken = any(stream.state is not StreamState.FINISHED for stream in members)
        return quiet_s > (RESTART_S if broken and self._facts.get("restarts_left") else SETTLE_S)

    def give_up_waiting(self, status: int | None) -> None:
        """Take every rank that has not ended for dead: its launcher says so, and what the job ended with."""
        for stream in self.streams:
            if not stream.ended:
                if status == 0:  # one that left by os._exit has said nothing, but nothing went wrong either
                    stream.exit.setdefault("code", 0)

                self._bury(stream)

    def commit(self, *, force: bool = False) -> bool:
        """Commit and acknowledge what was taken, then show it to the live windows; return whether all is stored."""
        if not self.ingest.commit(force=force):
            return False

        self.live.scatter()
        for image in self._recovered:
            image.unlink()

        for peer in self._leaving:
            peer.send({"t": "bye", "reason": "all rows are stored"})
            peer.close()

        self._recovered.clear()
        self._leaving.clear()
        return True

    def end(self, status: int | None = None) -> bool:
        """Close the run; return whether it could be: everything must be stored first.

        Args:
            status: what the launcher says that the job ended with.
        """
        if not self.commit(force=True):
            return False

        before = dict(self._facts)
        self._facts |= {"state": self._final_state(status), "ended": time.time()}
        self._write_facts()
        if not self._store_rest():
            self._facts = before
            return False

        self.store.event("end", {"state": self.state, "status": status})
        self.store.close()
        for stream in self.connected:  # who still has something to say comes back, and opens the run again
            if stream.peer is not None:
                stream.peer.abort()

        _log.info("run %s is over: %s", self.id, self.state)
        return True

    def remove(self) -> None:
        """Remove the folder of a run that has ended, if nothing but the store is in it."""
        for path in self.path.glob(f"{STORE_NAME}*"):
            path.unlink(missing_ok=True)

        with contextlib.suppress(OSError):
            self.path.rmdir()

    def close(self) -> None:
        """Let go of a run that goes on, for another aggregator to continue."""
        if not self.ended:
            self.commit(force=True)
            try:
                self.store.close()
            except StoreError as error:
                _log.error("run %s: %s", self.id, error)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _hold_back(self, held: bool) -> None:
        for stream in self.connected:
            if stream.peer is not None:
                stream.peer.pause(held)

    def _who_ended(self, told: dict[str, Any]) -> Stream | None:
        """Return the stream that a launcher speaks of: by its process, else by the rank, if that has not ended yet."""
        pid, host = told.get("pid"), told.get("host")
        by_pid = [s for s in self.streams if s.who.pid == pid and host in (None, s.who.host)]
        by_rank = [stream for stream in self.streams if stream.rank == told.get("rank") and not stream.ended]
        return next(reversed(by_pid or by_rank), None)

    def _is_busy(self, holder: Stream, hello: Hello) -> bool:
        """Whether someone else is that rank right now; a second recorder of the same process takes over."""
        same_process = (holder.who.pid, holder.who.start_ticks, holder.who.boot) == (
            hello.pid, hello.start_ticks, hello.boot_id,
        )  # fmt: skip
        if same_process or holder.ended:
            return False

        return holder.connected or not holder.is_dead

    def _learn(self, hello: Hello, attempt: int) -> None:
        """Take over what a rank tells of the run."""
        facts = self._facts
        if attempt > self.attempt:
            facts |= {"attempt": attempt, "attempt_base": attempt - hello.attempt}
            self.store.event("attempt", {"attempt": attempt})
            for stream in self.streams:
                stream.in_window = stream.attempt >= attempt and not stream.helps

        if hello.world_size != self.world_size:
            facts["world_size"] = hello.world_size
            self.live.resize(hello.world_size)

        if len(self.streams) == 1:
            facts |= {"name": hello.name or self.id, "project": hello.project, "command": hello.command}

        if hello.host not in facts["hosts"]:
            facts["hosts"] = sorted({*facts["hosts"], hello.host})

        facts["restarts_left"] = hello.restarts_left
        self._write_facts()

    def _admit(
        self, attempt: int, rank: int, who: Incarnation, local_rank: int, flight: str, *, helps: bool = False
    ) -> Stream:
        identity = StreamIdentity(rank, attempt, who.host, who.pid, who.start_ticks, who.recorder)
        number = self.store.stream(identity, state="running", local_rank=local_rank, boot_id=who.boot, flight=flight)
        stream = Stream(number, rank, attempt, who, local_rank=local_rank, flight=flight)
        self.store.update_stream(number, seen_here=stream.seen_here)
        stream.in_window = attempt >= self.attempt
        stream.helps = helps
        if helps:
            self.store.update_stream(number, helps=True)

        self._hold(stream)
        if not helps:
            self.live.join(stream)

        return stream

    def _hold(self, stream: Stream) -> None:
        self.streams.append(stream)
        if stream.helps:
            stream.in_window = False
        else:
            self._holders[stream.attempt, stream.rank] = stream

        self._by_who[stream.who, stream.rank] = stream

    def _bury(self, stream: Stream, image: FlightSnapshot | None = None) -> None:
        """Take what a dead rank left, and settle how it ended."""
        image = recover(stream, self.ingest, image)
        if image is not None:
            self._recovered.append(image)
            self.store.update_stream(stream.id, appended=appended_rows(image))

        state = _state_of_dead(stream, image)
        if state is StreamState.LOST:
            stream.exit["process_gone"] = True  # known, unlike with a host that fell silent

        self._end_stream(stream, state)

    def _end_stream(self, stream: Stream, state: StreamState) -> None:
        stream.state = state
        self._away.pop(stream, None)
        self._touched_s = time.monotonic()
        if state is not StreamState.FINISHED:
            stream.exit.setdefault("at_s", time.time())

        self.store.update_stream(stream.id, state=str(state), ended=time.time(), exit=stream.exit)
        self.store.event("rank", {"rank": stream.rank, "attempt": stream.attempt, "state": str(state),
                                  "exit": stream.exit})  # fmt: skip
        if stream.in_window:
            self.live.end(stream)

    def _final_state(self, status: int | None) -> str:
        states = {stream.state for (attempt, _), stream in self._holders.items() if attempt == self.attempt}
        if status or states & {StreamState.FAILED, StreamState.KILLED}:
            return "failed"

        return "lost" if StreamState.LOST in states else "finished"

    def _store_rest(self) -> bool:
        try:
            self.store.commit()
        except StoreError as error:
            _log.error("run %s cannot be closed yet: %s", self.id, error)
            return False

        return True

    def _write_facts(self) -> None:
        pid = os.getpid()
        self.store.put_meta("run", self._facts)
        self.store.put_meta(
            "aggregator",
            {"pid": pid, "start_ticks": process_start_ticks(pid), "boot_id": boot_id(), "host": socket.gethostname()},
        )

    def _reopen(self) -> None:
        """Open the store of a run that was over: a rank has come back."""
        if not self.ended:
            return

        self.store = StoreWriter(self.path / STORE_NAME)
        self.ingest = Ingest(self.store, self.live, self._hold_back)
        self._facts |= {"state": "running", "ended": None}
        self._touched_s = time.monotonic()
        self._write_facts()

    def _resume(self) -> None:
        """Take up a store that an earlier aggregator began."""
        with StoreReader(self.path / STORE_NAME) as reader:
            facts = reader.meta().get("run")
            if facts is None:
                return

            self._facts |= facts
            self.live.resize(self.world_size)
            for stream in _revive(reader.streams(), reader, self.store):
                stream.in_window = stream.attempt >= self.attempt
                self._hold(stream)
                if not stream.ended:
                    self._away[stream] = None

                self.live.resume(stream)

        self._facts |= {"state": "running", "ended": None}
        self.store.event("resumed", {"was": facts["state"]})


def _note_exit(stream: Stream, told: dict[str, Any]) -> None:
    """Keep with a stream what its launcher told of its end."""
    code = told["exitcode"]
    stream.exit |= {"signal": -code} if code < 0 else {"code": code}
    stream.told_dead = stream.who.pid == told.get("pid")
    if told.get("stopped"):
        stream.exit["stopped"] = True

    if isinstance(told.get("flight"), str):
        stream.told_flight = Path(told["flight"])

    if isinstance(told.get("time"), int | float):
        stream.exit.setdefault("at_s", told["time"])


def _state_of_dead(stream: Stream, image: FlightSnapshot | None) -> StreamState:
    """Return how a process that is gone ended, by what its launcher and its flight file say."""
    if stream.exit.get("signal"):
        return StreamState.KILLED

    if stream.exit.get("code") or stream.exit.get("exception"):
        return StreamState.FAILED

    if image is not None and image.state is FlightState.FAILED:
        return StreamState.FAILED

    clean = stream.state is StreamState.FINISHED or (image is not None and image.state is FlightState.FINISHED)
    return StreamState.FINISHED if clean or stream.exit.get("code") == 0 else StreamState.LOST


def _revive(records: list[StreamRecord], reader: StoreReader, store: StoreWriter) -> Iterator[Stream]:
    names, ends = reader.log_rows("names"), reader.log_rows("info")
    for record in records:
        facts, identity = record.facts, record.identity
        who = Incarnation(identity.host, facts.get("boot_id", ""), identity.pid, identity.start_ticks,
                          identity.recorder)  # fmt: skip
        stream = Stream(record.id, identity.rank, identity.attempt, who, local_rank=facts.get("local_rank", 0),
                        flight=facts.get("flight", ""))  # fmt: skip
        stream.helps = bool(facts.get("helps"))
        stream.seen_here = bool(facts.get("seen_here")) and stream.on_this_boot
        stream.state = StreamState(record.state)
        stream.exit = dict(facts.get("exit", {}))
        stream.gone_s = time.monotonic()
        stream.next = {table: store.next_seq(record.id, table) for table in reader.tables}
        stream.names = {row["id"]: row["name"] for number, row in names if number == record.id}
        for number, row in ends:
            if number == record.id and row.get("kind") == "exit":
                stream.exit |= {key: value for key, value in row.items() if key not in ("kind", "t_ns")}

        yield stream
