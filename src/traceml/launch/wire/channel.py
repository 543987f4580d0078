"""Control channel between the launcher and the agent of one host: frames over a pair of descriptors.

A frame is `>IBI` (length of the body, kind, stream id) and its body. Kinds: 0 a message (a msgpack map whose `t` is its
name), 1 bytes of a stream, 2 credit (a `>Q` of additional bytes that may be sent on the stream), 3 the end of a stream
(empty, or a msgpack map that describes an error).

Messages and credit are sent before the bytes of streams, streams take turns, and each stream sends only what its
receiver has allowed: a slow reader of one stream delays that stream only. The channel has no threads and never blocks;
its owner runs a loop over the descriptors.

At level debug the logger `traceml.launch` records each message by its name, and each stream's start and end.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import msgpack

from traceml.errors import ProtocolError, TraceMLError

__all__ = [
    "GREETING",
    "PING_S",
    "STREAM_WINDOW_BYTES",
    "Channel",
    "ChannelClosedError",
    "IncomingStream",
    "OutgoingStream",
]

# Written first by an agent: everything before it is noise (banners, output of a shell's start-up files).
GREETING = b"\n\x00traceml-agent/1\x00\n"
# A peer that was silent for this long is pinged.
PING_S = 3.0
# A stream that is not accepted yet may send this much, which is kept; `accept` allows more.
STREAM_WINDOW_BYTES = 256 * 1024

_HEAD = struct.Struct(">IBI")
_CREDIT = struct.Struct(">Q")
_MESSAGE, _DATA, _MORE, _END = range(4)
_LONGEST_TICK_S = 2.0
_CHUNK_BYTES = 256 * 1024  # at most this much is sent before a new message
_READ_BYTES = 1024 * 1024
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_MAX_NOISE_BYTES = 256 * 1024
_MAX_BUFFERS = 64  # per writev
# Fields that the debug log shows.
_LOGGED_FIELDS = ("kind", "id", "rank", "fd", "size", "pid", "code", "signal", "address", "port", "error")


_log = logging.getLogger("traceml.launch")


class ChannelClosedError(TraceMLError, ConnectionError):
    """The channel has failed: the other side closed it, fell silent, or sent an invalid frame."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the control channel is closed: {reason}")
        self.reason = reason


