"""Processes and tracks of an exported trace: one process per rank and per host, named on first use."""

from __future__ import annotations

from typing import Any, Literal

from traceml.database.store.reader import StreamRecord
from traceml.traces.writer.writer import Writer

__all__ = ["DEVICE", "EVALS", "EVENTS", "STEPS", "TraceTracks"]

STEPS, DEVICE, EVALS, EVENTS = range(4)
_LANES = ("training", "device", "evaluation", "events")
_HOSTS = 1_000_000  # processes from here on are hosts


class TraceTracks:
    """Assigns numbers and names to processes and tracks.

    A rank's process is its rank + 1, as 0 is the idle process of viewers. Track numbers are unique over all processes,
    as viewers look threads up without their process.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._named: set[int] = set()
        self._hosts: dict[str, int] = {}

    @property
    def names(self) -> int:
        """Names of processes and tracks that were written; they are not events of the run."""
        return len(self._named)

    def rank(self, stream: StreamRecord, lane: int) -> tuple[int, int]:
        """Return (process, track) of a rank."""
        pid = stream.rank + 1
        tid = pid * 10 + lane
        if pid not in self._named:
            facts = {"rank": stream.rank, "host": stream.host, "os_pid": stream.identity.pid}
            self._name("process_name", f"rank {stream.rank} ({stream.host})", pid, pid, pid * 10, **facts)

        if -tid not in self._named:
            self._name("thread_name", _LANES[lane], -tid, pid, tid)

        return pid, tid

    def host(self, host: str) -> tuple[int, int]:
        """Return (process, track) of a host."""
        pid = self._hosts.setdefault(host, _HOSTS + len(self._hosts))
        if pid not in self._named:
            self._name("process_name", f"host {host}", pid, pid, pid * 10)

        return pid, pid * 10

    def _name(
        self, what: Literal["process_name", "thread_name"], name: str, key: int, pid: int, tid: int, **facts: Any
    ) -> None:
        self._named.add(key)
        self._writer.write_name(what, name, pid=pid, tid=tid, **facts)
