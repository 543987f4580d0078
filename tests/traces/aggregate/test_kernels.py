"""The library and numpy compute the same; memory is bounded; what is exact stays exact."""

from __future__ import annotations

import random
import sys
import tempfile
import tracemalloc

import numpy as np
import pytest

from traceml.errors import StoreError
from traceml.traces.aggregate import nesting, numbering, overlap, pairs, sorting, stats
from traceml.traces.aggregate.stats import bucket, middle
from traceml.traces.native import library as native

MODULES = (native, overlap, nesting, numbering, pairs, stats)


@pytest.fixture(params=["library", "numpy"])
def way(request, monkeypatch):
    """Run a test with the compiled kernels and without."""
    if request.param == "numpy":
        for module in MODULES:
            monkeypatch.setattr(module, "library", lambda: None)
    else:
        assert native.library(), "build the library: install the package where there is a C compiler"

    return request.param


def spans(seed, count=3000, lanes=5):
    rng = np.random.default_rng(seed)
    start = np.sort(rng.integers(-5_000, 50_000, count))
    duration = rng.choice([0, 1, 7, 300, 4_000], count) * rng.integers(0, 20, count)
    return start, duration, rng.integers(0, 9, count, np.int32), rng.integers(0, lanes, count, np.int32)


def test_numbers_of_pairs(way):
    """Equal pairs get equal numbers, dense in the order of appearance, also negative ones and very many."""
    rng = np.random.default_rng(1)
    left, right = rng.integers(-3, 400, 5000, np.int32), rng.integers(-3, 30, 5000, np.int32)
    numbered = numbering.PairNumbering()
    numbers = np.concatenate([numbered.number(left[at : at + 700], right[at : at + 700]) for at in range(0, 5000, 700)])

    known: dict[tuple[int, int], int] = {}
    for one, two in zip(left.tolist(), right.tolist(), strict=True):
        known.setdefault((one, two), len(known))

    assert numbers.tolist() == [known[pair] for pair in zip(left.tolist(), right.tolist(), strict=True)]
    assert [numbered.pair(number) for number in range(len(numbered))] == list(known)
    assert numbered.pairs(5).tolist() == [list(pair) for pair in list(known)[5:]]


def test_stats_of_groups(way):
    """Counts, sums beyond 64 bits, extremes and buckets by group."""
    rng = np.random.default_rng(2)
    group = rng.integers(0, 200, 4000, np.int32)
    value = rng.integers(0, 2**63 - 1, 4000) >> rng.integers(0, 63, 4000)
    found = stats.GroupStatTable()
    for at in range(0, 4000, 900):
        found.add(group[at : at + 900], value[at : at + 900], 200)

    for number in range(200):
        values = value[group == number].tolist()
        stat = found.stat(number)
        assert (stat.count, stat.total, stat.least, stat.most) == (len(values), sum(values), min(values), max(values))
        expected: dict[int, int] = {}
        for each in values:
            expected[bucket(each)] = expected.get(bucket(each), 0) + 1

        assert stat.counts == expected


def test_many_groups_of_few_spans_take_little():
    """With a key that hardly repeats, a group takes a few hundred bytes, and its percentiles stay exact."""
    groups, found = 50_000, stats.GroupStatTable()
    tracemalloc.start()
    for _ in range(3):
        found.add(np.arange(groups, dtype=np.int32), np.arange(groups, dtype=np.int64) * 1000, groups)

    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert native.library()
    assert held_bytes / groups < 700
    assert found.stat(4321).counts == {bucket(4_321_000): 3}


def test_sums_of_the_largest_durations(way):
    """Nothing overflows."""
    found = stats.GroupStatTable()
    found.add(np.zeros(1000, np.int32), np.full(1000, 2**63 - 1), 1)

    assert found.stat(0).total == 1000 * (2**63 - 1)


def test_buckets_are_narrow():
    """The middle of a bucket is within half a percent of its values; small numbers are exact."""
    for value in [*range(300), *(int(1.37**power) for power in range(10, 130)), 2**63 - 1, 2**63, 10**25 + 7]:
        assert abs(middle(bucket(value)) - value) <= value / 256

    assert all(middle(bucket(value)) == value for value in range(128))


