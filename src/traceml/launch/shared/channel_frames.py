"""Frames of the control channel between the launcher and an agent.

A frame is `>IBI` (length of the body, kind, stream id) and its body; `FrameKind` lists the kinds.

Process: launcher and agent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import msgpack

from traceml.errors import ProtocolError, TraceMLError
from traceml.launch.shared.launch_messages import Message

__all__ = [
    "CHUNK_BYTES", "GREETING", "ChannelClosedError", "ChannelDecoder", "FrameKind", "credit_frame",
    "credit_of", "frame_head", "map_of", "message_frame",
]  # fmt: skip

# Written first by an agent: everything before it is noise (banners, output of a shell's start-up files).
GREETING = b"\n\x00traceml-agent/1\x00\n"
# At most this much is sent before a new message.
CHUNK_BYTES = 256 * 1024
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_HEAD = struct.Struct(">IBI")
_CREDIT = struct.Struct(">Q")
_MAX_NOISE_BYTES = 256 * 1024


class ChannelClosedError(TraceMLError, ConnectionError):
    """The channel has failed: the other side closed it, fell silent, or sent an invalid frame."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the control channel is closed: {reason}")
        self.reason = reason


class FrameKind(IntEnum):
    """Kinds of frames.

    Attributes:
        MESSAGE: a msgpack map whose `t` is its name.
        DATA: bytes of a stream.
        CREDIT: a `>Q` of additional bytes that may be sent on the stream.
        END: the end of a stream: empty, or a msgpack map that describes an error.
    """

    MESSAGE = 0
    DATA = 1
    CREDIT = 2
    END = 3


def frame_head(size: int, kind: FrameKind, stream_id: int = 0) -> bytes:
    """Return what precedes a body of `size` bytes."""
    return _HEAD.pack(size, kind, stream_id)


def message_frame(message: Message) -> bytes:
    """Return the frame of a message.

    Raises:
        ProtocolError: a field cannot be encoded, or the message is too large.
    """
    try:
        body = msgpack.packb(message.to_map(), unicode_errors="surrogateescape")
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"cannot encode a {message.t!r} message: {error}") from error

    if len(body) > _MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a {message.t!r} message of {len(body)} bytes exceeds {_MAX_MESSAGE_BYTES}: use a stream")

    return frame_head(len(body), FrameKind.MESSAGE) + bytes(body)


def credit_frame(stream_id: int, n: int) -> bytes:
    """Return a frame that allows `n` more bytes on a stream."""
    return frame_head(_CREDIT.size, FrameKind.CREDIT, stream_id) + _CREDIT.pack(n)


def credit_of(body: memoryview | bytearray) -> int:
    """Return the bytes that a frame allows.

    Raises:
        ChannelClosedError: the body has a wrong size.
    """
    if len(body) != _CREDIT.size:
        raise ChannelClosedError("credit of a wrong size")

    return int(_CREDIT.unpack(body)[0])


def map_of(body: memoryview | bytearray) -> dict[str, Any]:
    """Return the map that a body holds.

    Raises:
        ChannelClosedError: it holds none.
    """
    try:
        found = msgpack.unpackb(body, strict_map_key=False, unicode_errors="surrogateescape")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ChannelClosedError(f"a message that is not msgpack ({error!r})") from error

    if type(found) is not dict:
        raise ChannelClosedError("a message that is not a map")

    return found


class ChannelDecoder:
    """Splits received bytes into frames.

    Attributes:
        noise: the bytes received before the greeting.
        greeted: whether the greeting was received, or none is expected.
    """

    def __init__(self, *, greeting: bool) -> None:
        self.noise = b""
        self.greeted = not greeting
        self._head, self._body = bytearray(), bytearray()
        self._kind, self._stream, self._left = FrameKind.MESSAGE, 0, 0

    def feed(self, data: memoryview) -> Iterator[tuple[FrameKind, int, memoryview | bytearray]]:
        """Yield kind, stream id and body of each complete frame; bytes of a stream at once, in the pieces that came.

        A body is valid until the next one is taken.

        Raises:
            ChannelClosedError: a frame is invalid, or there is too much noise before the greeting.
        """
        view = data if self.greeted else self._skip_noise(data)
        while view:
            if not self._left:
                view = self._read_head(view)
                if self._head or self._left:
                    continue

                yield self._kind, self._stream, bytearray()  # a frame without a body
                continue

            piece, view = view[: self._left], view[self._left :]
            self._left -= len(piece)
            if self._kind is FrameKind.DATA:
                yield self._kind, self._stream, piece
                continue

            self._body += piece
            if not self._left:
                yield self._kind, self._stream, self._body

    def _skip_noise(self, view: memoryview) -> memoryview:
        self.noise += view
        before, found, after = self.noise.partition(GREETING)
        if found:
            self.noise, self.greeted = before, True
            return memoryview(after)

        if len(self.noise) > _MAX_NOISE_BYTES:
            raise ChannelClosedError(f"no greeting in the first {len(self.noise)} bytes")

        return view[:0]

    def _read_head(self, view: memoryview) -> memoryview:
        missing = _HEAD.size - len(self._head)
        self._head += view[:missing]
        if len(self._head) < _HEAD.size:
            return view[:0]

        self._left, kind, self._stream = _HEAD.unpack(self._head)
        self._head.clear()
        self._body.clear()
        if kind not in _KINDS or self._left > (CHUNK_BYTES if kind == FrameKind.DATA else _MAX_MESSAGE_BYTES):
            raise ChannelClosedError(f"invalid frame: kind {kind}, {self._left} bytes")

        self._kind = FrameKind(kind)
        return view[missing:]


_KINDS = frozenset(FrameKind)
