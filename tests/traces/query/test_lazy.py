"""Traces from Python: lazy, filtered, grouped, as frames."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from tests.traces.brute import check, groups_of
from traceml import traces
from traceml.errors import TraceNotFoundError, UsageError
from traceml.traces.query import frames


@pytest.fixture
def events():
    rng = random.Random(5)
    return [
        {
            "ph": "X",
            "name": rng.choice(["read", "write"]),
            "cat": "POSIX",
            "pid": rng.randint(1, 3),
            "tid": 1,
            "ts": rng.randint(0, 10_000),
            "dur": rng.randint(0, 50),
            "args": {"size": rng.randint(0, 9), "rate": rng.choice([0.5, 2.25])},
        }
        for _ in range(300)
    ]


@pytest.fixture
def opened(tmp_path, events):
    path = tmp_path / "trace.pfw"
    path.write_text("\n".join(map(json.dumps, events)))
    return traces.open(path)


def test_opening_reads_nothing(opened, monkeypatch):
    """Filtering, grouping and choosing measures start no reading."""
    monkeypatch.setattr("traceml.traces.query.summary.run_query", None)

    opened.filter("cat=POSIX").group_by("name").agg("sum")


def test_groups_are_those_of_brute_force(opened, events):
    """Rows contain the requested labels and measures."""
    rows = opened.filter("dur>10").filter("pid!=3").group_by("name", "pid").agg().rows()

    check({"groups": rows}, events, ("name", "pid"), lambda e, ts, dur: dur > 10 and e["pid"] != 3)
    assert list(opened.group_by("pid").agg("count")) == [
        {"pid": labels[0], "count": len(group["durations"])}
        for labels, group in sorted(groups_of(events, ("pid",)).items(), key=lambda item: -sum(item[1]["durations"]))
    ]


@pytest.mark.parametrize("native", [True, False])
def test_spread_percentiles_and_sums_of_arguments(opened, events, monkeypatch, native):
    """They are those of Python's statistics; a sum of integers is an integer."""
    if not native:
        monkeypatch.setattr("traceml.traces.aggregate.stats.library", lambda: None)

    asked = opened.group_by("name").agg("std", "var", "p25", "p99.9", "sum:args.size", "sum:args.rate")
    assert len(asked.rows()) > 1
    for row in asked.rows():
        of = [event for event in events if event["name"] == row["name"]]
        durations = sorted(event["dur"] for event in of)
        assert row["std_us"] == pytest.approx(statistics.stdev(durations), rel=1e-12)
        assert row["var_us2"] == pytest.approx(statistics.variance(durations), rel=1e-12)
        assert row["p25_us"] == pytest.approx(durations[math.ceil(len(of) / 4) - 1], rel=0.01)
        assert row["p99.9_us"] == durations[-1]
        assert row["sum:args.rate"] == sum(event["args"]["rate"] for event in of)
        assert row["sum:args.size"] == sum(event["args"]["size"] for event in of)
        assert isinstance(row["sum:args.size"], int)


def test_spread_of_any_size(tmp_path):
    """Long durations that differ little keep their spread; a single span has none."""
    path = tmp_path / "trace.pfw"
    large = [2**52 + n for n in (0, 1, 5)]
    rows = [
        {"ph": "X", "name": "a", "pid": 1, "tid": n, "ts": 0, "dur": large[n], "args": {"n": 2**62}} for n in range(3)
    ]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"name": "b", "args": {"n": "text"}}])))
    groups = {row["name"]: row for row in traces.open(path).group_by("name").agg("var", "std", "sum:args.n")}

    assert groups["a"] == {"name": "a", "var_us2": 7.0, "std_us": math.sqrt(7), "sum:args.n": 3 * 2**62}
    assert groups["b"] == {"name": "b", "var_us2": None, "std_us": None, "sum:args.n": None}


def test_sums_of_arguments_pass_the_filter(opened, events):
    """Arguments of spans that do not pass are not summed."""
    (row,) = opened.filter("name=read,dur>=25").group_by("name").agg("sum:args.size")

    assert row["sum:args.size"] == sum(e["args"]["size"] for e in events if e["name"] == "read" and e["dur"] >= 25)


@pytest.mark.parametrize("measure", ["p", "p101", "p-1", "avg", "sum:args.", "sum:size", ""])
def test_measures_that_do_not_exist(opened, measure):
    """Each is refused with those there are."""
    with pytest.raises(UsageError, match="percentiles as in p95"):
        opened.group_by("name").agg(measure)


def test_a_sum_of_nothing(opened):
    """A key that no span has as a number is refused with the keys there are."""
    with pytest.raises(UsageError, match=r"args.nothing to sum. There are args.rate, args.size"):
        opened.group_by("name").agg("sum:args.nothing").rows()


def test_frames_of_groups(opened, events):
    """polars and pandas frames contain the same rows."""
    asked = opened.group_by("name").agg("count", "sum")

    assert asked.to_polars().rows(named=True) == asked.rows()
    assert asked.to_pandas().to_dict("records") == asked.rows()


def test_frames_of_events(opened, events):
    """All events are in one frame, in the order of the file; times are nanoseconds."""
    frame = opened.to_polars("size", "rate")

    assert frame["name"].to_list() == [event["name"] for event in events]
    assert frame["args.size"].to_list() == [event["args"]["size"] for event in events]
    assert frame["args.rate"].to_list() == [event["args"]["rate"] for event in events]
    assert frame["ts_ns"].to_list() == [event["ts"] * 1000 for event in events]
    assert opened.to_pandas().shape == (300, 7)


def test_batches_pass_the_filter(opened, events):
    """A loop gets only the events that pass the filter."""
    found = [dur for batch in opened.filter("name=read,dur>=25") for dur in batch["dur_ns"]]

    assert found == [event["dur"] * 1000 for event in events if event["name"] == "read" and event["dur"] >= 25]


def test_odd_events_are_in_batches(tmp_path):
    """Events whose times do not fit in 64 bits are included, with None for missing times."""
    path = tmp_path / "odd.json"
    path.write_text(
        '[{"ph":"X","name":"a","pid":1,"tid":1,"ts":0.1234,"dur":1e30},{"ph":"i","name":"b","pid":"p","tid":1,"ts":5}]'
    )
    frame = traces.open(path).to_polars().sort("name")

    assert frame.select("name", "pid", "ts_ns", "dur_ns").rows() == [("a", "1", 123, None), ("b", "p", 5000, None)]


def test_summary_has_a_report(opened):
    """The overview of the command is available as data."""
    report = opened.summary()["report"]

    assert report["io"]["calls"]
    assert sum(each["spans"] for each in report["timeline"]["bins"]) == 300


def test_facts_tell_of_damage(tmp_path, events, monkeypatch):
    """Damage is reported per file; no event becomes a Python object for that."""
    monkeypatch.setattr(frames, "decoded", None)
    path = tmp_path / "cut.pfw"
    path.write_text("\n".join(map(json.dumps, events))[:-20])

    assert traces.open(path).facts()[0].damage


def test_wrong_calls(opened, tmp_path):
    """Unknown fields and measures are refused at once; the error lists the known ones."""
    with pytest.raises(UsageError, match="Fields: name"):
        opened.group_by("nam")

    with pytest.raises(UsageError, match="There are count"):
        opened.group_by("name").agg("median")

    with pytest.raises(UsageError, match="expected"):
        opened.filter("name")

    with pytest.raises(TraceNotFoundError):
        traces.open(tmp_path / "nothing")