@pytest.mark.parametrize("seed", range(3))
def test_nesting_is_the_same_without_the_library(seed, monkeypatch):
    """Self time by group, with deep stacks, equal and overlapping spans."""
    start, duration, group, lane = spans(seed)

    def run():
        sums = nesting.SelfTimes()
        for at in range(0, len(start), 700):
            sums.add(*(each[at : at + 700] for each in (start, duration, group, lane)))

        sums.finish()
        return [sums.self_ns(number) for number in range(9)]

    compiled = run()
    monkeypatch.setattr(nesting, "library", lambda: None)
    assert compiled == run()


def test_threads_share_the_lanes(monkeypatch):
    """Blocks that are long enough for threads give the same sums as one thread does."""
    columns = spans(4, count=60_000, lanes=7)

    def run(cores):
        monkeypatch.setattr(nesting.os, "sched_getaffinity", lambda _: range(cores))
        sums = nesting.SelfTimes()
        for at in range(0, 60_000, 20_000):
            sums.add(*(each[at : at + 20_000] for each in columns))

        sums.finish()
        return [sums.self_ns(number) for number in range(9)]

    assert run(cores=1) == run(cores=2) == run(cores=5)


def test_deep_nesting(way):
    """Ten thousand nested spans, each with a nanosecond of its own at either end."""
    depth = 10_000
    start, duration = np.arange(depth), np.arange(2 * depth, 0, -2)
    sums = nesting.SelfTimes()
    sums.add(start, duration, np.zeros(depth, np.int32), np.zeros(depth, np.int32))
    sums.finish()

    assert sums.self_ns(0) == 2 * depth


@pytest.mark.parametrize("seed", range(3))
def test_cover_is_the_same_without_the_library(seed, monkeypatch):
    """Time by set of kinds, and the timeline, whose bins widen."""
    start, duration, _, unit = spans(seed)
    start, duration = start * 1000, duration * 1000
    kind = np.random.default_rng(seed).integers(0, 7, len(start), np.uint8)

    def run():
        found = overlap.OverlapTimes(timeline=True)
        for at in range(0, len(start), 900):
            found.add(*(each[at : at + 900] for each in (start, duration, unit, kind)))

        found.finish()
        return {number: times.tolist() for number, times in found.units()}, found.timeline.state.tolist()

    compiled = run()
    monkeypatch.setattr(overlap, "library", lambda: None)
    assert compiled == run()
    busy = sum(sum(times) for times in compiled[0].values())
    assert busy > 0


@pytest.mark.parametrize("sought", [b"ab", b"aab", b"baab"])
def test_bytes_are_found_as_by_python(sought):
    """At every position, in texts with many near misses, up to the last byte."""
    chance = random.Random(3)
    for size in [*range(70), 500]:
        data = bytes(chance.choices(b"abc", (3, 1, 1 + size % 4), k=size))
        assert [native.find(data, sought, at) for at in range(size + 2)] == [
            data.find(sought, at) for at in range(size + 2)
        ]


@pytest.mark.parametrize("rows", [0, 1, 999, 5000])
def test_sorting_beyond_memory(rows):
    """More rows than fit in memory are returned in order; ties keep their order."""
    rng = np.random.default_rng(rows)
    times, place = rng.integers(0, 300, rows), np.arange(rows, dtype=np.int32)
    sorter = sorting.ExternalSorter(limit=256, run=100)
    for at in range(0, rows, 70):
        sorter.add(times[at : at + 70], place[at : at + 70])

    spilled = sorter._file is not None
    blocks = list(sorter.blocks())
    order = np.argsort(times, kind="stable")
    assert np.concatenate([block[1] for block in blocks] or [place]).tolist() == place[order].tolist()
    assert spilled == (rows > 356)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("step", [0, 1, 40])
