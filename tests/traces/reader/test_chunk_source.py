"""Gzip files of tracers and other programs, and damaged ones."""

from __future__ import annotations

import builtins
import gzip
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from tests.traces.fabricated import FORMS, brute_force, facts_of, make_events, members, read_all
from traceml.traces.reader import compressed_chunks, gzip_source
from traceml.traces.reader.chunk_source import open_source
from traceml.traces.reader.chunks import TextBuffer
from traceml.traces.reader.gzip_salvage import MAGIC, new_inflater

EVENTS = make_events(1000, 5, plain=True)
TEXT = FORMS["lines"](EVENTS).encode()
ONE = gzip.compress(TEXT, mtime=0)
FAKE = gzip.compress(b'{"ph":"X","name":"not an event, but bytes of a header"}\n' * 20, mtime=0)


@cache
def expected() -> Counter[str]:
    """Return what is to be found in the text."""
    return brute_force(EVENTS)


def _member(text: bytes, *, extra: bytes = b"", name: bytes = b"", checked: bool = False) -> bytes:
    """Return a member with optional header fields."""
    flags = 4 * bool(extra) | 8 * bool(name) | 2 * checked
    header = MAGIC + bytes([flags, 0, 0, 0, 0, 0, 255])
    header += struct.pack("<H", len(extra)) + extra if extra else b""
    header += name + b"\0" if name else b""
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF) if checked else b""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = packer.compress(text) + packer.flush()
    return header + body + struct.pack("<II", zlib.crc32(text), len(text))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few members make a chunk."""
    monkeypatch.setattr(gzip_source, "_MEMBERS_BYTES", 2000)


@pytest.mark.usefixtures("small")
def test_a_whole_member_within_a_header_is_none(tmp_path: Path) -> None:
    """A valid member inside the header of another one is treated as bytes of the header."""
    path = tmp_path / "trace"
    path.write_bytes(b"".join(_member(TEXT[at : at + 9000], extra=FAKE * 3) for at in range(0, len(TEXT), 9000)))
    found, reading = read_all(path, workers=3)

    assert found == expected()
    assert facts_of(reading).damage == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("limit", [1000, 100_000])
def test_a_long_member_between_short_ones_comes_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """No member longer than the limit is held in memory as a whole."""
    monkeypatch.setattr(compressed_chunks, "MAX_TEXT_BYTES", limit)
    monkeypatch.setattr(compressed_chunks, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(gzip_source, "_PART_BYTES", 5000)
    path, third = tmp_path / "trace", len(TEXT) // 3
    path.write_bytes(members(TEXT[:third], 3000) + gzip.compress(TEXT[third:-third]) + members(TEXT[-third:], 3000))
    found, reading = read_all(path, workers=3)

    assert found == expected()
    assert facts_of(reading).damage == []


@pytest.mark.usefixtures("small")
def test_one_long_member_is_not_searched_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file on a network is not read twice."""
    searched: list[int] = []
    monkeypatch.setattr(gzip_source, "_MAX_MEMBERS_BYTES", 5000)
    monkeypatch.setattr(gzip_source, "next_member", lambda fd, begin, end: searched.append(end - begin) or end)
    path = tmp_path / "trace"
    path.write_bytes(ONE)
    found, _ = read_all(path, workers=1)

    assert found == expected()
    assert len(ONE) > 8000
    assert searched == [3001]


@pytest.mark.parametrize("fed", [7, 1000, 64 * 1024])
@pytest.mark.parametrize("missing", [1, 8, len(ONE) // 2])
def test_a_member_that_was_cut_ends_where_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int, fed: int
) -> None:
    """A tracer was killed, and the next one appended to its file: nothing of the next is lost, no event is made up."""
    monkeypatch.setattr(gzip_source, "_FED_BYTES", fed)
    path = tmp_path / "trace"
    path.write_bytes(ONE + ONE[:-missing] + ONE)
    found, reading = read_all(path, workers=1)
    rest = zlib.decompressobj(31).decompress(ONE[:-missing]).count(b"\n")

    assert facts_of(reading).damage[0].what == "a gzip member was cut here, where the next one begins"
    assert facts_of(reading).damage[0].offset == 2 * len(ONE) - missing
    assert facts_of(reading).events == found.total() == 2 * len(EVENTS) + rest


@pytest.mark.parametrize("padding", [b"", bytes(10_240)])
def test_padding_and_empty_members_are_no_damage(tmp_path: Path, padding: bytes) -> None:
    """bgzip ends a file with an empty member; tapes and archives pad with zeros."""
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(b"") + members(TEXT, 50_000) + gzip.compress(b"") + padding)
    found, reading = read_all(path)

    assert found == expected()
    assert facts_of(reading).damage == []


@pytest.mark.parametrize("checked", [False, True])
def test_a_salvaged_member_may_have_any_header(tmp_path: Path, checked: bool) -> None:
    """A member with a wrong checksum is decompressed after its name, extra field and header checksum."""
    path = tmp_path / "trace"
    broken = bytearray(_member(TEXT, extra=b"xy", name=b"trace.pfw", checked=checked))
    broken[-5] ^= 8
    path.write_bytes(bytes(broken))
    found, reading = read_all(path)

    assert found == expected()
    assert [damage.lost_bytes for damage in facts_of(reading).damage] == [0]


@pytest.fixture
def without_isal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """isal cannot be imported, as on platforms without it."""
    real = builtins.__import__

    def refusing(
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if name.partition(".")[0] == "isal":
            raise ImportError("no isal here")

        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", refusing)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("without_isal")
@pytest.mark.parametrize("data", [members(TEXT, 20_000), ONE, ONE[:-3000]], ids=["members", "one member", "cut"])
def test_zlib_does_where_isal_is_absent(tmp_path: Path, data: bytes) -> None:
    """The result is the same."""
    assert type(new_inflater()).__name__ == "_Zlib"
    path = tmp_path / "trace"
    path.write_bytes(data)
    found, reading = read_all(path)

    assert found == brute_force(EVENTS[: sum(found.values())])
    assert len(facts_of(reading).damage) == (0 if sum(found.values()) == len(EVENTS) else 2)


def test_a_part_of_a_file_ends_with_the_member_that_begins_in_it(tmp_path: Path) -> None:
    """Adjacent parts give the text of the file, each byte once."""
    path, data = tmp_path / "trace", members(TEXT, 20_000)
    path.write_bytes(data)
    middle = data.index(MAGIC, len(data) // 2)
    texts = []
    for begin, end in ((0, middle), (middle, None)):
        source, buffer = open_source(path, begin, end), TextBuffer()
        while (load := source.next_chunk(buffer)) is not None:
            texts.append(bytes(load().text))

        source.close()

    assert b"".join(texts) == TEXT
