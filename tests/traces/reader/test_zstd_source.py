"""Zstd files of one and of many frames, whole and damaged."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from tests.traces.fabricated import FORMS, brute_force, facts_of, frames, make_events, read_all
from traceml.traces.query.file_parts import split
from traceml.traces.query.summary import summarize
from traceml.traces.reader import compressed_chunks, zstd_source
from traceml.traces.reader.trace_files import discover
from traceml.traces.reader.zstd_source import frame_end, frame_starts

EVENTS = make_events(1000, 5, plain=True)
TEXT = FORMS["lines"](EVENTS).encode()
FRAMES = frames(TEXT, 10_000)
SKIPPED = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"


@cache
def expected() -> Counter[str]:
    """Return what is to be found in the text."""
    return brute_force(EVENTS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few frames make a chunk, and little text."""
    monkeypatch.setattr(compressed_chunks, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(zstd_source, "_FRAMES_BYTES", 2000)
    monkeypatch.setattr(zstd_source, "_MAX_FRAMES_BYTES", 6000)
    monkeypatch.setattr(zstd_source, "_PART_BYTES", 3000)


def _written(folder: Path, data: bytes) -> Path:
    path = folder / "trace.pfw.zst"
    path.write_bytes(data)
    return path


def _starts(data: bytes) -> list[int]:
    return [at for at in range(len(data)) if data.startswith(b"\x28\xb5\x2f\xfd", at)]


@pytest.mark.parametrize("level", [1, 9])
@pytest.mark.parametrize("content_size", [False, True])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("text", [b"", b"x", b"a" * 300_000, TEXT * 2], ids=["empty", "byte", "run", "trace"])
def test_the_end_of_a_frame_is_found(
    tmp_path: Path, text: bytes, checksum: bool, content_size: bool, level: int
) -> None:
    """Whatever its header holds; not when a byte is missing, or bytes that are no frame follow."""
    packer = zstandard.ZstdCompressor(level, write_checksum=checksum, write_content_size=content_size)
    data = packer.compress(text)
    descriptor = os.open(_written(tmp_path, SKIPPED + data + data + b"no frame"), os.O_RDONLY)
    try:
        ends = [frame_end(descriptor, at, 10**9) for at in (0, len(SKIPPED), len(SKIPPED) + len(data))]
        assert ends == [len(SKIPPED), len(SKIPPED + data), len(SKIPPED + data + data)]
        assert frame_end(descriptor, len(SKIPPED), len(SKIPPED + data) - 1) is None
        assert frame_end(descriptor, len(SKIPPED + data + data), 10**9) is None
    finally:
        os.close(descriptor)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("workers", [1, 3])
def test_long_and_short_frames_with_others_between(tmp_path: Path, workers: int) -> None:
    """A long frame is read in parts, frames without text and padding are no damage."""
    third = len(TEXT) // 3
    data = SKIPPED + frames(TEXT[:third], 3000) + frames(TEXT[third:-third], third * 2) + SKIPPED
    data += frames(TEXT[-third:], 3000) + bytes(1000)
    found, reading = read_all(_written(tmp_path, data), workers=workers)

    assert found == expected()
    assert facts_of(reading).damage == []
    assert facts_of(reading).raw_bytes == len(TEXT)


@pytest.mark.usefixtures("small")
def test_frames_with_more_text_than_fits_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of frames that are taken together is limited."""
    monkeypatch.setattr(compressed_chunks, "MAX_TEXT_BYTES", 5000)
    found, reading = read_all(_written(tmp_path, FRAMES), workers=3)

    assert found == expected()
    assert facts_of(reading).damage == []


def test_a_truncated_frame_is_used_to_its_end(tmp_path: Path) -> None:
    """A file that was not copied completely gives the events that it has."""
    events = make_events(3000, 5, plain=True)
    text = FORMS["lines"](events).encode()
    whole = frames(text, len(text))
    found, reading = read_all(_written(tmp_path, whole[: len(whole) // 2]))

    count = sum(found.values())
    assert 500 < count < 2500
    assert found == brute_force(events[:count])
    assert "ends within a zstd frame" in facts_of(reading).damage[0].what


@pytest.mark.usefixtures("small")
def test_a_broken_frame_costs_no_other(tmp_path: Path) -> None:
    """Reading continues with the next frame."""
    starts = _starts(FRAMES)
    broken = bytearray(FRAMES)
    broken[starts[5] + 20 : starts[6] - 20] = b"\xff" * (starts[6] - starts[5] - 40)
    found, reading = read_all(_written(tmp_path, bytes(broken)))
    damage, *_ = facts_of(reading).damage  # then an event that is cut off

    lost = expected() - found
    assert found - expected() == Counter()
    assert 0 < sum(lost.values()) <= 10_000 // min(map(len, TEXT.splitlines())) + 2
    assert (damage.offset, damage.lost_bytes) == (starts[5], starts[6] - starts[5])
    assert damage.what.startswith("a broken zstd frame (")


@pytest.mark.usefixtures("small")
def test_bytes_between_frames_cost_none(tmp_path: Path) -> None:
    """Events of the frames before and after them are used."""
    found, reading = read_all(_written(tmp_path, FRAMES + b"garbage" + FRAMES))
    (damage,) = facts_of(reading).damage

    assert found == brute_force(EVENTS + EVENTS)
    assert (damage.offset, damage.what, damage.lost_bytes) == (len(FRAMES), "bytes that are not a zstd frame", 7)


def test_a_frame_that_needs_too_much_memory_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A window of more than 128 MiB is not allocated because a file asks for it."""
    header = b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3])  # a window of 2^31 bytes
    found, reading = read_all([_written(tmp_path, header + b"\x01\x00\x00"), _plain(tmp_path)])
    (damage,) = reading.files[0].damage

    assert found == expected()
    assert "memory" in damage.what


