"""Trace files of every format, whole and damaged, give the same events as plain json."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.traces.fabricated import FORMS, brute_force, facts_of, frames, make_events, members, read_all
from traceml.errors import TraceEmptyError, TraceMLError
from traceml.traces.native import library as native
from traceml.traces.reader import chunk_source, compressed_chunks, gzip_source, zstd_source
from traceml.traces.reader.chunks import Chunk
from traceml.traces.reader.columns import NO_TIME, StringTable
from traceml.traces.reader.reading import read

EVENTS = make_events(150, 1)
PLAIN = make_events(1000, 2, plain=True)
LINES = FORMS["lines"](PLAIN).encode()
FEW = make_events(60, 3)  # many times as many chunks, where these are small


@cache
def written(form: str, few: bool = False) -> tuple[bytes, Counter[str]]:
    """Return events in a form, and what is to be found in it: the same for all packings and both scanners."""
    events = FEW if few else EVENTS
    return FORMS[form](events).encode("utf-8", "surrogatepass"), brute_force(events)


@pytest.fixture(params=["native", "python"])
def scanner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both scanners in turn."""
    monkeypatch.setenv("TRACEML_NATIVE", "1" if request.param == "native" else "0")
    native.library.cache_clear()
    yield request.param
    native.library.cache_clear()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that most events lie across the end of one."""
    monkeypatch.setattr(chunk_source, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(gzip_source, "_MEMBERS_BYTES", 300)
    monkeypatch.setattr(gzip_source, "_PART_BYTES", 200)
    monkeypatch.setattr(gzip_source, "_FED_BYTES", 100)
    monkeypatch.setattr(compressed_chunks, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(zstd_source, "_FRAMES_BYTES", 300)
    monkeypatch.setattr(zstd_source, "_MAX_FRAMES_BYTES", 600)
    monkeypatch.setattr(zstd_source, "_PART_BYTES", 200)


def _packed(how: str, text: bytes, size: int) -> bytes:
    """Return a text compressed as a whole or in pieces."""
    ways = {
        "plain": lambda: text,
        "one member": lambda: gzip.compress(text),
        "members": lambda: members(text, size),
        "one frame": lambda: frames(text, len(text)),
        "frames": lambda: frames(text, size),
    }
    return ways[how]()


def _write(folder: Path, data: bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.usefixtures("scanner")
@pytest.mark.parametrize("packed", ["plain", "one member", "members", "one frame", "frames"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_json_reads_it(tmp_path: Path, form: str, packed: str) -> None:
    """Formats are detected by content; counts, names, times and arguments equal those of plain json."""
    text, expected = written(form)
    data = _packed(packed, text, 3000)
    found, reading = read_all(_write(tmp_path, data))
    facts = facts_of(reading)

    assert found == expected
    assert facts.events == sum(found.values())
    assert (facts.raw_bytes, facts.bytes) == (len(text), len(data))
    assert facts.damage == []


@pytest.mark.usefixtures("scanner", "small_chunks")
@pytest.mark.parametrize("packed", ["plain", "one member", "members", "one frame", "frames"])
@pytest.mark.parametrize("form", FORMS)
def test_events_across_chunks_are_whole(tmp_path: Path, form: str, packed: str) -> None:
    """The end of a chunk makes no difference, with either scanner."""
    text, expected = written(form, few=True)
    data = _packed(packed, text, 170)
    found, reading = read_all(_write(tmp_path, data), workers=3)

    assert found == expected
    assert facts_of(reading).damage == []


def test_header_and_ending_of_an_object_are_kept(tmp_path: Path) -> None:
    """torch.profiler writes keys before the events, and some after them."""
    text = json.dumps({"distributedInfo": {"rank": 2}, "traceEvents": PLAIN, "traceName": 'a, "b"'})
    reading = read(_write(tmp_path, text.encode()))
    list(reading)

    assert facts_of(reading).header == {"distributedInfo": {"rank": 2}, "traceName": 'a, "b"'}


def test_metadata_is_delivered_and_does_not_count(tmp_path: Path) -> None:
    """dftracer's phase code 4 and Chrome's M are metadata about others."""
    lines = [
        {"name": "HH", "cat": "dftracer", "ph": 4, "args": {"name": "host1", "value": "68ab"}},
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "rank 0"}},
        {"name": "work", "ph": 1, "ts": 1, "dur": 2, "pid": 1, "tid": 1},
    ]
    reading = read(_write(tmp_path, "\n".join(map(json.dumps, lines)).encode()))
    (batch,) = reading

    assert [event["name"] for event in batch.metadata] == ["HH", "process_name"]
    assert [chr(kind) for kind in batch.ph] == ["X"]
    assert facts_of(reading).events == 1


def test_times_that_do_not_fit_are_exact(tmp_path: Path) -> None:
    """Times beyond 64 bits are kept exactly; times finer than a nanosecond are rounded."""
    lines = ['{"ph":"X","name":"a","ts":1,"dur":4611686018427387904}', '{"ph":"X","name":"a","ts":1.00175,"dur":1}']
    (batch,) = read(_write(tmp_path, "\n".join([*lines, '{"ph":"i","name":"b","s":"g"}']).encode()))

    assert batch.exact == {0: (1000, 2**62 * 1000)}
    assert batch.ts_ns.tolist() == [1000, 1002, NO_TIME]
    assert batch.dur_ns.tolist() == [-1, 1000, -1]
    assert len(batch) == 3


@pytest.mark.usefixtures("scanner", "small_chunks")
@pytest.mark.parametrize(("unit", "ns"), [("NS", 1), ("US", 10**3), ("MS", 10**6), ("SEC", 10**9)])
def test_dftracer_may_use_other_units(tmp_path: Path, unit: str, ns: int) -> None:
    """Metadata name the unit of all times of a file."""
    head = f'{{"name":"CM","ph":4,"args":{{"name":"time_metric","value":"{unit}"}}}}\n'
    lines = [f'{{"name":"a","ph":1,"ts":{2**52 // ns + i},"dur":{i}}}\n' for i in range(300)]
    negative = '{"name":"a","ph":1,"ts":1,"dur":-5}'
    batches = list(read(_write(tmp_path, (head + "".join(lines) + negative).encode())))

    assert [dur for batch in batches for dur in batch.dur_ns.tolist()] == [*(i * ns for i in range(300)), -5 * ns]
    assert [ts for batch in batches for ts in batch.ts_ns.tolist()] == [
        *((2**52 // ns + i) * ns for i in range(300)),
        ns,
    ]
    assert {batch.fractional for batch in batches} == {unit == "NS"}
    assert [times for batch in batches for times in batch.exact.values()] == [(ns, -5 * ns)]


@pytest.mark.usefixtures("scanner")
def test_text_that_is_not_utf8_is_shown(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 stay distinct, and can be printed."""
    lines = [b'{"ph":"X","name":"\xff","ts":1,"dur":1}', b'{"ph":"X","name":"\xfe","ts":1,"dur":1}']
    reading = read(_write(tmp_path, b"\n".join([*lines, b'{"ph":"X","name":"\\ud800","ts":1,"dur":1}'])))
    list(reading)

    assert [reading.strings[number] for number in range(3)] == ["\\udcff", "\\udcfe", "\\ud800"]


