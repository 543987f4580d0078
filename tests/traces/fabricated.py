"""Trace files of every format with random events, and their events according to plain json."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import zstandard

from traceml.traces.reader.columns import MISSING, NO_TIME, TEXT, EventBatch, TraceFileFacts
from traceml.traces.reader.reading import TraceReader, read

__all__ = ["FORMS", "brute_force", "events_of", "frames", "make_events", "members", "normalized", "read_all"]

Event = dict[str, Any]
_WITH_ID = frozenset("bensftNODSTpF")  # kinds of events that have one
NAMES = [
    "read",
    "wr,ite",
    'qu"ote',
    "back\\slash",
    "tab\t",
    "naïve",
    "日本",
    "\U0001f600",
    "}{",
    "},\n{",
    "",
    "a" * 300,
    7,
]
KINDS = ["X", "X", "X", "X", 1, "B", "E", "i", "C", "b", "e", "s", "f", "S", "P", "M", 4]
TIMES = [0, 5, 1795155070260249, 2**62, 2**80, 1.5, 0.001, 12345678.125, -3, None, "17", "1.25", True, 1e300]
FINE_TIMES = [0.0005, 0.0015, 0.0025000000000000001, 1e-05, 9.5367431640625e-07, 1.6e15, 34567890123.456789, -0.0125]


def make_events(count: int, seed: int, *, plain: bool = False) -> list[Event]:
    """Return random events: plain ones as tracers write them, others with anything that JSON allows."""
    chance = random.Random(seed)
    return [_plain(chance, number) if plain else _any(chance, number) for number in range(count)]


def _plain(chance: random.Random, number: int) -> Event:
    return {
        "id": number,
        "name": chance.choice(["read", "write", "op,en"]),
        "cat": "POSIX",
        "pid": 10 + number % 2,
        "tid": 20 + number % 4,
        "ts": 10**15 + 17 * number,
        "dur": chance.randrange(1000),
        "ph": "X",
        "args": {"size": chance.randrange(10**6), "file": f"f{number % 5}"},
    }


def _any(chance: random.Random, number: int) -> Event:
    event = _plain(chance, number)
    event["name"] = chance.choice(NAMES)
    event["ph"] = chance.choice(KINDS)
    event["args"]["list"] = [{"a": 1}, {"ph": [1, {"b": None}]}]
    if chance.random() < 0.3:
        event[chance.choice(["ts", "dur"])] = chance.choice(TIMES + FINE_TIMES)

    if chance.random() < 0.2:
        event[chance.choice(["pid", "tid", "id", "cat"])] = chance.choice(["main", 3, -4, None, 2.0, 1.5, True, 10**30])

    if chance.random() < 0.2:
        event["args"]["size"] = chance.choice(
            [None, "text", 1.25, -0.0, 1e22, 123456789.123456789, 2**70, True, [1], {}]
        )

    if chance.random() < 0.1:
        event.pop(chance.choice(["name", "cat", "pid", "tid", "ts", "dur", "args", "id"]))

    keys = list(event)
    chance.shuffle(keys)
    return {key: event[key] for key in keys}


def _lines(events: list[Event], **dump: Any) -> list[str]:
    return [json.dumps(event, separators=(",", ":"), **dump) for event in events]


FORMS: dict[str, Callable[[list[Event]], str]] = {
    "lines": lambda events: "\n".join(_lines(events)) + "\n",
    "lines behind a bracket": lambda events: "[\n" + "\n".join(_lines(events, ensure_ascii=False)) + "\n",
    "lines with commas": lambda events: "[\n" + ",\n".join(_lines(events)) + "\n]\n",
    "an open array": lambda events: "[" + ",\n".join(_lines(events)) + ",",
    "an array on one line": lambda events: "[" + ",".join(_lines(events)) + "]",
    "an array, pretty-printed": lambda events: json.dumps(events, indent=1, ensure_ascii=False),
    "Windows line ends": lambda events: "[\r\n" + ",\r\n".join(_lines(events)) + "\r\n]\r\n",
    "mixed line ends": lambda events: "\n\r\n".join(_lines(events)),
    "an object": lambda events: json.dumps({"traceEvents": events, "otherData": {"traceEvents": [1]}, "rank": 3}),
    "an object, pretty-printed": lambda events: json.dumps(
        {"schemaVersion": 1, "deviceProperties": [{"id": 0}], "traceEvents": events, "traceName": "x"}, indent=2
    ),
    "behind a mark": lambda events: "\ufeff" + json.dumps({"distributedInfo": {"rank": 1}, "traceEvents": events}),
}


def members(text: bytes, size: int) -> bytes:
    """Return text as gzip members of so many bytes each."""
    return b"".join(gzip.compress(text[at : at + size], 6, mtime=0) for at in range(0, len(text), size))


def frames(text: bytes, size: int) -> bytes:
    """Return text as zstd frames of so many bytes each."""
    packer = zstandard.ZstdCompressor(write_checksum=True)
    return b"".join(packer.compress(text[at : at + size]) for at in range(0, max(len(text), 1), max(size, 1)))


def brute_force(events: Iterable[Event]) -> Counter[str]:
    """Return the number of occurrences of each event, as a text with all compared values."""
    return Counter(normalized(event) for event in _reparsed(events) if event["ph"] not in ("M", 4))


def _reparsed(events: Iterable[Event]) -> list[Event]:
    parsed: list[Event] = json.loads(json.dumps(list(events)), parse_float=Decimal)
    return parsed


def normalized(event: Event) -> str:
    """Return the parts of an event that columns hold, as one text."""
    return _normalized(event, [_time(event.get("ts")), _time(event.get("dur"))])


def _normalized(event: Event, times: list[str | None]) -> str:
    args = event.get("args") or {}
    kind = "X" if event["ph"] == 1 else event["ph"]
    known = event.get("id") if kind in _WITH_ID else None
    return repr(
        [kind, *(_label(event.get(key)) for key in ("name", "cat", "pid", "tid")), _label(known), *times, _size(args)]
    )


def _label(value: Any) -> Any:
    if value is None or type(value) is int or isinstance(value, str):
        return value

    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else str(value)

    return json.dumps(value)


def _time(value: Any) -> str | None:
    """Return microseconds, rounded to nanoseconds, as a text; None if the event has none."""
    if isinstance(value, str):
        value = Decimal(value)

    if value is None or isinstance(value, bool):
        return None

    return _microseconds(round(Fraction(value) * 1000))


@lru_cache(1 << 16)  # damaged files are read hundreds of times
def _microseconds(time_ns: int) -> str:
    return str(Fraction(time_ns, 1000))


def _size(args: Event) -> Any:
    value = args.get("size")
    if isinstance(value, Decimal):
        return float(value)

    return value if value is None or type(value) is int or isinstance(value, str) else json.dumps(value)


def read_all(path: Any, **options: Any) -> tuple[Counter[str], TraceReader]:
    """Return the events of a file as `brute_force` does, and the reading."""
    reading = read(path, args=["size"], **options)
    found: Counter[str] = Counter()
    for batch in reading:
        found.update(events_of(batch, reading))

    return found, reading


def events_of(batch: EventBatch, reading: TraceReader) -> list[str]:
    """Return the events of a batch as `normalized` does."""
    return [_row(batch, reading, row) for row in range(len(batch.ph))]


def _row(batch: EventBatch, reading: TraceReader, row: int) -> str:
    strings, size = reading.strings, batch.args["size"]
    event = {key: strings[int(getattr(batch, key)[row])] for key in ("name", "cat", "pid", "tid", "id")}
    ts, dur = int(batch.ts_ns[row]), int(batch.dur_ns[row])
    times = batch.exact.get(row, (None if ts == NO_TIME else ts, None if dur == -1 else dur))
    kind = int(size.kinds[row])
    whole, number, text = int(size.integers[row]), float(size.floats[row]), strings[int(size.texts[row])]
    known = [None, whole, number, text][kind]
    assert (kind == TEXT) == (text is not None)
    assert kind != MISSING or math.isnan(number)
    event |= {"ph": chr(batch.ph[row]), "args": {"size": Decimal(number) if kind == 2 else known}}
    return _normalized(event, [None if time is None else _microseconds(time) for time in times])


def facts_of(reading: TraceReader) -> TraceFileFacts:
    """Return the facts of a reading's only file."""
    (facts,) = reading.files
    return facts
