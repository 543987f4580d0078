"""Commands of a launching process to the aggregator of its run."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from traceml.errors import TraceMLError

if TYPE_CHECKING:
    from traceml.transport.client import Connection

__all__ = ["AggregatorClient"]

_LAST_SNAPSHOTS_S, _SNAPSHOT_S = 0.2, 1.0


class AggregatorClient(NamedTuple):
    """Address of an aggregator, and the run of the commands that are sent to it."""

    host: str
    port: int
    token: str
    run_id: str
    tls: bool = False

    def connect(self, timeout_s: float, *, tries: int | None = None) -> Connection:
        """Connect as a client.

        Raises:
            AggregatorRefusedError, AggregatorUnavailableError: see `transport.client.connect`.
        """
        from traceml.transport.client import connect
        from traceml.transport.hello import Hello

        hello = Hello(role="client", run=self.run_id)
        return connect(self.host, self.port, hello, self.token, timeout_s=timeout_s, tries=tries, tls=self.tls)

    def take_last_snapshots(self) -> None:
        """Have it take snapshots of ranks without progress, before a signal ends them; at most a fifth of a second.

        The ranks have described themselves since their last progress; these snapshots show them at the end.
        """
        self.ask("stacks", {"last": True}, _LAST_SNAPSHOTS_S)

    def send_snapshot(self, snapshot: dict[str, Any]) -> None:
        """Send a snapshot of another host's rank, see `docs/wire.md`; if it is lost, another one follows."""
        self.ask("snapshot_from_outside", snapshot, _SNAPSHOT_S)

    def ask(self, name: str, args: dict[str, Any], limit_s: float) -> bool:
        """Send a command; return whether it was answered in time."""
        end_s = time.monotonic() + limit_s
        with contextlib.suppress(TraceMLError, OSError):
            connection = self.connect(limit_s, tries=1)
            with contextlib.closing(connection):
                connection.request(name, args, timeout_s=end_s - time.monotonic())
                return True

        return False
