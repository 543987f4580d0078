"""Streams: what one incarnation of a rank sends, and how it stands."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from traceml.clock import boot_id, process_start_ticks
from traceml.database.postmortem import is_alive
from traceml.database.schema import TABLES
from traceml.transport.hello import Hello

if TYPE_CHECKING:
    from traceml.transport.server import Peer

__all__ = ["Incarnation", "Stream", "StreamState"]

_BOOT = boot_id()
_U64 = struct.Struct(">Q")


def _ack_head(table: str) -> bytes:
    body = b"\x83\xa1t\xa3ack\xa5table" + bytes(msgpack.packb(table)) + b"\xa3seq\xcf"
    return struct.pack(">I", len(body) + 8) + body


# ack{table, seq} up to the number, which alone differs: ten thousand ranks are acknowledged ten times a second.
_ACK_HEADS = {name: _ack_head(name) for name in TABLES}


class StreamState(StrEnum):
    """How an incarnation of a rank stands, in the report's words."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Incarnation:
    """What tells one recorder from every other that ever was: a process of a boot of a host, and which one in it."""

    host: str
    boot: str
    pid: int
    start_ticks: int
    recorder: str

    @classmethod
    def of(cls, hello: Hello) -> Incarnation:
        """Return whom a hello comes from."""
        return cls(hello.host, hello.boot_id, hello.pid, hello.start_ticks, hello.recorder)


class Stream:
    """One incarnation of a rank: its rows are numbered from 0, per table.

    Args:
        id: its number in the store.
        rank: its rank.
        attempt: which start of the job it belongs to.
        who: its process.
        flight: path of its flight file, "" when it has none on a file system.
    """

    __slots__ = (
        "attempt",
        "connected",
        "exit",
        "flight",
        "gone_s",
        "helps",
        "id",
        "in_window",
        "local_rank",
        "names",
        "next",
        "peer",
        "rank",
        "seen_here",
        "state",
        "told_dead",
        "told_flight",
        "unacked",
        "who",
    )

    def __init__(self, id: int, rank: int, attempt: int, who: Incarnation, *, local_rank: int, flight: str) -> None:  # noqa: A002
        self.id = id
        self.rank = rank
        self.attempt = attempt
        self.who = who
        self.local_rank = local_rank
        self.flight = flight
        self.state = StreamState.RUNNING
        self.exit: dict[str, Any] = {}
        """What is known of its end: code, signal, exception, open phase, …"""
        self.next: dict[str, int] = {}
        """Per table the number of the next row wanted."""
        self.unacked: dict[str, int] = {}
        """Per table what to acknowledge once it is committed."""
        self.names: dict[int, str] = {}
        """The rank's names by id, as far as they have come."""
        self.peer: Peer | None = None
        self.connected = False
        self.gone_s = 0.0
        """When the connection was lost, monotonic seconds."""
        self.helps = False
        """Whether it is a forked child of a rank, which only logs: no rank of its own."""
        self.in_window = True
        """Whether its rows enter the live windows: those of the rank's newest incarnation do."""
        self.told_dead = False
        """Whether a launcher has said that its process ended."""
        self.told_flight: Path | None = None
        """Where a launcher has put a copy of its flight file, which lies on another host."""
        self.seen_here = self.on_this_boot and process_start_ticks(who.pid) == who.start_ticks
        """Whether its process was seen on this host. The same boot alone does not tell: containers share it."""

    def __repr__(self) -> str:
        link = "connected" if self.connected else "away"
        return f"<stream {self.id}: rank {self.rank}, attempt {self.attempt}, {self.state}, {link}>"

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return self.state is not StreamState.RUNNING

    @property
    def on_this_boot(self) -> bool:
        """Whether it runs under this kernel, perhaps in another container."""
        return self.who.boot == _BOOT

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone; False where this host cannot tell."""
        if self.told_dead or (self.seen_here and process_start_ticks(self.who.pid) != self.who.start_ticks):
            return True

        # One that was killed before its first word was read was never seen: its flight file has lost its owner.
        path = None if self.seen_here else self.flight_path
        return path is not None and path.exists() and not is_alive(path)

    @property
    def flight_path(self) -> Path | None:
        """The flight file, if it is within this host's reach."""
        if self.told_flight is not None:
            return self.told_flight

        return Path(self.flight) if self.flight and self.on_this_boot else None

    def connect(self, peer: Peer) -> None:
        """Take a connection; one that it had before is dead, whether or not TCP has noticed."""
        if self.peer is not None and self.peer is not peer:
            self.peer.context = None
            self.peer.abort()

        self.peer, self.connected = peer, True

    def disconnect(self) -> None:
        """Note that the connection is lost."""
        self.peer, self.connected = None, False
        self.gone_s = time.monotonic()

    def acknowledge(self) -> None:
        """Tell the rank what is durable now."""
        if self.peer is not None:
            self.peer.write(b"".join([_ACK_HEADS[table] + _U64.pack(seq) for table, seq in self.unacked.items()]))

        self.unacked.clear()
