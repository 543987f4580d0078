"""Frames come out of the codec as they went in."""

from __future__ import annotations

import contextlib
import os

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from traceml.database.schema import EVALS, INFO, STEPS
from traceml.database.store import frame_compression as module
from traceml.database.store.frame_compression import Codec, decode, encode


def step_rows(count: int) -> bytes:
    return b"".join(STEPS.struct.pack(n, n * 10**6, *[1000 + n % 7] * (len(STEPS.names) - 2)) for n in range(count))


@settings(deadline=None)
@given(rows=st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * len(EVALS.names)), max_size=50))
def test_packed_rows_come_back(rows: list[tuple[int, ...]]) -> None:
    """Decoding gives the same bytes for any rows."""
    data = b"".join(EVALS.struct.pack(*row) for row in rows)

    number, packed = encode(EVALS, data)

    assert decode(number, packed, EVALS.row_bytes) == data


@settings(deadline=None)
@given(data=st.binary(max_size=4000))
def test_logs_come_back(data: bytes) -> None:
    """Logs have no columns to shuffle and come back all the same."""
    number, packed = encode(INFO, data)

    assert decode(number, packed, 1) == data


def test_chooses_what_is_smallest() -> None:
    """Rows are shuffled and compressed; what is tiny or has no pattern is stored as it is."""
    assert encode(STEPS, step_rows(20))[0] is Codec.SHUFFLE_ZSTD
    assert encode(STEPS, step_rows(1))[0] is Codec.ZSTD
    assert encode(INFO, b"a" * 1000)[0] is Codec.ZSTD
    assert encode(INFO, b"ab") == (Codec.RAW, b"ab")
    noise = os.urandom(STEPS.row_bytes * 20)
    assert encode(STEPS, noise) == (Codec.RAW, noise)


@pytest.mark.parametrize("number", [Codec.ZSTD, Codec.SHUFFLE_ZSTD, 1, 99])
def test_damaged_bytes_are_a_value_error(number: int) -> None:
    """Damage and codecs of the future are one kind of error, whatever the library below raises."""
    with pytest.raises(ValueError, match=r".+"):
        decode(number, b"this was never compressed", 8)


def test_no_damaged_byte_of_a_frame_goes_unnoticed() -> None:
    """Damage is an error, never other figures."""
    number, packed = encode(STEPS, step_rows(200))
    for at in range(len(packed)):
        damaged = bytes([*packed[:at], packed[at] ^ 0x5A, *packed[at + 1 :]])
        with contextlib.suppress(ValueError):
            assert decode(number, damaged, STEPS.row_bytes) == step_rows(200)


def test_few_bytes_cannot_become_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store from elsewhere may hold anything; a frame as large as the limit is read."""
    monkeypatch.setattr(module, "_MAX_BYTES", 1 << 20)
    fits, exceeds = bytes(1 << 20), bytes((1 << 20) + 8)
    pack = zstandard.ZstdCompressor().compress
    assert decode(Codec.ZSTD, pack(fits), 1) == fits
    with pytest.raises(ValueError, match="above the limit of 1,048,576"):
        decode(Codec.ZSTD, pack(exceeds), 1)

    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(exceeds)
    with pytest.raises(ValueError, match=r"."):
        decode(Codec.ZSTD, unsized, 1)

    claimed = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        decode(Codec.ZSTD, claimed, 1)
