"""Complete queries: files in every format give the same results as brute force."""

from __future__ import annotations

import gzip
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.brute import check, load, spans_of
from traceml.errors import TraceEmptyError, TraceNotFoundError, UsageError
from traceml.traces.native.library import library
from traceml.traces.query.measures import parse_measures
from traceml.traces.query.result import microseconds
from traceml.traces.query.summary import summarize

NAMES = ["read", "write", 'comma, "quoted"', "back\\slash", "naïve ☃", "compute"]


def event(rng, number, **more):
    return {
        "id": number,
        "name": rng.choice(NAMES),
        "cat": rng.choice(["POSIX", "COMPUTE"]),
        "pid": rng.randint(1, 2),
        "tid": rng.randint(1, 2),
        "ts": rng.randint(0, 2000),
        "dur": rng.randint(0, 300),
        "ph": "X",
        "args": {"size": rng.randint(0, 5), "mode": rng.choice(["r", "w"])},
        **more,
    }


@pytest.fixture
def events():
    rng = random.Random(7)
    return [event(rng, number) for number in range(400)]


def ask(tmp_path, data, name="trace.json", **query):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return summarize([path], cached=False, **query)


FORMS = {
    "lines": lambda events: "\n".join(map(json.dumps, events)) + "\n",
    "no last newline": lambda events: "\n".join(map(json.dumps, events)),
    "lines after a bracket": lambda events: "[\n" + "\n".join(map(json.dumps, events)) + "\n",
    "mixed line ends": lambda events: "".join(json.dumps(e) + ("\r\n", "\n")[e["id"] % 2] for e in events),
    "array with commas at line ends": lambda events: "[\n" + ",\n".join(map(json.dumps, events)) + "\n]\n",
    "array that starts on the first line": lambda events: "[" + ",\n".join(map(json.dumps, events)) + "]",
    "array that never ends": lambda events: "[\n" + ",\n".join(map(json.dumps, events)) + ",\n",
    "one line": json.dumps,
    "object": lambda events: json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}),
    "object with keys before": lambda events: json.dumps({"schemaVersion": 1, "traceEvents": events}, indent=1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_form_gives_the_plain_answer(tmp_path, events, form, zipped):
    """The same events give the same numbers in every format."""
    data = FORMS[form](events).encode()
    answer = ask(tmp_path, gzip.compress(data) if zipped else data)

    check(answer, events)
    assert answer["events"] == answer["spans"] == answer["files"][0]["events"] == len(events)


@pytest.mark.parametrize("by", [("cat",), ("pid", "tid"), ("name", "args.mode"), ("args.size",), ("ph",)])
def test_groups_by_any_field(tmp_path, events, by):
    """Groups are by one field or several, of the event or its arguments; integers stay integers."""
    check(ask(tmp_path, FORMS["lines"](events), by=",".join(by)), events, by)


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("cat=POSIX", lambda e, ts, dur: e["cat"] == "POSIX"),
        ("cat=POSIX,dur>100", lambda e, ts, dur: e["cat"] == "POSIX" and dur > 100),
        ("ts>=1ms", lambda e, ts, dur: ts >= 1000),
        ("dur<=0.1ms,pid!=1", lambda e, ts, dur: dur <= 100 and e["pid"] != 1),
        ('name="comma, \\"quoted\\""', lambda e, ts, dur: e["name"] == NAMES[2]),
        ("name~^(read|write)$", lambda e, ts, dur: e["name"] in ("read", "write")),
        ("name~*a*", lambda e, ts, dur: "a" in e["name"]),
        ("args.size>=3,args.mode=w", lambda e, ts, dur: e["args"]["size"] >= 3 and e["args"]["mode"] == "w"),
        ("pid=2", lambda e, ts, dur: e["pid"] == 2),
        ("cat=COMPUTE OR dur>200", lambda e, ts, dur: e["cat"] == "COMPUTE" or dur > 200),
        ("NOT (name=read AND ts<1ms)", lambda e, ts, dur: e["name"] != "read" or ts >= 1000),
        (
            "name IN (read, write), args.size NOT IN (0, 1)",
            lambda e, ts, dur: e["name"] in ("read", "write") and e["args"]["size"] > 1,
        ),
    ],
)
def test_conditions(tmp_path, events, where, keep):
    """Only events that pass all conditions count, also in self times."""
    check(ask(tmp_path, FORMS["lines"](events), where=where), events, keep=keep)


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("dur>10 OR name=a", lambda e, dur: dur > 10 or e.get("name") == "a"),
        ("NOT dur>10", lambda e, dur: not dur > 10),
        (
            "name=a AND dur<5 OR name=b AND (dur=7 OR dur>20)",
            lambda e, dur: (e.get("name") == "a" and dur < 5) or (e.get("name") == "b" and (dur == 7 or dur > 20)),
        ),
        ("dur IN (3, 9)", lambda e, dur: dur in (3, 9)),
        ("dur!=3,dur>=1", lambda e, dur: dur >= 1 and dur != 3),
    ],
)
def test_durations_of_begin_and_end(tmp_path, where, keep):
    """A begin has no duration yet: conditions on it hold for its span, with those on the begin itself."""
    rng = random.Random(11)
    edges = [
        {"ph": "BE"[n % 2], "name": rng.choice("abc"), "pid": 1, "tid": rng.randint(1, 3), "ts": n} for n in range(600)
    ]
    spans = [event(rng, n, name=rng.choice("abc"), tid=9, dur=rng.randint(0, 25)) for n in range(50)]
    answer = ask(tmp_path, FORMS["lines"](edges + spans), where=where)

    check(answer, edges + spans, keep=lambda e, ts, dur: keep(e, dur))


