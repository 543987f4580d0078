"""The function and its arguments, on their way to the agents of all hosts."""

from __future__ import annotations

from collections.abc import Callable

from traceml.launch.launcher.job_host import JobHost
from traceml.launch.wire import payload
from traceml.launch.wire.channel import OutgoingStream
from traceml.launch.wire.payload import PayloadBuffer, SerializedValue

__all__ = ["PayloadSender", "is_near"]

_PIECE_BYTES = 32 << 20  # of what is copied between two looks at the channels


class PayloadSender:
    """Sends one call to each host: through its channel, or to this host as a file in memory where it is large.

    Args:
        call: what to send; None: nothing.
        job: the id of the job that it is for.
    """

    def __init__(self, call: SerializedValue | None, job: str) -> None:
        self._call, self._job = call, job
        self._shared: PayloadBuffer | None = None
        self._promises: list[OutgoingStream] = []

    def send(self, host: JobHost) -> int | None:
        """Begin to send; return the number of the stream that brings it, None where there is nothing to send."""
        if self._call is None:
            return None

        channel, size_bytes = host.connection.channel, self._call.size_bytes
        if size_bytes >= payload.LARGE_BYTES and is_near(host):
            if self._shared is None:
                self._shared = PayloadBuffer(size_bytes, shared=True)

            stream = channel.open_stream(kind="payload", job=self._job, size=size_bytes, path=self._shared.path)
            self._promises.append(stream)
            return stream.id

        stream = channel.open_stream(kind="payload", job=self._job, size=size_bytes)
        for chunk in self._call.chunks():
            stream.write(chunk)

        stream.end()
        return stream.id

    def fill(self, breathe: Callable[[], None]) -> None:
        """Fill the file that agents of this host were promised, while workers start and other hosts get theirs.

        Args:
            breathe: called between pieces.
        """
        if self._shared is None or self._call is None:
            return

        for chunk in self._call.chunks():
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


def is_near(host: JobHost) -> bool:
    """Return whether a host's agent and we can open each other's files in memory."""
    return host.spec.transport == "local" and bool(host.hello.get("near")) and payload.can_reach(int(host.hello["pid"]))
