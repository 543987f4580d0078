"""The scanners in C and Python give the same results for any text."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.traces.fabricated import FORMS, brute_force, frames, make_events, members, read_all
from traceml.errors import TraceEmptyError
from traceml.traces.native import library as native
from traceml.traces.reader import chunk_source, compressed_chunks, gzip_source, native_scanner, zstd_source
from traceml.traces.reader.columns import FLOAT, INTEGER, MISSING, TEXT, FileDamage, StringTable
from traceml.traces.reader.native_scanner import NativeScanner, new_scanner
from traceml.traces.reader.python_scanner import PythonScanner

Answer = tuple[Counter[str], list[FileDamage]]


def test_the_native_scanner_is_built() -> None:
    """Installation with a compiler builds the library, which is used unless disabled."""
    assert isinstance(new_scanner(("size",), StringTable()), NativeScanner)


def test_it_can_be_forbidden_and_may_be_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the library, or with one of another version, Python scans."""
    for setting, path in (("0", native.LIBRARY), ("1", tmp_path / "none.so")):
        monkeypatch.setenv("TRACEML_NATIVE", setting)
        monkeypatch.setattr(native, "LIBRARY", path)
        native.library.cache_clear()
        assert isinstance(new_scanner((), StringTable()), PythonScanner)

    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    native.library.cache_clear()
    assert isinstance(new_scanner((), StringTable()), PythonScanner)
    monkeypatch.undo()
    native.library.cache_clear()


def test_columns_hold_what_was_asked_for() -> None:
    """Each kind of argument has its column; keys that need escapes are read by Python."""
    text = b"".join(
        b'{"ph":"X","name":"a","args":{"v":%b}}\n' % value
        for value in (b"7", b"-0.5", b'"x"', b"null", b"[1, 2]", b"1e3", b"true", b"9007199254740993")
    )
    strings = StringTable()
    column = new_scanner(("v",), strings).scan(text, 0, wrapped=False, final=True).columns.args["v"]
    kinds = [INTEGER, FLOAT, TEXT, MISSING, TEXT, FLOAT, TEXT, INTEGER]

    assert column.kinds.tolist() == kinds
    assert column.integers.tolist() == [7, 0, 0, 0, 0, 0, 0, 2**53 + 1]
    assert np.nan_to_num(column.floats, nan=-1).tolist() == [7, -0.5, -1, -1, -1, 1000, -1, 2**53]
    assert [strings[number] for number in column.texts.tolist()] == [None, None, "x", None, "[1,2]", None, "true", None]
    assert isinstance(new_scanner(('a"b',), strings), PythonScanner)


def test_many_rows_and_many_names_are_kept_apart() -> None:
    """More rows than the library returns at once, and more names than its initial capacity."""
    count = 70_000
    text = b"".join(b'{"ph":"X","name":"name %d","ts":%d,"dur":-1}\n' % (i, i) if i % 7 == 0 else
                    b'{"ph":"X","name":"a name of more than eight bytes %d","ts":%d}\n' % (i, i)
                    for i in range(count))  # fmt: skip
    strings = StringTable()
    result = new_scanner((), strings).scan(text, 0, wrapped=False, final=True)

    columns = result.columns
    assert list(columns.exact) == list(range(0, count, 7))
    assert columns.exact[7] == (7000, -1000)
    assert result.events == count
    names = [strings[number] for number in columns.arrays["name"].tolist()]
    assert names == [f"a name of more than eight bytes {i}" if i % 7 else f"name {i}" for i in range(count)]
    assert columns.arrays["ts_ns"].tolist() == [i * 1000 for i in range(count)]


def written_times() -> list[str]:
    """Return times as JSON may write them: decimals, zeros, halves of nanoseconds, exponents, and all of these."""
    whole = ["0", "1", "7", "999", "34567890123", "1795155070260249", "9223372036854775", "92" * 9]
    finer = ["5", "50", "500000000001", "4999999999", "6", "", "9" * 17]
    fractions = ["", *(f".{digits}{rest}" for digits in ("000", "123", "999", "1", "0") for rest in finer)]
    exponents = ["", "e-05", "E+3", "e-7", "e0", "e-120", "e16"]
    return ["".join(parts) for parts in product(["", "-"], whole, fractions, exponents)]


