"""Hosts that send the rows of their ranks here, each over one connection per run; in the center.

A relayed rank is a stream of its run as one with a connection of its own. Its host looks after its process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from msgspec import structs

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.silent_ranks.silent_ranks import note_abort, store_snapshot
from traceml.aggregator.streams.stream import RankStream, StreamPeer, StreamState
from traceml.database.schema import TABLES, Table
from traceml.database.snapshots.rank_snapshot import ABORT, RankSnapshot
from traceml.database.store.frame_compression import decode
from traceml.diagnosis.merged_hosts.host_sums import HOST_SUMS, HostSums
from traceml.diagnosis.steps.representatives import HOST_CHOICE, ExcessWork, HostChoice
from traceml.errors import ProtocolError
from traceml.transport.hello import Hello
from traceml.transport.server import Peer

__all__ = ["CONFIRM_S", "MANY_HOSTS", "RelayedHosts", "RelayedRank"]

CONFIRM_S = 5.0
"""Longest time until a host knows that its rows are stored. It needs that after a lost connection, and at its end."""

MANY_HOSTS = 512
"""From this many hosts on, their rows become frames after some seconds: a frame of each message would be merged again a
minute later, which took a sixth of the center's work."""

T = TypeVar("T")


class RelayedRank:
    """The connection of a relayed rank, as its stream has one: it shares that of its host."""

    def __init__(self, host: Peer) -> None:
        self.context: Any = None
        self._host = host

    def write(self, frames: bytes) -> None:
        """Ignore acknowledgments of single tables: the host gets one for each of its messages."""

    def send(self, message: dict[str, Any]) -> None:
        """Ignore commands: the aggregator of the host carries them out."""

    def pause(self, paused: bool) -> None:
        """Stop or resume reading from the host."""
        self._host.pause(paused)

    def abort(self) -> None:
        """Do nothing: the connection is the host's."""

    def close(self) -> None:
        """Do nothing: the connection is the host's."""


class _RelayedHost(msgspec.Struct):
    """A connected host, and its ranks by the number that it has given them.

    Attributes:
        attempt: the newest one of its ranks.
        taken, stored, confirmed: number of the last message that has come, is stored, and is known to be by the host.
        confirmed_s: monotonic time of the last confirmation.
        is_waiting: whether the host waits for the next one.
    """

    peer: Peer
    key: str
    ranks: dict[int, tuple[ActiveRun, RankStream, RelayedRank]] = {}
    run: ActiveRun | None = None
    attempt: int = 0
    taken: int = 0
    stored: int = 0
    confirmed: int = 0
    confirmed_s: float = 0.0
    is_waiting: bool = False
    wanted: frozenset[int] = frozenset()