@cache
def _without(*lines: int) -> Counter[str]:
    return brute_force(event for number, event in enumerate(PLAIN) if number not in lines)


@cache
def _plain_text(form: str) -> bytes:
    return FORMS[form](PLAIN).encode()


CUT = LINES.index(b'{"id":500')
NEXT = LINES.index(b"\n", CUT) + 1
MEMBERS = members(LINES, 10_000)
ONE = gzip.compress(LINES)
BAD_SUM = bytearray(ONE)
BAD_SUM[-6] ^= 1


def _between(garbage: bytes) -> bytes:
    return LINES[:CUT] + garbage + LINES[CUT:]


# The file, the lines whose events cannot be found in it, what is said of the damage.
DAMAGED: dict[str, tuple[bytes, Iterable[int], str]] = {
    "half a last line": (LINES[: CUT + 30], range(500, len(PLAIN)), "the file ends within an event"),
    "no newline at the end": (LINES.rstrip(), (), ""),
    "two lines run into one": (LINES[: CUT + 30] + LINES[NEXT + 30 :], (500, 501), "not JSON"),
    "a line cut short": (LINES[: CUT + 30] + b"\n" + LINES[NEXT:], (500,), "not JSON"),
    "binary garbage": (_between(b'\0\xff\xfe"{{[[\n' * 9), (), "not an event"),
    "an object that is no event": (_between(b'{"a":1}\n'), (), "without a phase code"),
    "an endless number": (_between(b'{"ph":"X","ts":' + b"1" * 9999 + b"}\n"), (), "a number too long"),
    "brackets without end": (_between(b'{"ph":"X","a":' + b"[" * 200_000 + b"\n"), (), "too deeply"),
    "a wrong checksum": (bytes(BAD_SUM), (), "wrong checksum"),
    "an object that is not closed": (json.dumps({"traceEvents": PLAIN})[:-1].encode(), (), "not closed"),
    "two objects, joined": (
        json.dumps({"traceEvents": PLAIN}).encode() * 2,
        (),
        "another object after that of traceEvents",
    ),
    "many objects, joined": (
        json.dumps({"traceEvents": PLAIN}).encode() * 9,
        (),
        "another object after that of traceEvents",
    ),
}


