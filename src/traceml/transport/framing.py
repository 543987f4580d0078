"""Frames: a 4-byte big-endian length, then one msgpack map whose key `t` is the kind of message."""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from traceml.errors import ProtocolError

__all__ = ["MAX_FRAME_BYTES", "MAX_HELLO_BYTES", "WIRE_VERSION", "Decoder", "decode_log", "encode", "rows_frame"]

WIRE_VERSION = 1
MAX_FRAME_BYTES = 8 * 1024 * 1024
# A peer without a proved token must not make the other side buffer much, nor decode lists of lists that take far more
# memory than their bytes. A hello takes 2 to 6 kB; its lists are the columns of a table.
MAX_HELLO_BYTES = 64 * 1024
_HELLO_ITEMS = 1024
# The longest list in a message has an entry per rank.
_MESSAGE_ITEMS = 1 << 17

# Names of files may be bytes that are not UTF-8; Python has lone surrogates for them.
_SURROGATES = "surrogatepass"
_LENGTH = struct.Struct(">I")
# The numbers of a rows frame have a fixed width, so that its head is one `pack` and a few constants.
_SEQ_N = struct.Struct(">Q3sI6sI")
_heads: dict[str, bytes] = {}
_SEQ = struct.Struct(">Q")
_ack_heads: dict[str, bytes] = {}


def encode(message: dict[str, Any]) -> bytes:
    """Return `message` as one frame.

    Raises:
        ProtocolError: it is larger than a frame may be, or contains a type unknown to msgpack.
    """
    try:
        payload: bytes = msgpack.packb(message, unicode_errors=_SURROGATES)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"cannot encode a {message.get('t')!r} message: {error}") from error

    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a {message.get('t')!r} message of {len(payload)} bytes exceeds {MAX_FRAME_BYTES}")

    return _LENGTH.pack(len(payload)) + payload


def rows_frame(table: str, seq: int, n: int, data: bytes) -> bytes:
    """Return the frame `rows{table, seq, n, data}`: 50 bytes and the table's name around the packed rows.

    Args:
        seq: number of the first row, counted from 0 over the life of the rank.
        data: the packed rows one after another, or for a log its msgpack maps one after another.
    """
    head = _heads.get(table)
    if head is None:
        head = _heads[table] = b"\x85\xa1t\xa4rows\xa5table" + msgpack.packb(table) + b"\xa3seq\xcf"

    size = len(head) + _SEQ_N.size + len(data)
    if size > MAX_FRAME_BYTES:
        raise ProtocolError(f"a rows frame of {size} bytes exceeds {MAX_FRAME_BYTES}: send fewer rows at a time")

    return b"".join((_LENGTH.pack(size), head, _SEQ_N.pack(seq, b"\xa1n\xce", n, b"\xa4data\xc6", len(data)), data))


def encode_ack(table: str, seq: int) -> bytes:
    """Return `ack{table, seq}` as one frame.

    All but the number is the same each time: 10,000 ranks are acknowledged ten times a second.
    """
    head = _ack_heads.get(table)
    if head is None:
        body = b"\x83\xa1t\xa3ack\xa5table" + bytes(msgpack.packb(table)) + b"\xa3seq\xcf"
        head = _ack_heads[table] = _LENGTH.pack(len(body) + _SEQ.size) + body

    return head + _SEQ.pack(seq)


class Decoder:
    """Incremental decoder from bytes to messages.

    Args:
        limit_bytes: the largest frame accepted; raise it once the peer is trusted.
    """

    __slots__ = ("_rest", "limit_bytes")

    def __init__(self, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._rest = bytearray()

    @property
    def pending_bytes(self) -> int:
        """Bytes of a message that has arrived in part."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Return the messages that `data` completes.

        Raises:
            ProtocolError: the bytes are not a valid frame, or announce one above the limit. The stream is then lost:
                close the connection.
        """
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < 4 or len(rest) < 4 + self._length(rest, 0):
                return []

            data = bytes(rest)
            rest.clear()

        messages = []
        items = _HELLO_ITEMS if self.limit_bytes <= MAX_HELLO_BYTES else _MESSAGE_ITEMS
        start, end = 0, len(data)
        while end - start >= 4:
            stop = start + 4 + self._length(data, start)
            if stop > end:
                break

            messages.append(_decode(data[start + 4 : stop], items))
            start = stop

        if start < end:
            rest += data[start:]

        return messages

    def clear(self) -> None:
        """Forget the bytes of a message that has arrived in part."""
        self._rest = bytearray()

    def _length(self, data: bytes | bytearray, start: int) -> int:
        length: int = _LENGTH.unpack_from(data, start)[0]
        if length > self.limit_bytes:
            raise ProtocolError(f"a frame of {length} bytes is announced, above the cap of {self.limit_bytes}")

        return length


def decode_log(data: bytes) -> list[dict[str, Any]]:
    """Return the maps of a log's `data`.

    Raises:
        ProtocolError: it is not a sequence of msgpack maps.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1), strict_map_key=False)
    unpacker.feed(data)
    rows = []
    try:
        while unpacker.tell() < len(data):
            rows.append(unpacker.unpack())  # raises where a map is cut off; iterating would only stop
    except (ValueError, TypeError, MemoryError, msgpack.UnpackException) as error:
        raise ProtocolError(f"rows of a log are not msgpack: {error!r}") from error

    if not all(isinstance(row, dict) for row in rows):
        raise ProtocolError("rows of a log are not maps")

    return rows


def _decode(payload: bytes, items: int) -> dict[str, Any]:
    try:
        message = msgpack.unpackb(
            payload, strict_map_key=False, max_array_len=items, max_map_len=items, unicode_errors=_SURROGATES
        )
    except (ValueError, TypeError, MemoryError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a frame of {len(payload)} bytes is not msgpack: {error!r}") from error

    if type(message) is not dict or type(message.get("t")) is not str:
        raise ProtocolError("a frame is not a map with a text `t`")

    return message