@pytest.mark.parametrize("decimals", [0, 3, 6, 9])
@pytest.mark.parametrize("kind", [new_scanner, PythonScanner])
def test_times_are_rounded_to_nanoseconds(kind: Callable[..., Any], decimals: int) -> None:
    """Both scanners round any time as exact fractions do, half a nanosecond to the even one."""
    times = written_times()
    text = "".join(f'{{"ph":"X","ts":{ts},"dur":{dur}}}\n' for ts, dur in zip(times, times[::-1], strict=True))
    scanner = kind((), StringTable())
    scanner.rows.decimals = decimals
    columns = scanner.scan(text.encode(), 0, wrapped=False, final=True).columns
    found = [columns.arrays[name].tolist() for name in ("ts_ns", "dur_ns")]
    for row, (ts_ns, dur_ns) in columns.exact.items():
        found[0][row], found[1][row] = ts_ns, dur_ns

    exact = [round(Fraction(time) * 10**decimals) for time in times]
    assert found == [exact, exact[::-1]]


def test_the_library_reads_fine_times_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times with many decimals or an exponent are not left to Python, which is fifty times slower."""
    monkeypatch.setattr(native_scanner, "parse", None)
    scanner = new_scanner((), StringTable())
    assert isinstance(scanner, NativeScanner)
    text = b"""{"ph":"X","ts":1002.1234560000001,"dur":9.5367431640625e-07}
              {"ph":"X","ts":1.7951550702602492e15,"dur":1e-3}"""
    columns = scanner.scan(text, 0, wrapped=False, final=True).columns

    assert columns.arrays["ts_ns"].tolist() == [1_002_123, 1_795_155_070_260_249_200]
    assert columns.arrays["dur_ns"].tolist() == [0, 1]
    assert not columns.exact


def test_all_kinds_of_dftracer_are_read_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers for phase codes are usual, and metadata that nobody asked for is not even parsed."""
    text = b"".join(b'{"ph":%b,"name":"FH","ts":1,"args":{"v":"x"}}\n' % kind for kind in (b"1", b"3", b"4", b'"M"'))
    asked = new_scanner((), StringTable(), ("FH",)).scan(text, 0, wrapped=False, final=True)
    monkeypatch.setattr(native_scanner, "parse", None)
    monkeypatch.setattr(native_scanner, "parse_ranges", None)
    columns = new_scanner((), StringTable(), ("HH",)).scan(text, 0, wrapped=False, final=True).columns

    assert bytes(columns.arrays["ph"]) == b"XA"
    assert bytes(asked.columns.arrays["ph"]) == b"XA"
    assert [event["args"] for event in asked.findings.metadata] == [{"v": "x"}] * 2


def test_an_escaped_key_is_read_each_time() -> None:
    """Objects before do not tell what a key with escapes means."""
    for keys, args in (((), b""), (("size",), b',"args":{"s\\u0069ze":5}')):
        text = b'{"ph":"X","name":"a","t\\u0073":7%b}\n' % args * 3
        native_result, plain = (
            kind(keys, StringTable()).scan(text, 0, wrapped=False, final=True).columns
            for kind in (new_scanner, PythonScanner)
        )
        assert native_result.arrays["ts_ns"].tolist() == plain.arrays["ts_ns"].tolist() == [7000] * 3
        assert [each.integers.tolist() for each in native_result.args.values()] == [[5] * 3 for _ in keys]


NAMED_METADATA = [
    b'{"ph":"M","name":"wanted","args":{"a":1.5}}',
    b'{"ph":"M","name":"w\\u0061nted"}',
    b'{"ph":4,"name":"other"}',
    b'{"name":"other","ph":"M","name":"wanted"}',
    b'{"ph":"M","name":7}',
    b'{"ph":"M","name":["wanted"]}',
    b'{"ph":"M"}',
    b'{"ph":"M","ph":"X","name":"wanted"}',
    b'{"ph":"M","name":"wanted","ts":"5","args":{"b":"\xff"}}',
    b'{"ph":"M","name":"wanted","args":{"c":%b}}' % (b"9" * 5000),
]