def _plain(folder: Path) -> Path:
    path = folder / "plain.pfw"
    path.write_bytes(TEXT)
    return path


def test_a_folder_gives_zstd_traces_by_content(tmp_path: Path) -> None:
    """Also one that begins with a frame without text; not other compressed files."""
    for name, data in {
        "a": SKIPPED + FRAMES,
        "b": frames(b'{"lr": 0.1}', 100),
        "c": FRAMES[:6],
        "d.pfw.zst": b"\0",
        "e": FRAMES,
    }.items():
        (tmp_path / name).write_bytes(data)

    assert [path.name for path in discover(tmp_path)] == ["a", "d.pfw.zst", "e"]


def test_units_and_results_are_those_of_the_plain_file(tmp_path: Path) -> None:
    """Metadata at the beginning of the file is found in compressed ones too."""
    unit = b'{"name":"CM","ph":4,"args":{"name":"time_metric","value":"NS"}}\n'
    plain = tmp_path / "plain.pfw"
    plain.write_bytes(unit + TEXT)
    packed = _written(tmp_path, frames(unit + TEXT, 10**9))
    results = [summarize([path], cached=False)["groups"] for path in (plain, packed)]

    assert results[0] == results[1]
    assert results[0][0]["sum_us"] < 10_000


def test_a_file_is_cut_at_frames(tmp_path: Path) -> None:
    """Each part begins a frame; a file that is not frames throughout is one part."""
    path = _written(tmp_path, FRAMES)
    with path.open("rb") as file:
        assert frame_starts(file.fileno(), len(FRAMES), 1) == _starts(FRAMES)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traceml.traces.query.file_parts._MIN_BYTES", 2000)
        parts = split(0, path, least=4)
        assert [part.begin for part in parts] == [
            start for start in _starts(FRAMES) if start in {p.begin for p in parts}
        ]
        assert len(parts) >= 4
        assert all(one.end == two.begin for one, two in pairwise(parts))
        path.write_bytes(FRAMES + b"garbage")
        assert len(split(0, path, least=4)) == 1
