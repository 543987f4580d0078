"""The process of a rank of this host, whose snapshots are taken from outside and stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.database.external_snapshots import ExternalSnapshots

if TYPE_CHECKING:
    from traceml.aggregator.streams.stream import Stream

__all__ = ["RankProcess"]


@dataclass(frozen=True, slots=True)
class RankProcess:
    """A rank of this host.

    Attributes:
        stream: its stream; None before it has connected.
    """

    rank: int
    pid: int
    flight: Path
    stream: Stream | None = None

    @classmethod
    def of(cls, stream: Stream) -> RankProcess | None:
        """Return the process of a stream; None if it is not on this host."""
        path, pid = stream.flight_path, stream.pid_here
        return cls(stream.rank, pid, path, stream) if pid is not None and path is not None else None

    def snapshots(self) -> ExternalSnapshots:
        """Return what takes snapshots of it."""
        return ExternalSnapshots(self.rank, self.pid, self.flight)