@pytest.mark.parametrize("metadata", [None, (), ("wanted",), ("wanted", 'o"dd')])
def test_both_keep_the_metadata_that_was_asked_for(metadata: tuple[str, ...] | None) -> None:
    """By name, however it is written; what cannot be converted is damage if it was asked for."""
    for text in (*NAMED_METADATA, b"\n".join(NAMED_METADATA), b"\n".join(NAMED_METADATA[:-1])):
        native_result, plain = (
            kind((), StringTable(), metadata).scan(text + b"\n", 0, wrapped=False, final=True)
            for kind in (new_scanner, PythonScanner)
        )
        assert native_result.findings.metadata == plain.findings.metadata
        assert native_result.events == plain.events
        names = {str(event.get("name")) for event in plain.findings.metadata}
        assert metadata is None or names <= {*metadata}


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Answer | str]]:
    """Read a file with both scanners, and with several numbers of threads."""

    def reading(path: Path) -> list[Answer | str]:
        answers: list[Answer | str] = []
        for setting, workers in (("1", 1), ("1", 3), ("0", 2)):
            monkeypatch.setenv("TRACEML_NATIVE", setting)
            native.library.cache_clear()
            try:
                found, read = read_all(path, workers=workers)
            except TraceEmptyError as error:
                answers.append(str(error))
            else:
                answers.append((found, read.files[0].damage))

        monkeypatch.delenv("TRACEML_NATIVE")
        native.library.cache_clear()
        return answers

    return reading


SEEDS = [*range(5), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(5, 12))]


def _shrink_chunks(chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    chunk_bytes = chance.choice([100, 300, 1000, 5000])
    patch.setattr(chunk_source, "CHUNK_BYTES", chunk_bytes)
    patch.setattr(compressed_chunks, "CHUNK_BYTES", chunk_bytes)
    patch.setattr(gzip_source, "_MEMBERS_BYTES", chance.choice([1, 100, 2000]))
    patch.setattr(gzip_source, "_MAX_MEMBERS_BYTES", chance.choice([1, 100, 10**6]))
    patch.setattr(compressed_chunks, "MAX_TEXT_BYTES", chance.choice([500, 10**6]))
    patch.setattr(gzip_source, "_PART_BYTES", chance.choice([50, 500]))
    patch.setattr(gzip_source, "_FED_BYTES", chance.choice([40, 400]))
    for name, least in (("_FRAMES", 1), ("_MAX_FRAMES", 1), ("_PART", 50)):
        patch.setattr(zstd_source, f"{name}_BYTES", chance.choice([least, 10**6]))


@pytest.mark.parametrize("seed", SEEDS)
def test_both_read_what_json_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: Callable[..., list[Answer | str]], seed: int
) -> None:
    """Any events, any format, chunks of any size."""
    chance = random.Random(seed)
    events = [{"ph": "X"}, *make_events(chance.choice([5, 40]), seed + 100)]
    expected = brute_force(events)
    for form in FORMS.values():
        text = form(events).encode("utf-8", "surrogatepass")
        _shrink_chunks(chance, monkeypatch)
        path = tmp_path / "trace"
        size = chance.choice([20, 100, 1000])
        packings = [text, gzip.compress(text), members(text, size), frames(text, len(text)), frames(text, size)]
        path.write_bytes(chance.choice(packings))
        assert both(path) == [(expected, [])] * 3


def _hurt(chance: random.Random, data: bytes) -> bytes:
    at = chance.randrange(len(data))
    noise = bytes(chance.randrange(256) for _ in range(40))
    flipped = bytes([data[at] ^ 1 << chance.randrange(8)])
    return chance.choice(
        [data[:at], data[:at] + flipped + data[at + 1 :], data[:at] + noise + data[at:], data[:at] + data[at + 20 :]]
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_both_find_the_same_in_damaged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: Callable[..., list[Answer | str]], seed: int
) -> None:
    """Events and damage are the same; only a file without events raises."""
    chance = random.Random(seed)
    events: list[dict[str, Any]] = make_events(40, seed + 200, plain=seed % 2 == 0)
    for form in FORMS.values():
        text = form(events).encode("utf-8", "surrogatepass")
        _shrink_chunks(chance, monkeypatch)
        size = chance.choice([100, 1000])
        packings = [text, gzip.compress(text), members(text, size), frames(text, len(text)), frames(text, size)]
        whole = chance.choice(packings)
        path = tmp_path / "trace"
        path.write_bytes(chance.choice([_hurt(chance, whole), gzip.compress(_hurt(chance, text))]))
        first, *others = both(path)
        assert others == [first, first]
