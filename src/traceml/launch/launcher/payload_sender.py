"""The function and its arguments, on their way to the agents of all hosts."""

from __future__ import annotations

from collections.abc import Callable

from traceml.launch.launcher.job_host import Member
from traceml.launch.wire import payload
from traceml.launch.wire.channel import Outgoing
from traceml.launch.wire.payload import Parcel, Receiver

__all__ = ["Delivery", "is_near"]

_PIECE_BYTES = 32 << 20  # of what is copied between two looks at the channels


class Delivery:
    """Sends one parcel to each host: through its channel, or to this host as a file in memory where it is large.

    Args:
        parcel: what to send; None: nothing.
        job: the id of the job that it is for.
    """

    def __init__(self, parcel: Parcel | None, job: str) -> None:
        self._parcel, self._job = parcel, job
        self._shared: Receiver | None = None
        self._promises: list[Outgoing] = []

    def send(self, member: Member) -> int | None:
        """Begin to send; return the number of the stream that brings it, None where there is nothing to send."""
        if self._parcel is None:
            return None

        channel, size_bytes = member.link.channel, self._parcel.size_bytes
        if size_bytes >= payload.LARGE_BYTES and is_near(member):
            if self._shared is None:
                self._shared = Receiver(size_bytes, shared=True)

            stream = channel.open_stream(kind="payload", job=self._job, size=size_bytes, path=self._shared.path)
            self._promises.append(stream)
            return stream.id

        stream = channel.open_stream(kind="payload", job=self._job, size=size_bytes)
        for chunk in self._parcel.chunks():
            stream.write(chunk)

        stream.end()
        return stream.id

    def fill(self, breathe: Callable[[], None]) -> None:
        """Fill the file that agents of this host were promised, while workers start and other hosts get theirs.

        Args:
            breathe: called between pieces.
        """
        if self._shared is None or self._parcel is None:
            return

        for chunk in self._parcel.chunks():
            for start in range(0, len(chunk), _PIECE_BYTES):
                self._shared.feed(chunk[start : start + _PIECE_BYTES])
                breathe()

        for stream in self._promises:
            stream.end()

    def close(self) -> None:
        """Let go of the file; who has opened it keeps it."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None


def is_near(member: Member) -> bool:
    """Return whether a host's agent and we can open each other's files in memory."""
    return (
        member.place.transport == "local"
        and bool(member.hello.get("near"))
        and payload.can_reach(int(member.hello["pid"]))
    )