class OutgoingStream:
    """A stream of bytes to the other side. Made by `Channel.open_stream`.

    Attributes:
        id: its number on the channel.
        on_drain: called when all written bytes were sent and more are allowed.
        on_ended: called when the stream's end is queued: a message sent from then on arrives after it.
        ended: whether the end is queued.
    """

    __slots__ = ("_channel", "_chunks", "_credit_bytes", "_end", "_queued_bytes", "ended", "id", "on_drain", "on_ended")

    def __init__(self, channel: Channel, stream_id: int) -> None:
        self.id = stream_id
        self.on_drain: Callable[[], object] | None = None
        self.on_ended: Callable[[], object] | None = None
        self.ended = False
        self._channel = channel
        self._chunks: deque[memoryview] = deque()
        self._queued_bytes, self._credit_bytes = 0, STREAM_WINDOW_BYTES
        self._end: bytes | None = None

    @property
    def writable_bytes(self) -> int:
        """The bytes that the other side allows now, beyond those queued."""
        return max(0, self._credit_bytes - self._queued_bytes)

    @property
    def queued_bytes(self) -> int:
        """The bytes that were written and not sent yet."""
        return self._queued_bytes

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Queue `data` by reference: it must not change until it is sent. Return `writable_bytes`."""
        if self._end is not None:
            raise ValueError(f"stream {self.id} has ended")

        view = memoryview(data)
        if view.nbytes:
            self._chunks.append(view.cast("B"))
            self._queued_bytes += view.nbytes
            self._channel._wake(self)

        return self.writable_bytes

    def end(self, error: dict[str, Any] | None = None) -> None:
        """End the stream after the written bytes; `error` reports to the other side why they are incomplete."""
        if self._end is None:
            self._end = msgpack.packb(error) if error else b""
            self._channel._wake(self)

    def abort(self, error: dict[str, Any]) -> None:
        """End the stream and drop the bytes that are not sent yet."""
        self._chunks.clear()
        self._queued_bytes = 0
        self.end(error)

    @property
    def _sendable(self) -> bool:
        return bool(self._chunks and self._credit_bytes) or (self._end is not None and not self._chunks)

    def _take(self) -> tuple[int, memoryview | bytes]:
        """Return the kind and body of the next frame."""
        if not self._chunks:
            assert self._end is not None
            return _END, self._end

        first = self._chunks[0]
        n = min(len(first), self._credit_bytes, _CHUNK_BYTES)
        self._credit_bytes -= n
        self._queued_bytes -= n
        if n == len(first):
            return _DATA, self._chunks.popleft()

        self._chunks[0] = first[n:]
        return _DATA, first[:n]


class IncomingStream:
    """A stream of bytes from the other side. Made by `Channel.accept`."""

    __slots__ = ("_allowed_bytes", "_channel", "_early", "_manual", "_on_end", "_owed_bytes", "_sink", "_window", "id")

    def __init__(self, channel: Channel, stream_id: int) -> None:
        self.id = stream_id
        self._channel = channel
        self._sink: Callable[[memoryview], object] | None = None
        self._on_end: Callable[[dict[str, Any] | None], object] | None = None
        self._early: list[bytes | tuple[dict[str, Any] | None]] = []  # received before it was accepted
        self._allowed_bytes, self._owed_bytes = STREAM_WINDOW_BYTES, 0
        self._window, self._manual = STREAM_WINDOW_BYTES, False

    def grant(self, n: int) -> None:
        """Allow the other side to send `n` more bytes; needed only if `accept` was called with `manual`."""
        self._owed_bytes += n
        if self._owed_bytes * 4 >= self._window:
            self._channel._grant(self.id, self._owed_bytes)
            self._allowed_bytes += self._owed_bytes
            self._owed_bytes = 0

    def _feed(self, view: memoryview) -> None:
        self._allowed_bytes -= len(view)
        if self._allowed_bytes < 0:
            raise ChannelClosedError(f"stream {self.id} sends more than it was allowed")

        if self._sink is None:
            self._early.append(bytes(view))
            return

        self._sink(view)
        if not self._manual:
            self.grant(len(view))

    def _finish(self, error: dict[str, Any] | None) -> None:
        if self._on_end is None:
            self._early.append((error,))
            return

        self._on_end(error)


class Channel:
    """One side of a control channel.

    The channel answers a message `ping` itself, so a side that runs its loop is never silent.

    Attributes:
        read_fd, write_fd: the descriptors to wait on; the channel owns them and makes them non-blocking.
        closed: whether `close` was called.
        noise: the bytes received before the other side's greeting.
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
            write_fd: target of ours; may be the same.
            side: this side.
            name: the other side's name, for logs.
            greeting: whether to skip everything before `GREETING`.
        """
        self.read_fd, self.write_fd = read_fd, write_fd
        self.name, self.closed = name, False
        self.noise = b""
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):  # no pipe, or the user's pipes have reached their limit
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _READ_BYTES)

        self._greeted = not greeting
        self._next_id = 2 if side == "launcher" else 1
        self._parity = self._next_id % 2
        self._checked_s = time.monotonic()
        self._quiet_s = self._asked_s = 0.0
        # outgoing
        self._urgent: deque[bytes | memoryview] = deque()
        self._leaving: deque[bytes | memoryview] = deque()
        self._outgoing: dict[int, OutgoingStream] = {}
        self._ready: dict[int, OutgoingStream] = {}
        # incoming
        self._incoming: dict[int, IncomingStream] = {}
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._head, self._body = bytearray(), bytearray()
        self._kind = self._stream = self._left = 0
        self._in_body = False

    def __repr__(self) -> str:
        return f"Channel(read_fd={self.read_fd}, write_fd={self.write_fd}, closed={self.closed})"

    # --- sending -----------------------------------------------------------------------------------------------------

    @property
    def wants_write(self) -> bool:
        """Whether `flush` has something to do once `write_fd` is writable."""
        return bool(self._urgent or self._leaving or self._ready)

    def send(self, t: str, **fields: Any) -> None:
        """Queue the message `t`; it goes before all streams.

        Raises:
            ProtocolError: a field cannot be encoded, or the message is too large.
        """
        try:
            body = msgpack.packb({"t": t, **fields}, unicode_errors="surrogateescape")
        except (TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"cannot encode a {t!r} message: {error}") from error

        if len(body) > _MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a {t!r} message of {len(body)} bytes exceeds {_MAX_MESSAGE_BYTES}: use a stream")

        self._urgent.append(_HEAD.pack(len(body), _MESSAGE, 0) + body)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: sent %s", self.name, _summary({"t": t, **fields}))

    def send_raw(self, data: bytes | memoryview) -> None:
        """Queue bytes that precede the first frame."""
        self._urgent.append(data)

    def open_stream(self, **about: Any) -> OutgoingStream:
        """Open a stream; a message `stream` announces its `id` and `about`."""
        stream = OutgoingStream(self, self._next_id)
        self._next_id += 2
        self.send("stream", id=stream.id, **about)
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
            if (
                stream.on_drain is not None
                and stream._end is None
                and stream.writable_bytes
                and not stream.queued_bytes
            ):
                stream.on_drain()

    def _gather(self, drained: dict[int, OutgoingStream]) -> bool:
        """Move the next frames to the output queue; return whether there are any."""
        size = 0
        while self._urgent and size < _CHUNK_BYTES:
            size += len(self._urgent[0])
            self._leaving.append(self._urgent.popleft())

        while self._ready and size < _CHUNK_BYTES:
            stream_id = next(iter(self._ready))
            stream = self._ready.pop(stream_id)
            kind, body = stream._take()
            self._leaving.append(_HEAD.pack(len(body), kind, stream_id))
            if body:
                self._leaving.append(body)

            size += len(body)
            if kind == _END:
                del self._outgoing[stream_id]
                stream.ended = True
                _log.debug("%s: ended stream %d", self.name, stream_id)
                if stream.on_ended is not None:
                    stream.on_ended()
            elif stream._sendable:
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
        if stream._sendable:
            self._ready.setdefault(stream.id, stream)

    def _grant(self, stream_id: int, n: int) -> None:
        self._urgent.append(_HEAD.pack(_CREDIT.size, _MORE, stream_id) + _CREDIT.pack(n))

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
            stream_id: the `id` of a message `stream`.
            sink: called with each piece; the view is valid during the call only. It must not raise.
            on_end: called once at the stream's end: with None, or with the other side's error.
            window_bytes: the bytes that the other side may send before the sink has consumed them.
            manual: the sink only queues; the owner calls `grant` once bytes are consumed.

        Raises:
            KeyError: there is no such stream.
        """
        stream = self._incoming[stream_id]
        stream._sink, stream._on_end = sink, on_end
        stream._window, stream._manual = max(window_bytes, STREAM_WINDOW_BYTES), manual
        if stream._window > STREAM_WINDOW_BYTES:
            more = stream._window - STREAM_WINDOW_BYTES
            stream._allowed_bytes += more
            self._grant(stream_id, more)

        early, stream._early = stream._early, []
        for piece in early:
            if isinstance(piece, tuple):
                self._incoming.pop(stream_id, None)
                stream._on_end(piece[0])
                continue

            sink(memoryview(piece))
            if not manual:
                stream.grant(len(piece))

        return stream

    def receive(self) -> list[dict[str, Any]]:
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
        view = self._buffer[:n] if self._greeted else self._skip_noise(self._buffer[:n])
        messages: list[dict[str, Any]] = []
        while view:
            view = self._body_of(view, messages) if self._in_body else self._head_of(view, messages)

        return messages

    def _skip_noise(self, view: memoryview) -> memoryview:
        self.noise += view
        before, found, after = self.noise.partition(GREETING)
        if found:
            self.noise, self._greeted = before, True
            return memoryview(after)

        if len(self.noise) > _MAX_NOISE_BYTES:
            raise ChannelClosedError(f"no greeting in the first {len(self.noise)} bytes")

        return view[:0]

    def _head_of(self, view: memoryview, messages: list[dict[str, Any]]) -> memoryview:
        missing = _HEAD.size - len(self._head)
        self._head += view[:missing]
        if len(self._head) < _HEAD.size:
            return view[:0]

        self._left, self._kind, self._stream = _HEAD.unpack(self._head)
        self._head.clear()
        self._body.clear()
        limit = _CHUNK_BYTES if self._kind == _DATA else _MAX_MESSAGE_BYTES
        if self._kind > _END or self._left > limit:
            raise ChannelClosedError(f"invalid frame: kind {self._kind}, {self._left} bytes")

        self._in_body = bool(self._left)
        if not self._left:
            self._frame(messages)

        return view[missing:]

    def _body_of(self, view: memoryview, messages: list[dict[str, Any]]) -> memoryview:
        piece, rest = view[: self._left], view[self._left :]
        self._left -= len(piece)
        self._in_body = bool(self._left)
        if self._kind == _DATA:
            self._stream_of(self._stream)._feed(piece)
        else:
            self._body += piece
            if not self._left:
                self._frame(messages)

        return rest

    def _stream_of(self, stream_id: int) -> IncomingStream:
        stream = self._incoming.get(stream_id)
        if stream is None:
            raise ChannelClosedError(f"bytes for stream {stream_id}, which was not opened")

        return stream

    def _frame(self, messages: list[dict[str, Any]]) -> None:
        """Handle a complete frame other than data."""
        if self._kind == _MORE:
            self._more()
        elif self._kind == _END:
            stream = self._stream_of(self._stream)
            if stream._on_end is not None:
                del self._incoming[self._stream]

            error = self._map() if self._body else None
            _log.debug("%s: stream %d ended%s", self.name, self._stream, f": {error}" if error else "")
            stream._finish(error)
        elif self._kind == _MESSAGE:
            self._message(self._map(), messages)

    def _more(self) -> None:
        if len(self._body) != _CREDIT.size:
            raise ChannelClosedError("credit of a wrong size")

        stream = self._outgoing.get(self._stream)
        if stream is None:  # it has ended
            return

        stream._credit_bytes += _CREDIT.unpack(self._body)[0]
        self._wake(stream)
        if stream.on_drain is not None and not stream.queued_bytes and stream._end is None:
            stream.on_drain()

    def _message(self, message: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        name = message.get("t")
        if name == "ping":
            self.send("pong")
            return

        if name == "pong":
            return

        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: received %s", self.name, _summary(message))

        if name == "stream":
            stream_id = message.get("id")
            if type(stream_id) is not int or stream_id % 2 == self._parity or stream_id in self._incoming:
                raise ChannelClosedError(f"an invalid stream number {stream_id!r}")

            self._incoming[stream_id] = IncomingStream(self, stream_id)

        messages.append(message)

    def _map(self) -> dict[str, Any]:
        try:
            found = msgpack.unpackb(self._body, strict_map_key=False, unicode_errors="surrogateescape")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ChannelClosedError(f"a message that is not msgpack ({error!r})") from error

        if type(found) is not dict:
            raise ChannelClosedError("a message that is not a map")

        return found

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
            raise ChannelClosedError(f"nothing was received from the other side for {self._quiet_s:.0f} s")

        if self._quiet_s - self._asked_s >= PING_S:
            self._asked_s = self._quiet_s
            self.send("ping")

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


def _summary(message: dict[str, Any]) -> str:
    """Return a message's name and its short facts, for logs; never its contents, which may hold secrets."""
    facts = (f"{name}={message[name]!s:.200}" for name in _LOGGED_FIELDS if message.get(name) is not None)
    return " ".join((str(message.get("t")), *facts))
