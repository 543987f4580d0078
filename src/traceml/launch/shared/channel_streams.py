"""Streams of bytes on a control channel, each with its own flow control.

Process: launcher and agent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgpack

from traceml.launch.shared.channel_frames import CHUNK_BYTES, ChannelClosedError, FrameKind

__all__ = ["STREAM_WINDOW_BYTES", "IncomingStream", "OutgoingStream"]

# A stream that is not accepted yet may send this much, which is kept; `accept` allows more.
STREAM_WINDOW_BYTES = 256 * 1024


class OutgoingStream:
    """A stream of bytes to the other side. Made by `Channel.open_stream`.

    Attributes:
        id: its number on the channel.
        queued_bytes: bytes that were written and not sent yet.
        on_drain: called when all written bytes were sent and more are allowed.
        on_ended: called when the stream's end is queued: a message sent from then on arrives after it.
    """

    __slots__ = ("_chunks", "_credit_bytes", "_end", "_wake", "ended", "id", "on_drain", "on_ended", "queued_bytes")

    def __init__(self, stream_id: int, wake: Callable[[OutgoingStream], object]) -> None:
        """Open a stream.

        Args:
            wake: called when there may be a frame to send.
        """
        self.id = stream_id
        self.on_drain: Callable[[], object] | None = None
        self.on_ended: Callable[[], object] | None = None
        self.ended = False
        self._wake = wake
        self._chunks: deque[memoryview] = deque()
        self.queued_bytes, self._credit_bytes = 0, STREAM_WINDOW_BYTES
        self._end: bytes | None = None

    @property
    def writable_bytes(self) -> int:
        """The bytes that the other side allows now, beyond those queued."""
        return max(0, self._credit_bytes - self.queued_bytes)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue `data` by reference: it must not change until it is sent."""
        if self._end is not None:
            raise ValueError(f"stream {self.id} has ended")

        view = memoryview(data)
        if view.nbytes:
            self._chunks.append(view.cast("B"))
            self.queued_bytes += view.nbytes
            self._wake(self)

    def end(self, error: dict[str, Any] | None = None) -> None:
        """End the stream after the written bytes; `error` reports to the other side why they are incomplete."""
        if self._end is None:
            self._end = msgpack.packb(error) if error else b""
            self._wake(self)

    def abort(self, error: dict[str, Any]) -> None:
        """End the stream and drop the bytes that are not sent yet."""
        self._chunks.clear()
        self.queued_bytes = 0
        self.end(error)

    @property
    def has_frame(self) -> bool:
        """Whether a frame may be sent now: allowed bytes, or the end."""
        return bool(self._chunks and self._credit_bytes) or (self._end is not None and not self._chunks)

    def allow(self, n: int) -> None:
        """Take note that the other side allows `n` more bytes."""
        self._credit_bytes += n
        self._wake(self)

    def call_on_drain(self) -> None:
        """Call `on_drain` if everything is sent and more may be written."""
        if self.on_drain is not None and self._end is None and self.writable_bytes and not self.queued_bytes:
            self.on_drain()

    def next_frame(self) -> tuple[FrameKind, memoryview | bytes]:
        """Remove and return the kind and body of the next frame; call this only if there is one."""
        if not self._chunks:
            assert self._end is not None
            return FrameKind.END, self._end

        first = self._chunks[0]
        n = min(len(first), self._credit_bytes, CHUNK_BYTES)
        self._credit_bytes -= n
        self.queued_bytes -= n
        if n == len(first):
            return FrameKind.DATA, self._chunks.popleft()

        self._chunks[0] = first[n:]
        return FrameKind.DATA, first[:n]


class IncomingStream:
    """A stream of bytes from the other side. Made by `Channel`, which keeps what arrives until `accept` is called."""

    __slots__ = ("_allow", "_allowed_bytes", "_early", "_manual", "_on_end", "_owed_bytes", "_sink", "_window", "id")

    def __init__(self, stream_id: int, allow: Callable[[int], object]) -> None:
        """Take over a stream.

        Args:
            allow: called to let the other side send this many more bytes.
        """
        self.id = stream_id
        self._allow = allow
        self._sink: Callable[[memoryview], object] | None = None
        self._on_end: Callable[[dict[str, Any] | None], object] | None = None
        self._early: list[bytes | tuple[dict[str, Any] | None]] = []  # received before it was accepted
        self._allowed_bytes, self._owed_bytes = STREAM_WINDOW_BYTES, 0
        self._window, self._manual = STREAM_WINDOW_BYTES, False

    @property
    def accepted(self) -> bool:
        """Whether `accept` was called."""
        return self._sink is not None

    def accept(
        self,
        sink: Callable[[memoryview], object],
        on_end: Callable[[dict[str, Any] | None], object],
        *,
        window_bytes: int,
        manual: bool,
    ) -> bool:
        """Pass on what came and comes, see `Channel.accept`; return whether the stream has ended already."""
        self._sink, self._on_end = sink, on_end
        self._window, self._manual = max(window_bytes, STREAM_WINDOW_BYTES), manual
        if more := self._window - STREAM_WINDOW_BYTES:
            self._allowed_bytes += more
            self._allow(more)

        early, self._early = self._early, []
        for piece in early:
            if isinstance(piece, tuple):
                on_end(piece[0])
                return True

            self._pass_on(memoryview(piece))

        return False

    def grant(self, n: int) -> None:
        """Allow the other side to send `n` more bytes; needed only if `accept` was called with `manual`."""
        self._owed_bytes += n
        if self._owed_bytes * 4 >= self._window:
            self._allow(self._owed_bytes)
            self._allowed_bytes += self._owed_bytes
            self._owed_bytes = 0

    def feed(self, view: memoryview) -> None:
        """Take bytes from the channel.

        Raises:
            ChannelClosedError: they are more than the other side was allowed to send.
        """
        self._allowed_bytes -= len(view)
        if self._allowed_bytes < 0:
            raise ChannelClosedError(f"stream {self.id} sends more than it was allowed")

        if self._sink is None:
            self._early.append(bytes(view))
        else:
            self._pass_on(view)

    def finish(self, error: dict[str, Any] | None) -> None:
        """Take the end from the channel, with the other side's error."""
        if self._on_end is None:
            self._early.append((error,))
        else:
            self._on_end(error)

    def _pass_on(self, view: memoryview) -> None:
        assert self._sink is not None
        self._sink(view)
        if not self._manual:
            self.grant(len(view))