def test_sorting_opens_few_runs_at_once(copies, step, monkeypatch):
    """Runs of a trace that is nearly in order are opened when their time comes, also where it repeats."""
    rng = np.random.default_rng(7)
    part = np.maximum.accumulate(rng.integers(0, step + 1, 9000)) + np.arange(9000) // 50 * step
    times = np.concatenate([part + rng.integers(0, step + 1, 9000)] * copies)
    place, opened = np.arange(len(times), dtype=np.int32), list[int]()
    real = sorting._merge_step

    def counted(cursors, until):
        opened.append(len(cursors))
        return real(cursors, until)

    monkeypatch.setattr(sorting, "_merge_step", counted)
    sorter = sorting.ExternalSorter(limit=4000, run=1500)
    for at in range(0, len(times), 500):
        sorter.add(times[at : at + 500], place[at : at + 500])

    joined = np.concatenate([block[1] for block in sorter.blocks()])
    assert joined.tolist() == place[np.argsort(times, kind="stable")].tolist()
    assert step == 0 or max(opened) <= 2 * copies
    assert step == 0 or len(opened) < 40 * copies


def test_sorting_says_when_there_is_no_room(monkeypatch):
    """The error for a full disk names the folder and the remedy."""

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    sorter = sorting.ExternalSorter(limit=10, run=5)
    with pytest.raises(StoreError, match="Set TMPDIR"):
        sorter.add(np.arange(50))


def test_matching_is_the_same_without_the_library(monkeypatch):
    """Pairs by lane, with names that do not match and begins that stay open."""
    rng = np.random.default_rng(4)
    count = 12_000
    columns = (
        rng.integers(0, 5000, count),
        rng.integers(0, 2, count, np.uint8),
        rng.integers(0, 30, count, np.int32),
        rng.integers(-1, 4, count, np.int32),
        rng.integers(0, 9, count, np.int32),
        rng.integers(0, 255, count, np.uint8),
    )

    def run():
        matcher = pairs.SpanMatcher()
        matcher.edges.add(*columns)
        spans = [[column.tolist() for column in rows] for rows in matcher.spans()]
        return spans, matcher.unpaired

    compiled = run()
    monkeypatch.setattr(pairs, "library", lambda: None)
    assert compiled == run()
    assert compiled[1].begins > 1024, "more begins are open than the pool had places"


@pytest.mark.parametrize("lengths", [7, 200_000])
def test_spans_that_all_start_together(way, lengths):
    """Spans with the same start nest by duration: the shortest is innermost, and its duration is its self time."""
    rng = np.random.default_rng(5)
    count = 200_000 if way == "library" else 20_000
    duration, group = rng.integers(1, lengths, count), rng.integers(0, 9, count, np.int32)
    found = nesting.SelfTimes()
    found.add(np.zeros(count, np.int64), duration, group, np.zeros(count, np.int32))
    found.finish()

    longest, expected = 0, [0] * 9
    for length, number in sorted(zip(duration.tolist(), group.tolist(), strict=True), key=lambda pair: pair[0]):
        expected[number] += length - longest  # of equal ones the first that was written is innermost
        longest = length

    assert [found.self_ns(number) for number in range(9)] == expected


def crossing(count):
    """Return events of one thread whose spans begin one after another, and end in the same order."""
    rows = 2 * count
    is_end = np.repeat(np.array([0, 1], np.uint8), count)
    name = np.tile(np.arange(count, dtype=np.int32), 2)
    return np.arange(rows), is_end, np.zeros(rows, np.int32), name, name, np.zeros(rows, np.uint8)


def test_many_crossing_spans_are_paired(way):
    """Each end closes its own begin, below all later ones; a walk through these would take 10^8 steps, or 10^10."""
    count = 200_000 if way == "library" else 20_000
    matcher = pairs.SpanMatcher()
    matcher.edges.add(*crossing(count))
    rows = [np.concatenate(each) for each in zip(*matcher.spans(), strict=True)]

    assert rows[0].tolist() == list(range(count)), "in the order of the ends, which is that of the begins"
    assert rows[1].tolist() == [count] * count
    assert matcher.unpaired == pairs.Unpaired(crossed=count - 1)


def test_a_crossing_span_costs_what_a_nested_one_does(monkeypatch):
    """Without the library, the number of lines that run per span does not grow with the number of open begins."""
    monkeypatch.setattr(pairs, "library", lambda: None)

    def lines(count):
        matcher, run = pairs.SpanMatcher(), 0
        matcher.edges.add(*crossing(count))

        def trace(frame, event, arg):
            nonlocal run
            run += event == "line" and frame.f_code.co_filename == pairs.__file__
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            list(matcher.spans())
        finally:
            sys.settrace(before)

        return run

    few, many = lines(100), lines(1000)
    assert 900 < many - few <= 10 * few