def test_too_many_kinds_of_duration(tmp_path, events):
    """What cannot be told of a begin is refused, not answered wrongly."""
    with pytest.raises(UsageError, match="at most 5 ranges of dur"):
        ask(tmp_path, FORMS["lines"](events), where="dur IN (1, 2, 3, 4, 5)")


def test_asynchronous_spans_of_older_tracers(tmp_path):
    """S and F of one id are a span, as b and e are; T between them is an event."""
    rows = [
        ("S", "load", 1, 10),
        ("S", "load", 2, 12),
        ("T", "load", 1, 13),
        ("F", "load", 1, 30),
        ("F", "load", 2, 19),
    ]
    edges = [
        {"ph": ph, "name": name, "cat": "net", "id": id_, "pid": 1, "tid": 1, "ts": ts} for ph, name, id_, ts in rows
    ]
    answer = ask(tmp_path, json.dumps(edges))

    assert (answer["events"], answer["spans"]) == (5, 2)
    (group,) = answer["groups"]
    assert (group["count"], group["sum_us"], group["max_us"]) == (2, 27, 20)
    assert answer["files"][0]["damage"] == []


def test_older_asynchronous_spans_of_one_name_are_told_by_id(tmp_path):
    """The first of two operations of one name that overlap may end first."""
    rows = [("S", 1, 0), ("S", 2, 10), ("F", 1, 20), ("F", 2, 100)]
    edges = [{"ph": ph, "name": "load", "cat": "net", "id": id_, "pid": 1, "tid": 1, "ts": ts} for ph, id_, ts in rows]
    (group,) = ask(tmp_path, json.dumps(edges))["groups"]

    assert (group["min_us"], group["max_us"]) == (20, 90)


def test_a_begin_without_a_time_is_an_event(tmp_path):
    """It is in no span, but `events` counts everything except metadata."""
    edges = [{"ph": "B", "name": "a", "pid": 1, "tid": 1}, {"ph": "X", "name": "b", "pid": 1, "ts": 1, "dur": 2}]
    answer = ask(tmp_path, json.dumps(edges))

    assert (answer["events"], answer["files"][0]["events"], answer["spans"]) == (2, 2, 1)


def test_integers_in_quotes_are_numbers(tmp_path):
    """As dftracer 1 writes them: in conditions, sums and bytes of I/O. Labels stay as they are."""
    sizes = ["4096", "65536", "065536", "none", str(2**70), 5000]
    writes = [
        {"ph": "X", "name": "write", "cat": "POSIX", "pid": 1, "tid": 1, "ts": n, "dur": 1, "args": {"ret": size}}
        for n, size in enumerate(sizes)
    ]
    trace = json.dumps(writes)
    measures = parse_measures(["sum:args.ret"])

    def found(where):
        return {group["args.ret"] for group in ask(tmp_path, trace, by="args.ret", where=where)["groups"]}

    assert found("args.ret>4096,args.ret<1GiB") == {"65536", 5000}
    assert found("args.ret=64KiB") == {"65536"}
    assert found('args.ret="4096"') == {"4096"}
    answer = ask(tmp_path, trace, measures=measures, report=True)
    assert answer["groups"][0]["sum:args.ret"] == 4096 + 65536 + 5000
    assert answer["report"]["io"]["write_bytes"] == 4096 + 65536 + 5000


