"""Events from arrays."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from traceml.runs.export.event_blocks import EventBlock, EventBlocks, EventKind
from traceml.traces.writer.writer import Writer

ORIGIN_NS = 1_700_000_000_000_000_000
KINDS = (
    EventKind("step", "step", ("step", "micro_batches"), {"skipped": True}),
    EventKind('100 %d of "ü"\n', "user %s"),
    EventKind("\udcff", "", ("%b",)),
)


def spans(seed=0, count=500, before=0):
    random = np.random.default_rng(seed)
    start = ORIGIN_NS + random.integers(0, 10**12, count) - before
    end = start + random.choice([0, 1, 999, 1_000, 123_456, 5_000_000_000], count)
    numbers = random.integers(-5, 10**12, (count, 2))
    return EventBlock(7, 71, KINDS, random.integers(0, len(KINDS), count), start, numbers, end)


def write_single(writer, block):
    for kind, start, end, numbers in zip(block.kind, block.at_ns, block.end_ns, block.numbers, strict=True):
        of = block.kinds[kind]
        args = {**dict(zip(of.numbers, numbers.tolist(), strict=False)), **of.args}
        writer.write_span(of.name, int(start), int(end), pid=block.pid, tid=block.tid, cat=of.cat, args=args)


@pytest.mark.parametrize("origin_ns", [None, ORIGIN_NS])
@pytest.mark.parametrize("suffix", ["json", "pfw"])
def test_blocks_are_written_as_single_events_are(tmp_path, origin_ns, suffix):
    """A file of a block has the bytes of a file of the same spans, one by one."""
    block = spans()
    with Writer(tmp_path / f"one.{suffix}", origin_ns=origin_ns) as one:
        one.write_name("thread_name", "training", pid=7, tid=71)
        write_single(one, block)

    with Writer(tmp_path / f"block.{suffix}", origin_ns=origin_ns) as whole:
        whole.write_name("thread_name", "training", pid=7, tid=71)
        EventBlocks(whole).write(block)

    assert whole.path.read_bytes() == one.path.read_bytes()
    assert (whole.statistics.written, whole.statistics.pending) == (one.statistics.written, 0)


def test_times_before_the_origin(tmp_path):
    """Spans of a host whose clock is wrong keep their time."""
    block = spans(before=10**12 // 2)
    with Writer(tmp_path / "one.json", origin_ns=ORIGIN_NS) as one:
        write_single(one, block)

    with Writer(tmp_path / "block.json", origin_ns=ORIGIN_NS) as whole:
        EventBlocks(whole).write(block)

    times = [event["ts"] for event in read(whole.path)]
    assert min(times) < 0 < max(times)
    assert read(whole.path) == read(one.path)


@pytest.mark.parametrize("origin_ns", [None, ORIGIN_NS])
def test_arrows_are_written_as_single_events_are(tmp_path, origin_ns):
    """Both ends of each arrow have its number, name, process, thread and time."""
    tracks = np.array([[1, 10], [2, 20]])
    at = ORIGIN_NS + np.array([1_234, 5_000])
    with Writer(tmp_path / "one.pfw", origin_ns=origin_ns) as one:
        for number in range(2):
            (pid, tid), (to_pid, to_tid) = tracks[number].tolist(), tracks[1 - number].tolist()
            one.write_flow("s", "released", 5 + number, int(at[number]), pid=pid, tid=tid, cat="comm")
            one.write_flow("f", "released", 5 + number, int(at[number]) + 77, pid=to_pid, tid=to_tid, cat="comm")

    with Writer(tmp_path / "block.pfw", origin_ns=origin_ns) as whole:
        EventBlocks(whole).write_arrows(5, tracks, tracks[::-1], at, at + 77)

    assert whole.path.read_bytes() == one.path.read_bytes()


@pytest.mark.parametrize("origin_ns", [None, ORIGIN_NS])
@pytest.mark.parametrize("suffix", ["json", "pfw"])
def test_points_are_written_as_single_events_are(tmp_path, origin_ns, suffix):
    """Counters and instants of a block have the bytes of the same events, one by one."""
    kinds = (
        EventKind('100 %d of "ü"\n', "metric", ("value",), phase="C"),
        EventKind("%b is nan", "metric", ("step",), {"metric": "%b", "value": "nan"}, "i"),
    )
    values = [0.5, 3, -1e-7, 7, 1e300]
    numbers = np.array([msgspec.json.encode(value) for value in values])
    at = ORIGIN_NS + np.array([0, 1, 999_999, 10**12, 10**12 + 1])
    block = EventBlock(7, 71, kinds, np.arange(5) % 2, at, numbers[:, None])
    with Writer(tmp_path / f"one.{suffix}", origin_ns=origin_ns) as one:
        one.write_name("thread_name", "events", pid=7, tid=71)
        for number, value in enumerate(values):
            of, at_ns = kinds[number % 2], int(at[number])
            args = {of.numbers[0]: value, **of.args}
            if of.phase == "C":
                one.write_counter(of.name, at_ns, args, pid=7, tid=71, cat=of.cat)
            else:
                one.write_instant(of.name, at_ns, pid=7, tid=71, cat=of.cat, args=args)

    with Writer(tmp_path / f"block.{suffix}", origin_ns=origin_ns) as whole:
        whole.write_name("thread_name", "events", pid=7, tid=71)
        EventBlocks(whole).write(block)

    assert whole.path.read_bytes() == one.path.read_bytes()
    assert whole.statistics.written == one.statistics.written


def test_pending_events_come_first_and_late_blocks_are_counted(tmp_path):
    """A block is written after the events before it; after `close` its events are lost and counted."""
    block = spans(count=3)
    with Writer(tmp_path / "trace.pfw") as writer:
        writer.write_counter("memory", ORIGIN_NS, {"bytes": 1}, pid=7, tid=71)
        EventBlocks(writer).write(block)
        writer.write_counter("memory", ORIGIN_NS, {"bytes": 2}, pid=7, tid=71)

    EventBlocks(writer).write(block)

    assert [event["id"] for event in read(writer.path)] == [1, 2, 3, 4, 5]
    assert (writer.statistics.written, writer.statistics.lost) == (5, 3)


def read(path):
    text = path.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
