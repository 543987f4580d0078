from __future__ import annotations

import os
import struct
import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traceml.errors import ProtocolError
from traceml.transport.framing import MAX_FRAME_BYTES, MAX_HELLO_BYTES, Decoder, decode_log, encode, rows_frame


def test_round_trip_in_any_pieces():
    """Messages come out whole and in order, however the bytes are cut."""
    messages = [{"t": "ack", "table": "steps", "seq": number} for number in range(5)]
    data = b"".join(map(encode, messages))

    for size in (1, 3, 7, len(data)):
        decoder = Decoder()
        out = []
        for start in range(0, len(data), size):
            out += decoder.feed(data[start : start + size])

        assert out == messages
        assert decoder.feed(encode(messages[0])) == messages[:1]  # nothing of the earlier frames is left


def test_names_of_files_that_are_not_utf8_come_out_as_they_were():
    """A path is the same on the other side, whatever its bytes are."""
    message = {"t": "welcome", "run_dir": os.fsdecode(b"/runs/d\xe9p")}

    assert Decoder().feed(encode(message)) == [message]


def test_rows_frame_is_the_message_it_stands_for():
    """The hand-written rows frame decodes to the documented map, and costs 54 bytes with the table `steps`."""
    data = bytes(range(104))

    frame = rows_frame("steps", 2**40, 1, data)

    assert Decoder().feed(frame) == [{"t": "rows", "table": "steps", "seq": 2**40, "n": 1, "data": data}]
    assert len(frame) - len(data) == 54


def test_wire_costs_at_most_110_bytes_per_row_at_20_rows():
    """A frame of 20 step rows stays within the budget per row."""
    assert len(rows_frame("steps", 0, 20, bytes(2080))) / 20 <= 110


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 0xFFFFFFFF, struct.unpack(">I", b"GET ")[0]])
def test_oversized_frame_is_refused_by_its_announcement(length):
    """A length above the cap raises before a byte of it is kept."""
    with pytest.raises(ProtocolError, match=f"{length} bytes is announced"):
        Decoder().feed(struct.pack(">I", length))


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x81", b"\x01", msgpack.packb([1, 2]), msgpack.packb({"u": 1}), msgpack.packb({"t": 5}),
     msgpack.packb({"t": "x"}) + b"\x00", msgpack.packb({1: "t"}), b"\x91" * 3000, b"\xdf\xff\xff\xff\xff"],
)  # fmt: skip
def test_payload_that_is_no_message_raises(payload):
    """Whatever is no map with a text `t` is a ProtocolError, never another exception."""
    with pytest.raises(ProtocolError):
        Decoder().feed(struct.pack(">I", len(payload)) + payload)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise_anything_else(data):
    """Any bytes either wait for more, or decode, or raise ProtocolError."""
    try:
        Decoder().feed(data)
    except ProtocolError:
        pass


def test_too_large_or_impossible_messages_do_not_leave():
    """A message that the other side would refuse is refused before it is sent, with its size or the cause."""
    with pytest.raises(ProtocolError, match="exceeds"):
        encode({"t": "x", "data": bytes(MAX_FRAME_BYTES)})

    with pytest.raises(ProtocolError, match="send fewer rows"):
        rows_frame("steps", 0, 1, bytes(MAX_FRAME_BYTES))

    with pytest.raises(ProtocolError, match="cannot encode"):
        encode({"t": "x", "value": object()})


def test_decode_log():
    """A log's data is maps one after another, whole, and nothing else."""
    data = msgpack.packb({"id": 1}) + msgpack.packb({"id": 2})

    assert decode_log(data) == [{"id": 1}, {"id": 2}]
    for damaged in (data[:-1], data + b"\x05", b"\xc1"):
        with pytest.raises(ProtocolError):
            decode_log(damaged)


def test_lists_of_lists_take_no_memory_before_the_welcome():
    """A thousand nested headers in 64 kB announce gigabytes; none is allocated."""
    nested = b"".join([b"\xdd" + struct.pack(">I", 60_000)] * 1000)
    payload = b"\x82\xa1t\xa5hello\xa1x" + nested + bytes(60_000 - len(nested))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="not msgpack"):
            Decoder(MAX_HELLO_BYTES).feed(struct.pack(">I", len(payload)) + payload)

        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_pending_bytes_are_those_of_a_message_in_parts():
    decoder = Decoder()
    decoder.feed(encode({"t": "x"}) + b"\x00\x00")
    assert decoder.pending_bytes == 2
    decoder.clear()
    assert decoder.pending_bytes == 0