@pytest.mark.usefixtures("scanner")
@pytest.mark.parametrize("case", DAMAGED)
def test_damage_costs_what_is_damaged(tmp_path: Path, case: str) -> None:
    """All text around the damage is used, and the loss is reported."""
    data, lost, what = DAMAGED[case]
    found, reading = read_all(_write(tmp_path, data))
    facts = facts_of(reading)

    assert _without(*lost) - found == Counter()
    assert bool(facts.damage) == bool(what)
    assert what in "".join(damage.what for damage in facts.damage)


@pytest.mark.parametrize(("name", "packed"), [("tail.pfw.gz", members), ("tail.pfw.zst", frames)])
def test_the_end_of_a_compressed_file_is_read_by_its_name(tmp_path: Path, name: str, packed: Any) -> None:
    """`tail -c` leaves no magic number at the start, but whole members; a text with such a name is one still."""
    data = packed(LINES, 10_000)
    found, reading = read_all(_write(tmp_path, data[100:], name))
    lost = _without() - found

    assert 0 < sum(lost.values()) <= 10_000 // min(map(len, LINES.splitlines())) + 2
    assert "bytes that are not a" in facts_of(reading).damage[0].what
    assert read_all(_write(tmp_path, LINES, name))[0] == _without()


@pytest.mark.usefixtures("scanner")
def test_bytes_between_members_cost_no_member(tmp_path: Path) -> None:
    """Events of the members before and after them are used."""
    found, reading = read_all(_write(tmp_path, MEMBERS + b"garbage" + ONE))
    [damage] = facts_of(reading).damage

    whole = _without()
    assert found == whole + whole
    assert "not a gzip member" in damage.what


