"""Control channel between the launcher and the agent of one host: frames over a pair of descriptors.

Messages and credit are sent before the bytes of streams, streams take turns, and each stream sends only what its
receiver has allowed: a slow reader of one stream delays that stream only. The channel has no threads and never blocks;
its owner runs a loop over the descriptors.

At level debug the logger `traceml.launch` records each message by its name, and each stream's start and end.

Process: launcher and agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from traceml.errors import ProtocolError
from traceml.launch.shared.channel_frames import (
    CHUNK_BYTES,
    ChannelClosedError,
    ChannelDecoder,
    FrameKind,
    credit_frame,
    credit_of,
    frame_head,
    map_of,
    message_frame,
)
from traceml.launch.shared.channel_streams import STREAM_WINDOW_BYTES, IncomingStream, OutgoingStream
from traceml.launch.shared.launch_messages import FROM_AGENT, FROM_LAUNCHER, Message, Ping, Pong, StreamOpened, decode

__all__ = ["Channel"]

# A peer that was silent for this long is pinged.
_PING_S = 3.0

_LONGEST_TICK_S = 2.0
_READ_BYTES = 1024 * 1024
_MAX_BUFFERS = 64  # per writev
# Fields that the debug log shows.
_LOGGED_FIELDS = ("kind", "id", "rank", "fd", "size", "pid", "code", "signal", "address", "port", "error")

_log = logging.getLogger("traceml.launch")


class Channel:
    """One side of a control channel.

    The channel answers the message `Ping` itself, so a side that runs its loop is never silent.

    Attributes:
        read_fd, write_fd: the descriptors to wait on; the channel owns them and makes them non-blocking.
        closed: whether `close` was called.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        side: Literal["launcher", "agent"],
        name: str = "peer",
        greeting: bool = False,
    ) -> None:
        """Take over the two descriptors.

        Args:
            read_fd: source of the other side's frames.
            name: the other side's name, for logs.
            greeting: whether to skip everything before `GREETING`.
        """
        self.read_fd, self.write_fd = read_fd, write_fd
        self.name, self.closed = name, False
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):  # no pipe, or the user's pipes have reached their limit
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _READ_BYTES)

        self._next_id = 2 if side == "launcher" else 1
        self._parity = self._next_id % 2
        self._kinds = FROM_AGENT if side == "launcher" else FROM_LAUNCHER
        self._checked_s = time.monotonic()
        self._quiet_s = self._asked_s = 0.0
        # outgoing
        self._watched_by: selectors.BaseSelector | None = None
        self._opening: Callable[[], bytes] | None = None
        self._urgent: deque[bytes | memoryview] = deque()
        self._leaving: deque[bytes | memoryview] = deque()
        self._outgoing: dict[int, OutgoingStream] = {}
        self._ready: dict[int, OutgoingStream] = {}
        # incoming
        self._incoming: dict[int, IncomingStream] = {}
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._decoder = ChannelDecoder(greeting=greeting)

    def __repr__(self) -> str:
        return f"Channel(read_fd={self.read_fd}, write_fd={self.write_fd}, closed={self.closed})"

    @property
    def noise(self) -> bytes:
        """The bytes received before the other side's greeting."""
        return self._decoder.noise

    @property
    def greeted(self) -> bool:
        """Whether the other side's greeting was received, or none is expected."""
        return self._decoder.greeted

    # --- sending -----------------------------------------------------------------------------------------------------

    @property
    def wants_write(self) -> bool:
        """Whether `flush` has something to do once `write_fd` is writable."""
        return bool(self._opening or self._urgent or self._leaving or self._ready)

    def watch_write(self, selector: selectors.BaseSelector) -> None:
        """Have `selector` wake the loop once `write_fd` is writable, as long as `flush` has something to do then."""
        if self.wants_write == (self._watched_by is selector):
            return

        if self.wants_write:
            self._watched_by = selector
            selector.register(self.write_fd, selectors.EVENT_WRITE, lambda _: None)  # each iteration flushes
        else:
            self._watched_by = None
            selector.unregister(self.write_fd)

    def send(self, message: Message) -> None:
        """Queue a message; it goes before all streams.

        Raises:
            ProtocolError: a field cannot be encoded, or the message is too large.
        """
        self._urgent.append(message_frame(message))
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: sent %s", self.name, _summary(message))

    def send_raw(self, data: bytes | memoryview) -> None:
        """Queue bytes that precede the first frame."""
        self._urgent.append(data)

    def open_with(self, make: Callable[[], bytes]) -> None:
        """Queue bytes that precede everything else; they are made when they are written."""
        self._opening = make

    def open_stream(self, about: StreamOpened) -> OutgoingStream:
        """Open a stream; announce it by `about`, whose `id` is set here."""
        stream = OutgoingStream(self._next_id, self._wake)
        self._next_id += 2
        about.id = stream.id
        self.send(about)
        self._outgoing[stream.id] = stream
        return stream

    def flush(self) -> None:
        """Write what the descriptor accepts now.

        Raises:
            ChannelClosedError: the other side is gone.
        """
        drained: dict[int, OutgoingStream] = {}
        while self._leaving or self._gather(drained):
            try:
                n = os.writev(self.write_fd, [self._leaving[i] for i in range(min(len(self._leaving), _MAX_BUFFERS))])
            except BlockingIOError:
                break
            except OSError as error:
                raise ChannelClosedError(f"cannot write ({error.strerror})") from error

            self._left_by(n)

        for stream in drained.values():
            stream.call_on_drain()

    def _gather(self, drained: dict[int, OutgoingStream]) -> bool:
        """Move the next frames to the output queue; return whether there are any."""
        if self._opening is not None:
            opening, self._opening = self._opening(), None
            self._leaving.append(opening)

        size = 0
        while self._urgent and size < CHUNK_BYTES:
            size += len(self._urgent[0])
            self._leaving.append(self._urgent.popleft())

        while self._ready and size < CHUNK_BYTES:
            stream_id = next(iter(self._ready))
            stream = self._ready.pop(stream_id)
            kind, body = stream.next_frame()
            self._leaving.append(frame_head(len(body), kind, stream_id))
            if body:
                self._leaving.append(body)

            size += len(body)
            if kind is FrameKind.END:
                del self._outgoing[stream_id]
                stream.ended = True
                _log.debug("%s: ended stream %d", self.name, stream_id)
                if stream.on_ended is not None:
                    stream.on_ended()
            elif stream.has_frame:
                self._ready[stream_id] = stream  # behind the others

            if not stream.queued_bytes:
                drained[stream_id] = stream

        return bool(self._leaving)

    def _left_by(self, n: int) -> None:
        while n:
            first = self._leaving[0]
            if len(first) > n:
                self._leaving[0] = memoryview(first)[n:]
                return

            n -= len(first)
            self._leaving.popleft()

    def _wake(self, stream: OutgoingStream) -> None:
        if stream.has_frame:
            self._ready.setdefault(stream.id, stream)

    def _allow(self, stream_id: int, n: int) -> None:
        self._urgent.append(credit_frame(stream_id, n))

    # --- receiving ---------------------------------------------------------------------------------------------------

    def accept(
        self,
        stream_id: int,
        sink: Callable[[memoryview], object],
        on_end: Callable[[dict[str, Any] | None], object],
        *,
        window_bytes: int = STREAM_WINDOW_BYTES,
        manual: bool = False,
    ) -> IncomingStream:
        """Receive a stream that the other side opened.

        Args:
            sink: called with each piece; the view is valid during the call only. It must not raise.
            on_end: called once at the stream's end: with None, or with the other side's error.
            window_bytes: the bytes that the other side may send before the sink has consumed them.
            manual: the sink only queues; the owner calls `grant` once bytes are consumed.

        Raises:
            KeyError: there is no such stream.
        """
        stream = self._incoming[stream_id]
        if stream.accept(sink, on_end, window_bytes=window_bytes, manual=manual):
            del self._incoming[stream_id]

        return stream

    def receive(self) -> list[Message]:
        """Read what has arrived; return the messages in it, after passing the bytes of streams to their sinks.

        Raises:
            ChannelClosedError: the other side closed the channel, or sent an invalid frame.
        """
        try:
            n = os.readv(self.read_fd, [self._buffer])
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosedError(f"cannot read ({error.strerror})") from error

        if n == 0:
            raise ChannelClosedError("the other side closed it")

        self._quiet_s = self._asked_s = 0.0
        messages: list[Message] = []
        for kind, stream_id, body in self._decoder.feed(self._buffer[:n]):
            if kind is FrameKind.DATA:
                self._stream_of(stream_id).feed(memoryview(body))
            elif kind is FrameKind.CREDIT:
                self._allowed(stream_id, credit_of(body))
            elif kind is FrameKind.END:
                self._ended(stream_id, map_of(body) if body else None)
            else:
                self._message(map_of(body), messages)

        return messages

    def _stream_of(self, stream_id: int) -> IncomingStream:
        stream = self._incoming.get(stream_id)
        if stream is None:
            raise ChannelClosedError(f"bytes for stream {stream_id}, which was not opened")

        return stream

    def _allowed(self, stream_id: int, n: int) -> None:
        stream = self._outgoing.get(stream_id)
        if stream is not None:  # else it has ended
            stream.allow(n)
            stream.call_on_drain()

    def _ended(self, stream_id: int, error: dict[str, Any] | None) -> None:
        stream = self._stream_of(stream_id)
        if stream.accepted:
            del self._incoming[stream_id]

        _log.debug("%s: stream %d ended%s", self.name, stream_id, f": {error}" if error else "")
        stream.finish(error)

    def _message(self, fields: dict[str, Any], messages: list[Message]) -> None:
        try:
            message = decode(fields, self._kinds)
        except ProtocolError as error:
            raise ChannelClosedError(str(error)) from error

        if isinstance(message, Ping):
            self.send(Pong())
            return

        if isinstance(message, Pong):
            return

        if message is None:
            _log.debug("%s: ignored the unknown message %.80r", self.name, fields.get("t"))
            return

        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: received %s", self.name, _summary(message))

        if isinstance(message, StreamOpened):
            self._announced(message.id)

        messages.append(message)

    def _announced(self, stream_id: int) -> None:
        if type(stream_id) is not int or stream_id < 1 or stream_id % 2 == self._parity or stream_id in self._incoming:
            raise ChannelClosedError(f"an invalid stream number {stream_id!r}")

        self._incoming[stream_id] = IncomingStream(stream_id, partial(self._allow, stream_id))

    # --- life cycle --------------------------------------------------------------------------------------------------

    def check(self, silence_s: float) -> None:
        """Ping a silent peer; call this about once a second.

        Args:
            silence_s: the longest silence that is accepted; 0: without limit.

        Raises:
            ChannelClosedError: the peer was silent for longer.
        """
        now_s = time.monotonic()
        # time in which the loop did not run (a suspended process, a notebook between two cells) does not count
        self._quiet_s += min(now_s - self._checked_s, _LONGEST_TICK_S)
        self._checked_s = now_s
        if silence_s and self._quiet_s > silence_s:
            from traceml.formatting import left_text  # its patterns cost an agent more than its own channel

            raise ChannelClosedError(f"nothing was received from the other side for {left_text(self._quiet_s)}")

        if self._quiet_s - self._asked_s >= _PING_S:
            self._asked_s = self._quiet_s
            self.send(Ping())

    @property
    def silence_s(self) -> float:
        """Seconds since anything was received, while the loop ran."""
        return self._quiet_s + min(time.monotonic() - self._checked_s, _LONGEST_TICK_S)

    def forget_silence(self) -> None:
        """Count silence from now on: until now the peer had no reason to send."""
        self._checked_s = time.monotonic()
        self._quiet_s = self._asked_s = 0.0

    def close(self) -> None:
        """Close both descriptors; bytes that are not sent are lost."""
        if self.closed:
            return

        self.closed = True
        for fd in {self.read_fd, self.write_fd}:
            os.close(fd)


def _summary(message: Message) -> str:
    """Return a message's name and its short facts, for logs; never its contents, which may hold secrets."""
    sent = vars(message)
    facts = (f"{name}={sent[name]!s:.200}" for name in _LOGGED_FIELDS if sent.get(name) is not None)
    return " ".join((message.t, *facts))
