"""Bytes and messages on the wire: frames, handshake, rows, and the channel of a launch."""

from __future__ import annotations

import gzip
import io
import logging
import os
import tarfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
from hypothesis import strategies as st

from tests.generated.targets import DAMAGE, JSON_VALUES, PACKABLE, Damage, Target, refusal
from traceml.aggregator.ingest import Ingest
from traceml.aggregator.live_rows import LiveRows
from traceml.aggregator.streams.stream import Incarnation, RankStream
from traceml.database.flight.flight_archive import unpack_flight
from traceml.database.schema import TABLES, Table
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.errors import ProtocolError
from traceml.launch.shared.channel_frames import (
    ChannelClosedError,
    ChannelDecoder,
    FrameKind,
    credit_of,
    frame_head,
    map_of,
)
from traceml.launch.shared.log_records import RecordDecoder, RecordHandler
from traceml.run_folder import STORE_NAME
from traceml.transport.framing import MAX_HELLO_BYTES, Decoder, decode_log, encode, rows_frame
from traceml.transport.hello import Hello
from traceml.transport.server import RefusedError

__all__ = ["TARGETS"]

_MESSAGES = [
    {"t": "ping", "ns": 1},
    {"t": "rows", "table": "evals", "seq": 0, "n": 1, "data": bytes(48)},
    {"t": "command", "id": 3, "name": "stop", "args": {"a": [1, 2, {"b": None}]}},
    {"t": "bye", "text": "ü" * 50},
]
_ROWS = [{"id": 1, "name": "a"}, {"id": 2, "name": "b" * 40}, {"id": 3, "value": [1.5, None]}]


@cache
def _stream() -> tuple[bytes, list[int]]:
    """Return a stream of messages, and where each ends."""
    frames = [encode(_MESSAGES[0]), rows_frame("evals", 0, 1, bytes(48)), *map(encode, _MESSAGES[2:])]
    ends = [sum(map(len, frames[: number + 1])) for number in range(len(frames))]
    return b"".join(frames), ends


def _frames(value: tuple[Damage, list[int], bool], _folder: Path) -> None:
    """Whole messages before the damage arrive; then at most a refusal."""
    damage, sizes, is_hello = value
    good, ends = _stream()
    data, first = damage.of(good), damage.first_change(good)
    decoder = Decoder(MAX_HELLO_BYTES) if is_hello else Decoder()
    found: list[dict[str, Any]] = []

    def feed() -> None:
        at = 0
        for size in [*sizes, len(data)]:
            found.extend(decoder.feed(data[at : at + size]))
            at += size

    error = refusal(feed)
    whole = sum(end <= first for end in ends)
    if error is None:
        assert found[:whole] == _MESSAGES[:whole]
    else:
        assert isinstance(error, ProtocolError)

    assert all(type(message["t"]) is str for message in found)


def _log(damage: Damage, _folder: Path) -> None:
    data = damage.of(b"".join(map(msgpack.packb, _ROWS)))
    refusal(lambda: decode_log(data))


def _hello(changes: dict[str, Any], _folder: Path) -> None:
    """A hello of any values is a valid one or refused with the name of the field."""
    message = {**Hello(role="rank", run="job", rank=0, world_size=2).to_message(1, b"n" * 16, b"m" * 32), **changes}
    made: list[Hello] = []
    error = refusal(lambda: made.append(Hello.from_message(message)))
    if error is None:
        (hello,) = made
        assert 0 <= hello.rank < hello.world_size
        assert all(isinstance(item, int) for item in hello.clock)


class _Refusing:
    """A peer to whom acknowledgments are written."""

    def write(self, frames: bytes) -> None:
        Decoder().feed(frames)


def _rows_messages(messages: list[tuple[Any, Any, Any, Any]], folder: Path) -> None:
    """A rank that sends anything is refused; what was accepted is stored and can be read."""
    with StoreWriter(folder / STORE_NAME) as store:
        live = LiveRows(1)
        ingest = Ingest(store, live, lambda _paused: None)
        stream = RankStream(1, 0, 0, Incarnation("host", "boot", 100, 1, "r0"), flight="")
        store.stream(StreamIdentity(0, 0, "host", 100, 1, "r0"))
        live.join(stream)
        stream.connect(_Refusing())  # type: ignore[arg-type]
        for table, seq, n, data in messages:
            with suppress(ProtocolError, RefusedError):
                ingest.take(stream, table, seq, n, data)

        assert ingest.commit(force=True)
        taken = dict(stream.next)

    with StoreReader(folder / STORE_NAME) as reader:
        for table, after in taken.items():
            assert reader.stored(table) + reader.lost(table) == after
            list(reader.frames(table))


