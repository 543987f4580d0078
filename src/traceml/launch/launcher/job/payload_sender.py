"""Transfer of the function and its arguments to the agents of all hosts."""

from __future__ import annotations

from collections.abc import Callable

from traceml.launch.launcher.job.job_host import JobHost
from traceml.launch.shared.channel_streams import OutgoingStream
from traceml.launch.shared.launch_messages import StreamOpened
from traceml.launch.shared.payload import SerializedValue
from traceml.launch.shared.payload_buffer import LARGE_BYTES, PayloadBuffer, can_reach

__all__ = ["PayloadSender", "shares_memory_with"]

_PIECE_BYTES = 32 << 20  # copied between two iterations of the loop


class PayloadSender:
    """Sends one value to each host: through its channel, or as a shared memory file if it is large and for this host.

    Args:
        call: the value; None: nothing is sent.
    """

    def __init__(self, call: SerializedValue | None, job: str) -> None:
        self._call, self._job = call, job
        self._shared: PayloadBuffer | None = None
        self._pending: list[OutgoingStream] = []  # streams that end once the shared file is filled

    def send(self, host: JobHost) -> int | None:
        """Begin to send; return the id of the stream that carries the value, None if there is none."""
        if self._call is None:
            return None

        channel, size_bytes = host.connection.channel, self._call.size_bytes
        if size_bytes >= LARGE_BYTES and shares_memory_with(host):
            if self._shared is None:
                self._shared = PayloadBuffer(size_bytes, shared=True)

            stream = channel.open_stream(
                StreamOpened(kind="payload", job=self._job, size=size_bytes, path=self._shared.path)
            )
            self._pending.append(stream)
            return stream.id

        stream = channel.open_stream(StreamOpened(kind="payload", job=self._job, size=size_bytes))
        for chunk in self._call.chunks():
            stream.write(chunk)

        stream.end()
        return stream.id

    def fill(self, run_loop: Callable[[], None]) -> None:
        """Fill the shared file, while workers start and other hosts receive theirs."""
        if self._shared is None or self._call is None:
            return

        for chunk in self._call.chunks():
            for start in range(0, len(chunk), _PIECE_BYTES):
                self._shared.feed(chunk[start : start + _PIECE_BYTES])
                run_loop()

        for stream in self._pending:
            stream.end()

    def close(self) -> None:
        """Close the shared file; agents that have opened it keep it."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None


def shares_memory_with(host: JobHost) -> bool:
    """Return whether a host's agent and this process can open each other's memory files."""
    if host.spec.transport != "local" or host.hello is None:
        return False

    return host.hello.can_reach_launcher and can_reach(host.hello.pid)
