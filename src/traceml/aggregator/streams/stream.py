"""Streams: the rows and the state of one incarnation of a rank."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from traceml.clock import boot_id, process_start_ticks
from traceml.database.flight.flight_header import FlightState
from traceml.database.flight.flight_owner import is_alive, pid_here
from traceml.inspection.cgroups import OomWatch, cgroup_paths
from traceml.inspection.kernel_state import process_info
from traceml.transport.framing import encode_ack
from traceml.transport.hello import Hello

__all__ = ["Incarnation", "RankStream", "StreamPeer", "StreamState"]

_BOOT = boot_id()


class StreamPeer(Protocol):
    """The other side of a rank's connection: a `transport.server.Peer`, or a share of the one of its host."""

    context: Any

    def write(self, frames: bytes) -> None:
        """Send frames that are already encoded."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, unless the peer is gone."""

    def pause(self, paused: bool) -> None:
        """Stop or resume reading."""

    def abort(self) -> None:
        """Cut the connection."""

    def close(self) -> None:
        """Close after the written bytes have been sent."""


class StreamState(StrEnum):
    """State of an incarnation of a rank, in the words of the report."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Incarnation:
    """Unique identity of a recorder: host, boot, process and the recorder in that process.

    A rank that is restarted has a new incarnation, even with the same process id after a reboot.
    """

    host: str
    boot: str
    pid: int
    start_ticks: int
    recorder: str

    @classmethod
    def from_hello(cls, hello: Hello) -> Incarnation:
        """Return the identity of a hello's sender."""
        return cls(hello.host, hello.boot_id, hello.pid, hello.start_ticks, hello.recorder)


@dataclass(slots=True, eq=False, repr=False)
class RankStream:
    """Rows and state of one incarnation of a rank.

    The rows of each table are numbered from 0. A rank that is restarted gets a new stream.

    Args:
        attempt: which start of the job it belongs to.
        incarnation: its process.
        flight: path of its flight file, "" when it has none on a file system.
    """

    id: int
    rank: int
    attempt: int
    incarnation: Incarnation
    flight: str
    state: StreamState = StreamState.RUNNING
    exit: dict[str, Any] = field(default_factory=dict)
    """Known facts about its end: code, signal, exception, open phase, …"""
    next: dict[str, int] = field(default_factory=dict)
    """Per table the number of the next row wanted."""
    unacked: dict[str, int] = field(default_factory=dict)
    """Per table the number to acknowledge after the commit."""
    names: dict[int, str] = field(default_factory=dict)
    """The rank's names by id, as received so far."""
    peer: StreamPeer | None = None
    disconnected_s: float = 0.0
    """Time when the connection was lost, monotonic seconds."""
    is_helper: bool = False
    """Whether it is a forked child of a rank that only logs; it is not a rank itself."""
    is_relayed: bool = False
    """Whether the aggregator of its host sends its rows."""
    is_diagnosed: bool = True
    """Whether its rows are diagnosed live: only those of the rank's newest incarnation are."""
    clock_shift_ns: int = 0
    """The aggregator's wall clock minus that of the rank's host."""
    resumes_at: int = 0
    """Steps in the checkpoint with which it began, if it counts its own from 0."""
    loaded: set[int] = field(default_factory=set)
    """Places of the checkpoints that it has read."""
    flight_state: FlightState | None = None
    """What its flight file said when it was dead; the file is removed with its last rows."""
    was_in_loop: bool = False
    """Whether its process was cut off in the middle of its loop, according to that file."""
    reported_dead: bool = False
    """Whether a launcher has reported the end of its process."""
    reported_flight: Path | None = None
    """Copy of its flight file from another host, as a launcher reported it."""
    seen_here: bool = field(init=False)
    """Whether its process is visible on this host by its pid. Its boot id is not enough: containers share it."""
    pid_here: int | None = field(init=False)
    """The pid of its process on this host, which differs for a container's; None if it was not seen here alive."""
    launcher: int | None = field(init=False)
    """The pid of the process that has started it; None if its process is not visible on this host."""
    oom_watch: OomWatch | None = field(init=False)
    """Out-of-memory kills in its cgroup; None if its process is not visible on this host."""

    def __post_init__(self) -> None:
        pid = self.incarnation.pid
        self.seen_here = self.on_this_boot and process_start_ticks(pid) == self.incarnation.start_ticks
        info = process_info(pid) if self.seen_here else None
        self.launcher = None if info is None else info.parent
        self.oom_watch = OomWatch(pid) if self.seen_here else None
        path = self.flight_path
        self.pid_here = pid if self.seen_here else pid_here(path, pid, self.incarnation.start_ticks) if path else None

    def __repr__(self) -> str:
        link = "connected" if self.connected else "away"
        return f"<stream {self.id}: rank {self.rank}, attempt {self.attempt}, {self.state}, {link}>"

    @property
    def connected(self) -> bool:
        """Whether it has a connection."""
        return self.peer is not None

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.state is not StreamState.RUNNING

    @property
    def on_this_boot(self) -> bool:
        """Whether it runs under this kernel, perhaps in another container."""
        return self.incarnation.boot == _BOOT

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone; False if this host cannot know."""
        if self.reported_dead or (
            self.seen_here and process_start_ticks(self.incarnation.pid) != self.incarnation.start_ticks
        ):
            return True

        # A process killed before its hello was read was never seen here, but no process holds its flight file.
        path = None if self.seen_here else self.flight_path
        return path is not None and path.exists() and not is_alive(path)

    def refresh_cgroup(self) -> None:
        """Notice that its process has moved to another cgroup."""
        if self.oom_watch is not None and not self.ended:
            self.oom_watch.follow(cgroup_paths(pid=self.incarnation.pid))

    @property
    def flight_path(self) -> Path | None:
        """The flight file, if this host can read it."""
        if self.reported_flight is not None:
            return self.reported_flight

        return Path(self.flight) if self.flight and self.on_this_boot else None

    @property
    def has_removed_flight(self) -> bool:
        """Whether a process of this host has removed its flight file, as it does when all its rows are stored."""
        path = self.flight_path
        return self.seen_here and path is not None and not path.exists()

    def connect(self, peer: StreamPeer) -> None:
        """Use a new connection; an earlier one is dead, even if TCP has not noticed."""
        if self.peer is not None and self.peer is not peer:
            self.peer.context = None
            self.peer.abort()

        self.peer = peer
        self.is_relayed = False  # its host says so afterwards

    def disconnect(self) -> None:
        """Record that the connection is lost."""
        self.peer = None
        self.disconnected_s = time.monotonic()

    def acknowledge(self) -> None:
        """Send the rank the numbers up to which its rows are durable."""
        if self.peer is not None and not self.is_relayed:
            self.peer.write(b"".join([encode_ack(table, seq) for table, seq in self.unacked.items()]))

        self.unacked.clear()