@st.composite
def _row_frames(draw: st.DrawFn) -> list[tuple[Any, Any, Any, Any]]:
    """Draw frames of which most have the right form, but rows of any values."""
    frames = []
    for _ in range(draw(st.integers(1, 5))):
        name = draw(st.sampled_from(sorted(TABLES)))
        table = TABLES[name]
        n = draw(st.integers(1, 4))
        if isinstance(table, Table):
            data = draw(st.binary(min_size=n * table.row_bytes, max_size=n * table.row_bytes))
        else:
            keys = st.sampled_from(
                ["id", "name", "kind", "t_ns", "value", "path", "step", "text", "data", "chunk", "n"]
            )
            maps = draw(st.lists(st.dictionaries(keys, PACKABLE, max_size=5), min_size=n, max_size=n))
            data = b"".join(msgpack.packb(row) for row in maps)

        odd = draw(st.integers(0, 9))
        frame: list[Any] = [name, draw(st.integers(0, 20)), n, data]
        if odd < 4:
            frame[odd] = draw(JSON_VALUES)

        frames.append(tuple(frame))

    return frames


def _channel(value: tuple[Damage, list[int]], _folder: Path) -> None:
    damage, sizes = value
    body = msgpack.packb({"t": "hello", "pid": 3})
    good = frame_head(len(body), FrameKind.MESSAGE) + body + frame_head(3, FrameKind.DATA, 2) + b"abc"
    good += frame_head(8, FrameKind.CREDIT, 2) + bytes(8) + frame_head(0, FrameKind.END, 2)
    data, decoder = damage.of(good), ChannelDecoder(greeting=False)

    def feed() -> None:
        at = 0
        for size in [*sizes, len(data)]:
            for kind, _, received in decoder.feed(memoryview(data)[at : at + size]):
                if kind is FrameKind.MESSAGE:
                    map_of(received)
                elif kind is FrameKind.CREDIT:
                    credit_of(received)

            at += size

    assert isinstance(refusal(feed), ChannelClosedError | None)


@cache
def _records() -> bytes:
    reading, writing = os.pipe()
    handler = RecordHandler(writing)
    for number in range(3):
        handler.emit(logging.makeLogRecord({"name": "a", "levelno": 20, "levelname": "INFO", "msg": f"text {number}"}))

    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        return file.read()


def _log_records(damage: Damage, _folder: Path) -> None:
    decoder = RecordDecoder()
    for record in decoder.feed(damage.of(_records())):
        assert isinstance(record.getMessage(), str)
        logging.Formatter().format(record)


@cache
def _archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, data in (("flight", b"x" * 3000), ("journal/metrics", b"y" * 500), ("files/0.bin", b"z")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

    return buffer.getvalue()


def _archives(value: tuple[Damage, bool], folder: Path) -> None:
    """An archive from another host is stored or refused; nothing is written elsewhere."""
    damage, is_inner = value
    data = gzip.compress(damage.of(gzip.decompress(_archive())), 1) if is_inner else damage.of(_archive())
    place = folder / "flights"
    with suppress(ValueError):
        unpack_flight(data, place, "1-2-3")

    assert {path.name for path in folder.iterdir()} <= {"flights"}
    assert all(path.name.startswith("1-2-3") for path in place.iterdir())


_SIZES = st.lists(st.integers(0, 60), max_size=6)
_FIELDS = st.sampled_from([*Hello.__dataclass_fields__, "x"])
TARGETS = (
    Target("frames", st.tuples(DAMAGE, _SIZES, st.booleans()), _frames, 60),
    Target("rows of a log", DAMAGE, _log, 40),
    Target("hello", st.dictionaries(_FIELDS, JSON_VALUES, max_size=3), _hello, 60),
    Target("rows messages", _row_frames(), _rows_messages, 25),
    Target("channel of a launch", st.tuples(DAMAGE, _SIZES), _channel, 40),
    Target("logging records of a worker", DAMAGE, _log_records, 40),
    Target("archive of a flight file", st.tuples(DAMAGE, st.booleans()), _archives, 30),
)