def test_decimals_in_quotes_are_numbers(tmp_path):
    """A sum does not leave them out beside integers, and 10.5 is more than 9, which a text is not."""
    losses = ["0.5", "10.5", 2, "3", 0.25, "1e1", "n/a"]
    steps = [
        {"ph": "X", "name": "step", "pid": 1, "tid": 1, "ts": n, "dur": 1, "args": {"loss": loss}}
        for n, loss in enumerate(losses)
    ]
    (group,) = ask(tmp_path, json.dumps(steps), measures=parse_measures(["sum:args.loss"]))["groups"]
    large = ask(tmp_path, json.dumps(steps), by="args.loss", where="args.loss>9")["groups"]

    assert group["sum:args.loss"] == 26.25
    assert {one["args.loss"] for one in large} == {"10.5", "1e1"}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_local_ids_are_of_their_process(tmp_path, scope):
    """Chrome's `id2` has ids that other processes have, too; a global one may end in another process."""
    ends = (1, 2) if scope == "local" else (2, 1)
    rows = [("b", 1, 1, 10), ("b", 2, 2, 12), ("e", ends[0], 1, 20), ("e", ends[1], 2, 50)]
    edges = [
        {"ph": ph, "name": "load", "cat": "net", "pid": pid, "tid": 1, "ts": ts,
         "id2": {scope: "0x1" if scope == "local" else hex(number)}}
        for ph, pid, number, ts in rows
    ]  # fmt: skip
    (group,) = ask(tmp_path, json.dumps(edges))["groups"]

    assert (group["count"], group["sum_us"], group["max_us"]) == (2, 48, 38)


def test_fractions_are_exact(tmp_path):
    """A thousand times 1.5 is 1500.0, and a tenth of a microsecond is no binary fraction."""
    rng = random.Random(3)
    halves = [event(rng, n, name="half", pid=n, ts=n * 10 + 0.25, dur=1.5) for n in range(1000)]
    tenths = [event(rng, n, name="tenth", pid=n, ts=n * 10 + 0.001, dur=0.1) for n in range(1000)]
    answer = ask(tmp_path, json.dumps(halves + tenths))

    sums = {group["name"]: group["sum_us"] for group in answer["groups"]}
    assert sums == {"half": 1500.0, "tenth": 100.0}
    assert isinstance(sums["half"], float)