class RelayedHosts:
    """The connected hosts.

    Args:
        admit: admits a rank: returns its run and its stream.
    """

    def __init__(
        self,
        admit: Callable[[Hello, StreamPeer], tuple[ActiveRun, RankStream]],
        moment_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admit, self._moment_s = admit, moment_s
        self._hosts: dict[Peer, _RelayedHost] = {}
        self._unstored: dict[Peer, _RelayedHost] = {}
        self._is_asked = False

    def take(self, peer: Peer, message: dict[str, Any]) -> None:
        """Handle a message of a host.

        Raises:
            ProtocolError: it is not one that a host sends, or does not follow from those before.
            RefusedError: a rank cannot be admitted, or a row not be stored.
        """
        assert peer.hello is not None
        host = self._hosts.setdefault(peer, _RelayedHost(peer, f"{peer.hello.host} {peer.hello.recorder}".strip()))
        kind = message["t"]
        if kind == "rank":
            self._join(host, message)
        elif kind == "update":
            self._update(host, message)
        elif kind == "confirm":
            host.is_waiting = host.confirmed < host.taken
        else:
            raise ProtocolError(f"{kind[:50]!r} is not expected from the aggregator of a host")

    def stored(self, run: ActiveRun) -> None:
        """Record that the rows of all messages so far of a run's hosts are stored."""
        stored = [host for host in self._unstored.values() if host.run is run]
        for host in stored:
            host.stored = host.taken
            del self._unstored[host.peer]

        self._confirm(stored)

    def confirm(self, run: ActiveRun, *, at_once: bool = False) -> None:
        """Tell hosts of a run which of their messages are stored: those that wait for it, others every few seconds."""
        self._confirm([host for host in self._hosts.values() if host.run is run], at_once=at_once)

    def _confirm(self, hosts: Iterable[_RelayedHost], *, at_once: bool = False) -> None:
        now_s = self._moment_s()
        for host in hosts:
            is_due = at_once or host.is_waiting or now_s - host.confirmed_s >= CONFIRM_S
            if is_due and host.confirmed < host.stored:
                host.confirmed, host.confirmed_s = host.stored, now_s
                host.is_waiting &= host.stored < host.taken
                host.peer.send({"t": "stored", "number": host.stored})

    def ask(self, run: ActiveRun, ranks: Collection[int]) -> None:
        """Ask the hosts of a run for all rows of some ranks from now on, and no longer for those of others."""
        if not (ranks or self._is_asked):
            return

        for host in [each for each in self._hosts.values() if each.run is run and (ranks or each.wanted)]:
            choice = run.live.representatives.choice_of(host.key)
            wanted = choice.ranks.intersection(ranks) if choice is not None else frozenset[int]()
            if wanted != host.wanted:
                host.wanted = wanted
                host.peer.send({"t": "wanted", "ranks": sorted(wanted)})

        self._is_asked = any(host.wanted for host in self._hosts.values())

    def disconnected(self, peer: Peer) -> None:
        """Record that the connection of a host has ended: its ranks are out of reach."""
        host = self._hosts.pop(peer, None)
        self._unstored.pop(peer, None)
        if host is None:
            return

        gone = [(run, stream) for run, stream, link in host.ranks.values() if stream.peer is link]
        for run, stream in gone:
            run.disconnected(stream)

        if gone and host.run is not None:
            host.run.live.mark_unreachable(host.key)

    def _join(self, host: _RelayedHost, message: dict[str, Any]) -> None:
        number, facts = message.get("id"), message.get("hello")
        if not isinstance(number, int) or not isinstance(facts, dict):
            raise ProtocolError("a relayed rank has no id and hello")

        # Without the boot id and the flight file: its process and that file are its host's business, also where that
        # is this host.
        hello = replace(Hello.from_message(facts), role="rank", boot_id="", flight="", parent="", runs_dir="")
        link = RelayedRank(host.peer)
        run, stream = self._admit(hello, link)
        link.context = run, stream
        stream.is_relayed = True
        run.store.update_stream(stream.id, relayed=True)
        host.ranks[number], host.run = (run, stream, link), run
        host.attempt = max(host.attempt, stream.attempt)
        if len(self._hosts) >= MANY_HOSTS:
            run.store.hold()

        interval_s = run.sample_interval_s
        host.peer.send({"t": "joined", "id": number, "acked": dict(stream.next), "sample_interval_s": interval_s})

    def _update(self, host: _RelayedHost, message: dict[str, Any]) -> None:
        rows, number, run = message.get("rows"), message.get("number"), host.run
        if not isinstance(rows, list) or not isinstance(number, int):
            raise ProtocolError("the message of a host has no rows and number")

        for each in rows:
            self._take_rows(host, each)

        if run is not None and host.attempt == run.attempt:  # of an earlier one only rows and ends count
            self._take_choice(run, host.key, message)
            for each in message.get("events") or ():
                self._take_event(host, run, each)

        for each in message.get("ends") or ():
            self._end(host, each)
            host.is_waiting = True

        host.taken = number
        self._unstored[host.peer] = host

    def _take_choice(self, run: ActiveRun, key: str, message: dict[str, Any]) -> None:
        """Take what a host says about all of its ranks."""
        if message.get("choice") is not None:
            self._choose(run, key, message["choice"])

        if message.get("above") is not None:
            run.live.representatives.add(key, _parsed(ExcessWork.from_row, message["above"]))

        if message.get("sums") is not None:
            self._take_sums(run, key, message["sums"])

    @staticmethod
    def _take_rows(host: _RelayedHost, row: Any) -> None:
        try:
            rank, name, seq, n, codec, packed = row
            run, stream, _ = host.ranks[rank]
            table = TABLES[name]
            data = bytes(decode(codec, packed, table.row_bytes if isinstance(table, Table) else 1))
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"relayed rows cannot be read: {error!r}") from error

        run.ingest.take(stream, name, seq, n, data, (int(codec), packed) if type(packed) is bytes else None)

    @staticmethod
    def _choose(run: ActiveRun, key: str, row: Any) -> None:
        choice = structs.replace(_parsed(HostChoice.from_row, row), host=key)
        ranks = (choice.typical, *choice.ordinary, *choice.sent, *choice.ended)
        if min(ranks) < 0 or max(ranks) >= run.world_size:
            raise ProtocolError(f"the choice of a host has ranks beyond the {run.world_size} of its run")

        if run.live.representatives.take(choice):
            run.store.event(HOST_CHOICE, {"attempt": run.attempt, "choice": choice.to_row()})

    @staticmethod
    def _take_sums(run: ActiveRun, key: str, row: Any) -> None:
        """Store the sums of a host; those that came before count no more."""
        ranks = _parsed(HostSums.from_row, row).ranks
        if not ranks or min(ranks) < 0 or max(ranks) >= run.world_size:
            raise ProtocolError(f"the sums of a host are of other ranks than the {run.world_size} of its run")

        run.store.event(HOST_SUMS, {"attempt": run.attempt, "host": key, "sums": row})

    @staticmethod
    def _take_event(host: _RelayedHost, run: ActiveRun, event: Any) -> None:
        """Take a snapshot that the host has made of one of its ranks, or that it ends the job, which hangs."""
        try:
            kind, number, data = event
            stream = None if number is None else host.ranks[number][1]
            snapshot = RankSnapshot.from_row(data)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the event of a host cannot be read: {error!r}") from error

        if kind == ABORT:
            note_abort(run)
        elif stream is not None:
            store_snapshot(run, stream, replace(snapshot, rank=stream.rank))
        elif 0 <= snapshot.rank < run.world_size and not run.has_rank(snapshot.rank):
            store_snapshot(run, None, snapshot)

    @staticmethod
    def _end(host: _RelayedHost, end: Any) -> None:
        try:
            number, state, known = end
            run, stream, link = host.ranks[number]
            found, facts = StreamState(state), dict(known)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the end of a relayed rank cannot be read: {error!r}") from error

        if stream.peer is link and not stream.ended:
            stream.exit |= facts
            run.end_relayed(stream, found)


def _parsed(read: Callable[[Any], T], row: Any) -> T:
    try:
        return read(row)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
