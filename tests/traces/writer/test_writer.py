"""Writing a trace from a program."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from traceml import traces
from traceml.errors import UsageError
from traceml.traces.writer.writer import _PAIR_ID_BITS


def events_of(path):
    """Return all events of a file, read with gzip and json only."""
    data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    if ".json" in path.name:
        return json.loads(data)

    return [json.loads(line) for line in data.splitlines()]


def spans_of(path):
    return [event for event in events_of(path) if event["ph"] == "X"]


SUFFIXES = ["pfw", "pfw.gz", "json", "json.gz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_events_are_written(tmp_path, suffix):
    """Every format contains the same events, and its JSON is valid."""
    path = tmp_path / f"trace.{suffix}"
    before_us = time.time_ns() // 1000
    with traces.Writer(path, process_name="me") as trace:
        with trace.span("outer", cat="a", size=3), trace.span("inner"):
            time.sleep(0.002)
        trace.instant("hit", scope="p", why="x")
        trace.counter("loss", 0.5)
        trace.counter("memory", used=1, free=2)
        trace.thread_name("the one")

    named, _, inner, outer, hit, loss, memory, renamed = events_of(path)
    assert (named["ph"], named["name"], named["args"]["name"]) == ("M", "process_name", "me")
    assert (outer["name"], outer["cat"], outer["args"], outer["ph"]) == ("outer", "a", {"size": 3}, "X")
    assert outer["pid"] == os.getpid()
    assert outer["tid"] == threading.get_native_id()
    assert before_us <= outer["ts"] <= inner["ts"] <= time.time_ns() // 1000
    assert outer["ts"] + outer["dur"] >= inner["ts"] + inner["dur"] >= inner["ts"] + 2000
    assert (hit["ph"], hit["s"], hit["args"]) == ("i", "p", {"why": "x"})
    assert (loss["args"], memory["args"]) == ({"value": 0.5}, {"used": 1, "free": 2})
    assert renamed["args"]["name"] == "the one"


def test_spans_nest_and_adjoin(tmp_path):
    """Whole microseconds are rounded so that no span exceeds its enclosing span."""
    path = tmp_path / "trace.pfw"
    with traces.Writer(path) as trace:
        for _ in range(200):
            with trace.span("outer"), trace.span("inner"):
                pass

    spans = spans_of(path)
    for inner, outer in zip(spans[::2], spans[1::2], strict=True):
        assert outer["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


@pytest.mark.parametrize("is_called", [True, False])
def test_decorator(tmp_path, is_called):
    """A decorated function is a span with its own or a given name, and keeps its metadata."""
    path = tmp_path / "trace.pfw"
    with traces.Writer(path) as trace:

        @(trace.trace() if is_called else trace.trace)
        def load(a, b=1):
            """Load."""
            return a + b

        @trace.trace("other", cat="c")
        def fail():
            raise ValueError("x")

        assert load(1, b=2) == 3
        assert load.__doc__ == "Load."
        with pytest.raises(ValueError, match="x"):
            fail()

    first, second = spans_of(path)
    assert first["name"].endswith("load")
    assert (second["name"], second["cat"], second["args"]) == ("other", "c", {"error": "ValueError"})


def test_calls_of_a_coroutine_function_overlap(tmp_path):
    """Each call is a pair of events with its own number, from begin to end."""
    path = tmp_path / "trace.json"
    with traces.Writer(path) as trace:

        @trace.trace(cat="net")
        async def fetch(number, before, after):
            await before.wait()
            await asyncio.sleep(0.01)
            after.set()
            return number

        async def both():
            begun, first, second = asyncio.Event(), asyncio.Event(), asyncio.Event()
            begun.set()
            return await asyncio.gather(fetch(2, first, second), fetch(1, begun, first))

        assert asyncio.run(both()) == [2, 1]

    first, second, *ends = (event for event in events_of(path) if event["ph"] in "be")
    assert [(event["ph"], event["id"]) for event in ends] == [("e", second["id"]), ("e", first["id"])]
    assert first["name"].endswith("fetch")
    assert ends[1]["ts"] - first["ts"] >= 20_000


def test_a_generator_has_a_span_for_each_item(tmp_path):
    """Its work is measured, not its creation; values and errors reach it, and its own result comes back."""
    path, ticks = tmp_path / "trace.json", []
    with traces.Writer(path) as trace:

        @trace.trace(cat="io")
        def batches():
            try:
                ticks.append((yield 1))
            except ValueError:
                yield 2
            return 3

        @trace.trace
        async def pages():
            yield 4

        sent, thrown = batches(), batches()
        assert (next(sent), next(thrown), thrown.throw(ValueError)) == (1, 1, 2)
        with pytest.raises(StopIteration) as ended:
            sent.send("tick")

        thrown.close()
        assert inspect.isgeneratorfunction(batches)
        assert inspect.isasyncgenfunction(pages)

    assert (ticks, ended.value.value) == (["tick"], 3)
    spans = [event for event in events_of(path) if event["ph"] == "X"]
    assert [(span["cat"], span["args"]) for span in spans] == [("io", {})] * 4


def test_arguments_known_at_the_end(tmp_path):
    path = tmp_path / "trace.pfw"
    with traces.Writer(path) as trace, trace.span("read", path="a") as span:
        span.note(bytes=10)

    assert spans_of(path)[0]["args"] == {"path": "a", "bytes": 10}


def test_arrows_bind_to_the_spans_around_them(tmp_path):
    """Both ends of an arrow are inside their spans, and the end is bound to the enclosing span."""
    path = tmp_path / "trace.json"
    with traces.Writer(path) as trace:
        with trace.span("send"):
            trace.flow_start("message", 7)
        with trace.span("receive"):
            trace.flow_end("message", 7)

    start, end = (event for event in events_of(path) if event["ph"] in "sf")
    assert (start["ph"], start["id"], start["name"]) == ("s", 7, "message")
    assert (end["ph"], end["id"], end["bp"]) == ("f", 7, "e")


def test_all_threads_may_write(tmp_path):
    """Nothing is lost or torn between threads, and each has its name."""
    path = tmp_path / "trace.pfw.gz"
    with traces.Writer(path) as trace:

        def work(name):
            for number in range(5_000):
                with trace.span(name, number=number):
                    pass

        workers = [threading.Thread(target=work, args=(f"w{n}",), name=f"worker {n}") for n in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    events = events_of(path)
    assert Counter(event["name"] for event in events if event["ph"] == "X") == {f"w{n}": 5_000 for n in range(4)}
    named = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert named == {f"worker {n}" for n in range(4)}


@pytest.mark.process
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_forked_children_go_on_by_themselves(tmp_path, suffix):
    """A child's events are in the file (a .json.gz has one per process), and no event of the parent is doubled."""
    path = tmp_path / f"trace.{suffix}"
    trace = traces.Writer(path)
    with trace.span("parent"):
        pass

    context = multiprocessing.get_context("fork")

    def work():
        for _ in range(300):
            with trace.span("child"):
                pass

    children = [context.Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()

    trace.close()
    files = list(tmp_path.iterdir())
    spans = [span for file in files for span in spans_of(file)]
    assert len(files) == (4 if suffix == "json.gz" else 1)
    assert Counter(span["name"] for span in spans) == {"parent": 1, "child": 900}
    assert len({span["pid"] for span in spans}) == 4
    assert [child.exitcode for child in children] == [0, 0, 0]


@pytest.mark.process
def test_fork_while_threads_write(tmp_path):
    """A fork in the middle of writing neither hangs nor damages anything."""
    path = tmp_path / "trace.pfw.gz"
    trace = traces.Writer(path)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            with trace.span("busy"):
                pass

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            trace.instant("child")
            trace.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    stop.set()
    worker.join()
    trace.close()

    assert Counter(event["name"] for event in events_of(path))["child"] == 10


@pytest.mark.process
def test_processes_share_a_file(tmp_path):
    """Independent processes append to one file, which contains all their events."""
    path = tmp_path / "shared.json"
    code = (
        "import sys; from traceml import traces\n"
        "with traces.Writer(sys.argv[1], append=True) as t:\n"
        "    for i in range(20_000):\n"
        "        with t.span(sys.argv[2]): pass\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    assert [process.wait(240) for process in started] == [0, 0]

    assert Counter(span["name"] for span in spans_of(path)) == {"a": 20_000, "b": 20_000}


@pytest.mark.process
def test_calls_of_processes_that_share_a_file_have_numbers_of_their_own(tmp_path):
    """Pairs of a parent and of its forked child; JavaScript reads the numbers exactly."""
    path = tmp_path / "trace.json"
    with traces.Writer(path) as trace:

        @trace.trace
        async def fetch():
            await asyncio.sleep(0)

        asyncio.run(fetch())
        pid = os.fork()
        if pid == 0:
            asyncio.run(fetch())
            trace.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    begun = {event["pid"]: event["id"] for event in events_of(path) if event["ph"] == "b"}
    assert len(begun) == len(set(begun.values())) == 2
    assert (1 << 22 << _PAIR_ID_BITS) + (1 << _PAIR_ID_BITS) < 1 << 53  # with the largest number of a process
    assert {number >> _PAIR_ID_BITS for number in begun.values()} == set(begun)


@pytest.mark.process
def test_exit_without_close_keeps_everything(tmp_path):
    """A program that ends with its writer open has all its events in the file."""
    path = tmp_path / "trace.pfw.gz"
    code = f"from traceml import traces\nt = traces.Writer({str(path)!r})\nfor i in range(1000): t.instant('x')"
    subprocess.run([sys.executable, "-c", code], check=True)

    assert Counter(event["name"] for event in events_of(path))["x"] == 1000


def test_file_is_replaced_or_continued(tmp_path):
    """An existing file is replaced, unless `append` is set."""
    path = tmp_path / "trace.json"
    for append, expected in ((False, 1), (True, 2), (False, 1)):
        with traces.Writer(path, append=append) as trace, trace.span("x"):
            pass

        assert len(spans_of(path)) == expected


def test_placeholders_in_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with traces.Writer(tmp_path / "t-{rank}-{pid}.pfw") as trace:
        trace.instant("x")

    assert trace.path == tmp_path / f"t-3-{os.getpid()}.pfw"
    assert events_of(trace.path)[0]["args"]["name"].startswith("rank 3: ")


def test_empty_trace_is_valid(tmp_path):
    for suffix in SUFFIXES:
        traces.Writer(tmp_path / f"trace.{suffix}").close()

        assert events_of(tmp_path / f"trace.{suffix}") == []


def test_unknown_suffix_says_which_there_are(tmp_path):
    """The file of that name, which is no trace, is left alone."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"weights")
    with pytest.raises(UsageError, match=r"\.pfw\.gz"):
        traces.Writer(path)

    assert path.read_bytes() == b"weights"


def test_events_of_other_times_and_processes(tmp_path):
    """Events of other processes are written with nanoseconds, counted from an origin."""
    path = tmp_path / "trace.json"
    with traces.Writer(path, origin_ns=10**18) as trace:
        trace.write_name("process_name", "rank 0", pid=1, tid=11)
        trace.write_span("step", 10**18 + 1_500, 10**18 + 4_001, pid=1, tid=11, cat="step", args={"step": 0})

    _, span = events_of(path)
    assert (span["ts"], span["dur"], span["pid"], span["tid"]) == (1.5, 2.501, 1, 11)


@pytest.mark.process
def test_writer_is_light():
    """A program that writes a trace does not import numpy, or other rooms."""
    code = "import sys; from traceml.traces import Writer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"numpy", "torch", "rich", "pydantic", "asyncio", "sqlite3"} & set(loaded)


def test_what_is_written_can_be_read(tmp_path):
    """The reader finds every event and no damage in each format, also with members of several processes."""
    for suffix in SUFFIXES:
        path = tmp_path / f"trace.{suffix}"
        for append in (False, True):
            if append and suffix == "json.gz":
                with pytest.raises(UsageError, match=r"use \.pfw\.gz or \.json"):
                    traces.Writer(path, append=True)

                continue

            with traces.Writer(path, append=append) as trace:
                for number in range(500):
                    with trace.span('read, "it"', cat="io", size=number):
                        pass

        reading = traces.read([path], args=["size"])
        assert sum(len(batch.ts_ns) for batch in reading) == len(spans_of(path))
        assert not any(facts.damage for facts in reading.files)