def test_a_truncated_member_is_used_to_its_end(tmp_path: Path) -> None:
    """A killed writer leaves a member without an end: its compressed text is used."""
    found, reading = read_all(_write(tmp_path, ONE[: len(ONE) // 2]))
    count = sum(found.values())

    assert 300 < count < 700
    assert found == brute_force(PLAIN[:count])
    assert "ends within a gzip member" in facts_of(reading).damage[0].what


def test_a_broken_member_costs_no_other(tmp_path: Path) -> None:
    """Reading continues with the next sound member."""
    starts = [at for at in range(len(MEMBERS)) if MEMBERS.startswith(b"\x1f\x8b\x08", at)]
    broken = bytearray(MEMBERS)
    broken[starts[5] + 12 : starts[5] + 400] = b"\xff" * 388
    found, reading = read_all(_write(tmp_path, bytes(broken)))
    damage = facts_of(reading).damage

    lost = _without() - found
    assert 0 < sum(lost.values()) <= 10_000 // min(map(len, LINES.splitlines())) + 2
    assert starts[5] < damage[0].offset <= starts[6]
    assert damage[0].lost_bytes == starts[6] - damage[0].offset


@pytest.mark.usefixtures("scanner")
@pytest.mark.parametrize("form", ["lines", "an array on one line", "an object, pretty-printed"])
@pytest.mark.parametrize("lost", ["no member", "broken", "cut", "no frame"])
def test_halves_of_two_events_are_not_one(tmp_path: Path, form: str, lost: str) -> None:
    """What stands before and after a lost part is not put together, even where that would be an event."""
    text = _plain_text(form)
    begin, end = (text.index(b'"dur"', at) for at in (len(text) // 3, len(text) // 2))
    first, second, third = text[:begin], text[begin:end], text[end:]
    if lost == "no frame":
        data = frames(first, len(first)) + b"garbage" + frames(third, len(third))
    else:
        broken = bytearray(gzip.compress(second))
        broken[10:16] = b"\xff" * 6
        between = {"no member": b"garbage", "broken": bytes(broken), "cut": gzip.compress(second)[:-500]}[lost]
        data = gzip.compress(first) + between + gzip.compress(third)

    found, reading = read_all(_write(tmp_path, data))

    assert facts_of(reading).damage
    assert found - _without() == Counter()
    assert sum(found.values()) > len(PLAIN) / 2


@pytest.mark.usefixtures("scanner")
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "an empty file"),
        (bytes(range(256)) * 40, "not an event"),
        (b"\x1f\x8b\x08" + bytes(300), "gzip member"),
        (b'{"some": "settings"}', "without a phase code"),
        (b'{"ph":"X","na', "ends within an event"),
    ],
)
def test_no_event_at_all_is_an_error(tmp_path: Path, data: bytes, why: str) -> None:
    """The error of a file that is no trace names it and the reason."""
    path = _write(tmp_path, data)
    with pytest.raises(TraceEmptyError, match=why) as caught:
        list(read(path))

    assert str(path) in str(caught.value)
    assert isinstance(caught.value, TraceMLError)


@pytest.mark.usefixtures("scanner")
@pytest.mark.parametrize("data", [b"[]", b"[\n", b'{"traceEvents": []}', b'{"ph":"M","name":"process_name"}'])
def test_a_trace_may_be_empty(tmp_path: Path, data: bytes) -> None:
    """A list without events, or with metadata alone, is a trace in which nothing happened."""
    reader = read(_write(tmp_path, data))
    assert sum(map(len, reader)) == 0
    assert [(facts.events, facts.damage) for facts in reader.files] == [(0, [])]


@pytest.mark.parametrize(
    "data",
    [
        b"# tracer: nop\n#\n#  TASK-PID  CPU#\n",
        b"TRACE:\n          <idle>-0     [001] d..3  50.1: sched_switch: prev_comm=swapper\n",
        b"  surfaceflinger-1234  ( 1234) [000] ...1  5.0: tracing_mark_write: B|1234|x\n",
        b"<!DOCTYPE html>\n<html><head><title>Android System Trace</title><script>/* trace-viewer */</script>",
    ],
)
def test_systrace_is_refused_with_a_way_out(tmp_path: Path, data: bytes) -> None:
    """The error names the tool that converts it."""
    with pytest.raises(TraceEmptyError, match="traceconv json"):
        list(read(_write(tmp_path, data)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bz2.compress(LINES), "bzip2 is not read. Convert it first: bunzip2 --keep FILE"),
        (lzma.compress(LINES), "xz is not read. Convert it first: unxz --keep FILE"),
        (LINES.decode().encode("utf-16"), "UTF-16 is not read. Convert it first: iconv -f UTF-16"),
        (b"\xfe\xff" + LINES.decode().encode("utf-16-be"), "UTF-16 is not read. Convert it first: iconv -f UTF-16"),
        (b"PK\x03\x04" + bytes(40), "zip archive is not read. Convert it first: unzip FILE"),
    ],
    ids=["bzip2", "xz", "utf-16", "utf-16 big-endian", "zip"],
)
def test_other_formats_are_named_with_the_way_out(tmp_path: Path, data: bytes, words: str) -> None:
    """It said only that there is no trace event in them."""
    with pytest.raises(TraceEmptyError, match=words):
        list(read(_write(tmp_path, data)))


@pytest.mark.parametrize("data", [b"", b"some text [000] of a file\n", b"<html>a page</html>", bytes(range(256))])
def test_other_files_are_not_called_systrace(tmp_path: Path, data: bytes) -> None:
    """They have nothing to convert."""
    with pytest.raises(TraceEmptyError, match="Was it written by a tracer"):
        list(read(_write(tmp_path, data)))


def test_several_files_are_read_in_their_order(tmp_path: Path) -> None:
    """Empty and unreadable files do not affect the others."""
    first = _write(tmp_path, LINES, "a.pfw")
    empty = _write(tmp_path, b"", "b.pfw")
    last = _write(tmp_path, MEMBERS, "c.pfw.gz")
    reading = read([last, empty, first])
    sources = [batch.source for batch in reading]

    assert sources == sorted(sources)
    assert [facts.events for facts in reading.files] == [1000, 0, 1000]
    assert [len(facts.damage) for facts in reading.files] == [0, 1, 0]
    assert [facts.path for facts in reading.files] == [last, empty, first]


def test_strings_are_shared_and_threads_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is loaded in the threads of the reader; an error there is raised by the iteration."""
    path, strings, threads = _write(tmp_path, LINES), StringTable(), set[str]()
    load = chunk_source.PlainChunks._load

    def loading(*args: Any) -> Chunk:
        threads.add(threading.current_thread().name)
        return load(*args)

    monkeypatch.setattr(chunk_source.PlainChunks, "_load", loading)
    list(read(path, strings=strings, workers=2))
    assert threads
    assert threads <= {"traceml-read_0", "traceml-read_1"}
    assert "read" in [strings[number] for number in range(len(strings))]

    monkeypatch.setattr(chunk_source.PlainChunks, "_load", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        list(read(path))

    assert _reading_threads() == []


@pytest.mark.usefixtures("small_chunks")
def test_an_iteration_that_is_left_ends_its_threads(tmp_path: Path) -> None:
    """No thread is left when an iteration is closed early."""
    batches = iter(read(_write(tmp_path, LINES)))
    next(batches)
    batches.close()  # type: ignore[attr-defined]

    assert _reading_threads() == []


def _reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("traceml-read")]


PEAK = """
import sys
from traceml.traces.reader.reading import read
events = sum(map(len, read(sys.argv[1], workers=2)))
print(events, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.process
@pytest.mark.parametrize("packed", ["members", "one member", "plain"])
def test_memory_is_bounded_whatever_the_size(tmp_path: Path, packed: str) -> None:
    """A file eight times as large takes at most a fifth and some chunks more memory: much less than its text."""
    block = FORMS["lines"](make_events(20_000, 4, plain=True)).encode()

    def peak(blocks: int) -> tuple[int, int]:
        path = tmp_path / f"{blocks}"
        path.write_bytes({"members": lambda: gzip.compress(block, 1) * blocks,
                          "one member": lambda: gzip.compress(block * blocks, 1),
                          "plain": lambda: block * blocks}[packed]())  # fmt: skip
        command = [sys.executable, "-c", PEAK, str(path)]
        events, kib = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return int(events), int(kib)

    small, large = peak(8), peak(64)
    assert (small[0], large[0]) == (8 * 20_000, 64 * 20_000)
    chunks_kib = 16 * 1024  # threads that wait for a core hold fewer chunks at a time; the text is 144 MiB longer
    assert large[1] <= 1.2 * small[1] + chunks_kib
    assert large[1] * 1024 < 64 * len(block)


FEW_DESCRIPTORS = """
import resource, sys
from traceml.traces.reader.reading import read
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
reader = read(sys.argv[1], workers=2)
print(sum(map(len, reader)), sum(len(facts.damage) for facts in reader.files))
"""


@pytest.mark.process
def test_more_files_than_descriptors_are_read(tmp_path: Path) -> None:
    """Each file is closed when its events were read: a job may leave thousands of small ones."""
    for number in range(100):
        (tmp_path / f"{number}.pfw").write_bytes(FORMS["lines"](FEW[:1]).encode())

    command = [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["100", "0"]