def test_sums_beyond_64_bits(tmp_path):
    """Sums are exact whatever their size, and integers stay integers."""
    rng = random.Random(3)
    huge = [event(rng, n, name="huge", tid=n, dur=2**62) for n in range(4)]
    large = [event(rng, n, name="large", tid=100 + n, ts=0, dur=2**62 // 1000) for n in range(9)]
    answer = ask(tmp_path, FORMS["lines"](huge + large))

    check(answer, huge + large)
    assert {group["name"]: group["sum_us"] for group in answer["groups"]} == {
        "huge": 2**64,
        "large": 9 * (2**62 // 1000),
    }


def test_percentiles_that_are_the_largest_duration_are_exact(tmp_path):
    """Few spans have their largest duration as p99, also one that the sketch has no bucket for."""
    spans = [{"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": n, "dur": dur} for n, dur in enumerate((1, 3, 10**19))]
    (group,) = ask(tmp_path, json.dumps(spans).encode(), by="name")["groups"]

    assert group["p99_us"] == group["max_us"] == 10**19
    assert group["p50_us"] == 3


def test_numbers_that_fit_nowhere(tmp_path):
    """Negative durations, many decimals and NaN are accepted, event by event."""
    text = """[{"ph":"X","name":"a","pid":1,"tid":1,"ts":0,"dur":-5},
               {"ph":"X","name":"b","pid":1,"tid":2,"ts":0,"dur":0.12345},
               {"ph":"X","name":"c","pid":1,"tid":3,"ts":0,"dur":NaN},
               {"ph":"X","name":"d","pid":1,"tid":4,"ts":1e400,"dur":7}]"""
    groups = {group["name"]: group for group in ask(tmp_path, text)["groups"]}

    assert groups["a"]["sum_us"] == -5
    assert groups["b"]["sum_us"] == 0.123
    assert groups["c"]["count"] == 1
    assert groups["d"]["sum_us"] == 7


edge = st.fixed_dictionaries(
    {
        "ph": st.sampled_from("BBEEbeX"),
        "pid": st.integers(1, 2),
        "tid": st.integers(1, 2),
        "ts": st.integers(0, 40),
        "cat": st.sampled_from("uv"),
        "id": st.sampled_from(["0x1", 2]),
    },
    optional={"name": st.sampled_from("abc"), "dur": st.integers(0, 20)},
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(edge, min_size=1, max_size=40), st.booleans())
def test_pairs(tmp_path, edges, in_order):
    """Begins and ends make spans by thread and by asynchronous id; unpaired ones are reported as damage."""
    events = sorted(edges, key=lambda each: each["ts"]) if in_order else edges
    answer = ask(tmp_path, json.dumps(events))

    spans, lonely, crossed = spans_of(events)
    check(answer, events)
    assert (answer["events"], answer["spans"]) == (len(events), len(spans))
    assert bool(answer["files"][0]["damage"]) == bool(lonely + crossed)


@pytest.mark.parametrize("later", [0, 5])
@pytest.mark.parametrize("setting", ["1", "0"])
def test_spans_that_end_in_another_order_are_kept(tmp_path, monkeypatch, setting, later):
    """The outer span's end, at the same time or earlier, does not remove the inner one; the order is told."""
    monkeypatch.setenv("TRACEML_NATIVE", setting)
    library.cache_clear()
    rows = [("B", "outer", 1), ("B", "inner", 2), ("E", "outer", 9), ("E", "inner", 9 + later)]
    answer = ask(
        tmp_path, json.dumps([{"ph": ph, "name": name, "pid": 1, "tid": 1, "ts": ts} for ph, name, ts in rows])
    )
    monkeypatch.undo()
    library.cache_clear()

    assert {group["name"]: group["sum_us"] for group in answer["groups"]} == {"outer": 8, "inner": 7 + later}
    assert (answer["events"], answer["spans"]) == (4, 2)
    (damage,) = answer["files"][0]["damage"]
    assert damage == {"offset": 0, "what": "1 end event of a span in which another is open", "lost_bytes": 0}


def test_five_hundred_pairs(tmp_path):
    """Pairs that interleave over threads are 500 spans, not a thousand events without duration."""
    events = []
    for number in range(500):
        place = {"pid": 1, "tid": number % 7, "name": f"span {number % 3}"}
        events += [{"ph": "B", "ts": number * 3, **place}, {"ph": "E", "ts": number * 3 + 17 + number % 5, **place}]

    events.sort(key=lambda each: each["ts"])
    answer = ask(tmp_path, json.dumps(events))

    check(answer, events)
    assert (answer["events"], answer["spans"], answer["files"][0]["damage"]) == (1000, 500, [])


def test_bad_checksum_loses_nothing(tmp_path, events):
    """All bytes decompress: all events are used, and the damage is reported."""
    data = bytearray(gzip.compress(FORMS["lines"](events).encode()))
    data[-8] ^= 0xFF
    answer = ask(tmp_path, bytes(data), "trace.pfw.gz")

    check(answer, events)
    assert answer["files"][0]["damage"]


def test_truncated_file_is_used_up_to_there(tmp_path, events):
    """Events before a cut count, and the loss is reported."""
    text = FORMS["lines"](events)
    answer = ask(tmp_path, text[: len(text) * 2 // 3])

    whole_lines = load(text[: text[: len(text) * 2 // 3].rindex("\n") + 1])
    check(answer, whole_lines)
    assert answer["files"][0]["damage"]


def test_several_files_one_of_them_damaged(tmp_path, events):
    """Damage stays with its file; threads of two files are different threads."""
    text = FORMS["lines"](events)
    (tmp_path / "whole.pfw").write_text(text)
    (tmp_path / "cut.pfw.gz").write_bytes(gzip.compress(text.encode())[:-30])
    answer = summarize([tmp_path], cached=False)

    by_name = {file["path"].rsplit("/", 1)[1]: file for file in answer["files"]}
    assert not by_name["whole.pfw"]["damage"]
    assert by_name["cut.pfw.gz"]["damage"]
    assert answer["events"] == 400 + by_name["cut.pfw.gz"]["events"]


def test_same_threads_in_two_files_do_not_nest(tmp_path, events):
    """Self time is by thread of a file: pids repeat over hosts, and device 0 over ranks."""
    for name in ("a.pfw", "b.pfw"):
        (tmp_path / name).write_text(FORMS["lines"](events))

    one = summarize([tmp_path / "a.pfw"], cached=False)
    two = summarize([tmp_path], cached=False)

    assert [2 * group["self_us"] for group in one["groups"]] == [group["self_us"] for group in two["groups"]]


def test_answer_is_kept_until_the_file_changes(tmp_path, events, monkeypatch):
    """A repeated query is answered from the cache; a changed file is read again."""
    monkeypatch.setenv("TRACEML_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "trace.pfw"
    path.write_text(FORMS["lines"](events))
    import os

    os.utime(path, (1, 1))
    first = summarize([path])
    monkeypatch.setattr("traceml.traces.query.summary.run_query", None)
    assert summarize([path]) == first

    monkeypatch.undo()
    path.write_text(FORMS["lines"](events[:10]))
    assert summarize([path], cached=False)["events"] == 10


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"by": "nam"}, "Did you mean name"),
        ({"by": ""}, "Fields: name, cat"),
        ({"where": "cat"}, "one of != <= >= = < > ~ or IN (...) is expected at character 4"),
        ({"where": "cat=POSIX,,"}, "a field is expected at character 11"),
        ({"where": "dur>much"}, "compared with a number"),
        ({"where": "size>1"}, "Fields: name"),
        ({"by": "args.nothing"}, "There are args.mode, args.size"),
        ({"where": "args.nothing=1"}, "There are args.mode, args.size"),
    ],
)
def test_questions_that_make_no_sense(tmp_path, events, query, words):
    """An unknown field or an invalid condition is refused; the error lists the known fields."""
    with pytest.raises(UsageError, match=None) as refused:
        ask(tmp_path, FORMS["lines"](events), **query)

    assert words in str(refused.value)


@pytest.mark.parametrize("data", ["", "\x00\x01\x02", "not json at all\n"])
def test_no_trace_is_an_error(tmp_path, data):
    """A file that is no trace is an error."""
    with pytest.raises((TraceEmptyError, TraceNotFoundError)):
        ask(tmp_path, data)


@pytest.mark.parametrize("data", ["[]", '{"traceEvents": []}', '{"ph":"M","name":"process_name"}'])
def test_a_trace_without_events_has_no_groups(tmp_path, data):
    result = ask(tmp_path, data)
    assert (result["events"], result["spans"], result["groups"]) == (0, 0, [])


@pytest.mark.parametrize(
    "number", ["1e999999999", "1e-999999999", "9" * 400, "Infinity", "-Infinity", "NaN", '"1e999999999"']
)
@pytest.mark.parametrize("key", ["ts", "dur", "args"])
def test_numbers_that_cannot_be_computed_with(tmp_path, number, key):
    """A time beyond all floats is ignored; the result is immediate and valid JSON."""
    values = {"ts": "5", "dur": "7", "args": "1", key: number}
    line = '{{"name":"a","ph":"X","pid":1,"tid":1,"ts":{ts},"dur":{dur},"args":{{"size":{args}}}}}\n'.format(**values)
    answer = ask(tmp_path, line, by="name,args.size", report=True)

    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert answer["spans"] == 1
    assert answer["groups"][0]["sum_us"] == (0 if key == "dur" else 7)


def test_sums_beyond_all_floats():
    """A value too large for a float is an integer, since JSON has no infinity."""
    assert microseconds(10**400, fractional=True) == 10**397
    assert microseconds(-(10**400) + 1, fractional=True) == -(10**397)
