"""Results of `traceml analyze` by brute force: every event in memory, with Python's integers."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from fractions import Fraction
from itertools import pairwise


def spans_of(events):
    """Return (event, ts, dur, place) of spans, and the number of unpaired edges and of crossed ends."""
    spans, lonely, crossed = [], 0, 0
    stacks = defaultdict(list)
    for place, event in enumerate(events):
        if event["ph"] in ("X", 1):
            spans.append((event, _exact(event["ts"]), _exact(event.get("dur", 0)), place))

    edges = [event for event in events if event["ph"] in ("B", "E", "b", "e")]
    edges.sort(key=lambda event: _exact(event["ts"]))
    for place, event in enumerate(edges):
        asynchronous = event["ph"] in "be"
        key = (event.get("cat"), event["id"]) if asynchronous else (event["pid"], event["tid"])
        stack = stacks[asynchronous, key]
        if event["ph"] in "Bb":
            stack.append((event, place))
            continue

        matching = [at for at, (begin, _) in enumerate(stack) if event.get("name") in (None, begin.get("name"))]
        if not matching:
            lonely += 1
            continue

        crossed += matching[-1] < len(stack) - 1
        begin, at = stack.pop(matching[-1])
        duration = _exact(event["ts"]) - _exact(begin["ts"])
        spans.append((begin, _exact(begin["ts"]), duration, len(events) + at))

    return spans, lonely + sum(len(stack) for stack in stacks.values()), crossed


def groups_of(events, by=("name",), keep=lambda event, ts, dur: True):
    """Return the groups by label: count, sum, minimum, maximum, self time and all durations, in exact microseconds."""
    spans, *_ = spans_of(events)
    chosen = [span for span in spans if keep(span[0], span[1], span[2])]
    own = _self_times(chosen)
    groups = defaultdict(lambda: {"durations": [], "self": 0})
    for (event, _, duration, _), self_time in zip(chosen, own, strict=True):
        group = groups[tuple(_field(event, field) for field in by)]
        group["durations"].append(duration)
        group["self"] += self_time

    return groups


def check(answer, events, by=("name",), keep=lambda event, ts, dur: True):
    """Compare a result with brute force: counts, sums, extremes and self times exactly, percentiles to 1 %."""
    expected = groups_of(events, by, keep)
    found = {tuple(group[field] for field in by): group for group in answer["groups"]}
    assert set(found) == set(expected)
    for labels, plain in expected.items():
        group, durations = found[labels], sorted(plain["durations"])
        assert group["count"] == len(durations)
        assert Fraction(group["sum_us"]) == sum(durations)
        assert Fraction(group["min_us"]) == durations[0]
        assert Fraction(group["max_us"]) == durations[-1]
        assert math.isclose(group["mean_us"], sum(durations) / len(durations), rel_tol=1e-12)
        assert Fraction(group["self_us"]) == plain["self"], labels
        for key, share in (("p50_us", 50), ("p99_us", 99)):
            true = durations[math.ceil(len(durations) * share / 100) - 1]
            assert math.isclose(group[key], true, rel_tol=0.01, abs_tol=0.001), (labels, key)

    sums = [group["sum_us"] for group in answer["groups"]]
    assert sums == sorted(sums, reverse=True)


def load(text):
    """Return the events of a trace's text: an array, the object form, or lines; metadata left out."""
    try:
        whole = json.loads(text)
        events = whole["traceEvents"] if isinstance(whole, dict) and "traceEvents" in whole else whole
    except ValueError:
        lines = (line.strip().rstrip(",") for line in text.splitlines())
        events = [json.loads(line) for line in lines if line not in ("", "[", "]")]

    return [event for event in ([events] if isinstance(events, dict) else events) if event["ph"] not in ("M", 4)]


def _exact(number):
    """Return a time as it was written, 0.1 is a tenth, rounded to nanoseconds."""
    return number if isinstance(number, int) else Fraction(round(Fraction(str(number)) * 1000), 1000)


def _field(event, field):
    return event.get("args", {}).get(field.removeprefix("args.")) if field.startswith("args.") else event.get(field)


def _lane(event):
    return ("async", event.get("cat"), event["id"]) if event["ph"] == "b" else (event.get("pid"), event.get("tid"))


def _self_times(spans):
    """Return each span's share of its lane's time: every moment belongs to the span that was opened last."""
    own = [Fraction(0)] * len(spans)
    lanes = defaultdict(list)
    for number, (event, start, duration, place) in enumerate(spans):
        # Later ones in this order lie inside; of equal spans the one that was written first.
        lanes[_lane(event)].append((start, -duration, -place, number))

    for lane in lanes.values():
        lane.sort()
        moments = sorted({moment for start, duration, _, _ in lane for moment in (start, start - duration)})
        for begin, end in pairwise(moments):
            open_ = [entry for entry in lane if entry[0] <= begin and entry[0] - entry[1] >= end]
            if open_:
                own[open_[-1][3]] += end - begin

    return own
