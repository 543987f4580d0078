"""Results from a Dask cluster are identical to those of one process, for any parts of a file."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.dask_programs import dask_programs
from tests.traces.fabricated import frames
from traceml.errors import TraceEmptyError, TraceMLError, TraceNotFoundError, UsageError
from traceml.traces.query import cluster, file_parts
from traceml.traces.query.analysis import TraceQuery
from traceml.traces.query.conditions import parse_where
from traceml.traces.query.expressions import parse_by
from traceml.traces.query.measures import parse_measures
from traceml.traces.query.summary import summarize


@dataclass
class Scattered:
    """Reference to a value that all workers have."""

    number: int


class InProcess:
    """Runs tasks at once, with arguments and results pickled as on a cluster."""

    def __init__(self) -> None:
        self.submitted = 0
        self.sizes = []  # of the arguments of tasks, in bytes
        self.scattered = []

    def nthreads(self):
        return {"here": 2}

    def scatter(self, value, *, hash, broadcast):  # noqa: A002 - as distributed calls it
        self.scattered.append(value)
        return Scattered(len(self.scattered) - 1)

    def submit(self, function, *args, pure):
        import pickle

        self.submitted += 1
        self.sizes.append(len(pickle.dumps(args)))
        args = [self.scattered[arg.number] if isinstance(arg, Scattered) else arg for arg in args]
        value = pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(args)))))
        return type("Future", (), {"result": lambda self: value})()


def events_of(seed, count=6000):
    rng = random.Random(seed)
    for number in range(count):
        place = {"pid": rng.randint(1, 3), "tid": rng.randint(1, 2), "cat": "POSIX"}
        time = {"ts": number * 10 + rng.randint(0, 60)}
        kind = rng.random()
        if kind < 0.8:
            name = {"name": rng.choice(["read", "wri,te", 'a "quoted" {name}'])}
            yield {"ph": "X", "dur": rng.randint(0, 90), "args": {"size": rng.randint(0, 99)}, **name, **place, **time}
        elif kind < 0.9:
            yield {"ph": rng.choice("BE"), "name": rng.choice("uv"), **place, **time}
        elif kind < 0.95:
            yield {"ph": rng.choice("be"), "name": "w", "id": rng.choice(["0x1", 7]), **place, **time}
        else:
            yield {"ph": "X", "name": "odd", "dur": 0.12345, **place, **time}

    yield {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "rank 5 (node)"}}


def lines(events):
    return [json.dumps(event) + "\n" for event in events]


def zipped(path, texts, per_member):
    """Write members that end anywhere, also within a line."""
    text = "".join(texts).encode()
    path.write_bytes(b"".join(gzip.compress(text[at : at + per_member]) for at in range(0, len(text), per_member)))


@pytest.fixture
def traces(tmp_path, monkeypatch):
    """A folder with traces in several formats, and parts small enough to divide each of them."""
    events = list(events_of(1))
    zipped(tmp_path / "members.pfw.gz", lines(events), 3001)
    zipped(tmp_path / "one.pfw.gz", lines(events_of(2, 500)), 10**9)
    (tmp_path / "frames.pfw.zst").write_bytes(frames("".join(lines(events_of(7))).encode(), 3001))
    (tmp_path / "frame.pfw.zst").write_bytes(frames("".join(lines(events_of(8))).encode(), 10**9))
    (tmp_path / "plain.pfw").write_text("".join(lines(events_of(3))))
    (tmp_path / "array.json").write_text("[\n" + ",\n".join(map(json.dumps, events_of(4))) + "\n]\n")
    whole = {"distributedInfo": {"rank": 9}, "traceEvents": list(events_of(5)), "last": 1}
    (tmp_path / "object.json").write_text(json.dumps(whole, indent=1))
    damaged = lines(events_of(6))
    damaged[3000] = "not json\n"
    (tmp_path / "damaged.pfw").write_text("".join(damaged))
    monkeypatch.setattr(file_parts, "_PLAIN_BYTES", 100_000)
    monkeypatch.setattr(file_parts, "_ZIPPED_BYTES", 20_000)
    monkeypatch.setattr(file_parts, "_MIN_BYTES", 10_000)
    return tmp_path


@pytest.fixture
def here(monkeypatch):
    """A cluster in this process."""
    client = InProcess()
    monkeypatch.setattr(cluster, "_is_client", lambda given: given is client)
    return client


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"by": "cat,pid,args.size"},
        {"by": "rank,host,source", "where": "dur>40"},
        {"by": "name", "where": "rank=5,name~read"},
        {"by": "name", "report": True},
        {"by": "name", "where": "name IN (u, w) OR dur>40", "measures": ("std", "p95", "sum:args.size")},
    ],
)
def test_same_answer(traces, here, query):
    """All numbers equal those of one process: groups, self time, pairs across parts, overlap, damage."""
    query = query | {"measures": parse_measures(query.get("measures", ()))}
    alone = summarize([traces], cached=False, **query)

    assert summarize([traces], cached=False, dask=here, **query) == alone
    assert here.submitted > 20, "files were cut"


def test_times_in_nanoseconds(traces, here):
    """The unit in a file's head holds for all of its parts: percentiles are not rounded to microseconds."""
    unit = '{"name":"CM","ph":4,"args":{"name":"time_metric","value":"NS"}}\n'
    path = traces / "unit" / "nanoseconds.pfw"
    path.parent.mkdir()
    path.write_text(
        unit + "".join(lines(each | {"dur": 1001 + number % 997} for number, each in enumerate(events_of(9))))
    )

    assert summarize([path], cached=False, dask=here) == summarize([path], cached=False)


def test_files_that_cannot_be_cut_are_read_whole(traces, here):
    """Damage inside a part makes the file one task, and the damage is reported as usual."""
    answer = summarize([traces / "damaged.pfw"], cached=False, dask=here)

    assert answer["files"][0]["damage"]
    assert answer == summarize([traces / "damaged.pfw"], cached=False)


@pytest.mark.parametrize("name", ["members.pfw.gz", "frames.pfw.zst", "plain.pfw", "array.json", "object.json"])
def test_parts_cover_a_file_once(traces, name):
    """Parts follow each other without gaps, and there are several."""
    cut = file_parts.split(0, traces / name)

    assert len(cut) > 3
    assert cut[0].begin == 0
    assert all(one.end == two.begin for one, two in pairwise(cut))
    assert cut[-1].end == (traces / name).stat().st_size


def test_files_that_cannot_be_cut_cost_one_more_pass(traces, here):
    """However many they are, what was read is read again only once."""
    damaged = traces / "damaged.pfw"
    copies = [traces / f"copy-{number}.pfw" for number in range(4)]
    for copy in copies:
        copy.write_bytes(damaged.read_bytes())

    paths = [traces / "plain.pfw", *copies]
    assert summarize(paths, cached=False, dask=here) == summarize(paths, cached=False)
    parts = [len(file_parts.split(0, path, least=8)) for path in paths]
    assert here.submitted == sum(parts) + parts[0] + len(copies)


def test_a_task_carries_its_own_file_only(traces, here):
    """However many files there are: labels, which conditions need of all files, are sent to each worker once."""
    (traces / "more").mkdir()
    for number in range(100):
        (traces / "more" / f"{number}.pfw").write_text("".join(lines(events_of(number, 3))))

    query = {"by": "rank,source", "where": "rank=5", "cached": False}
    assert summarize([traces / "more"], dask=here, **query) == summarize([traces / "more"], **query)
    assert (len(here.scattered), here.submitted) == (1, 200)
    assert max(here.sizes) < 1000


def test_magic_number_by_chance_is_no_cut(traces):
    """A gzip file is cut where a member of text begins, and not at the same three bytes in compressed data."""
    members = [gzip.compress(b"x" * 15_000 + b"\x1f\x8b\x08" + b"x" * 15_000, 0) for _ in range(4)]
    path = traces / "stored.pfw.gz"
    path.write_bytes(b"".join(members))

    assert [part.begin for part in file_parts.split(0, path)] == [len(members[0]) * number for number in range(4)]


def test_worker_that_does_not_see_the_file(tmp_path):
    """The error names the file and the requirement."""
    part = file_parts.FilePart(0, str(tmp_path / "gone"), 0, 10, True, False)
    with pytest.raises(TraceNotFoundError, match="a Dask worker does not see"):
        cluster.analyze_part(TraceQuery(), part, None)


@pytest.mark.parametrize("where", ["", "rank=5"])
def test_worker_without_traceml(traces, here, monkeypatch, where):
    """What the cluster says of it is an error in plain words, as that of a worker that was killed."""

    def fail(*_):
        raise ModuleNotFoundError("No module named 'traceml'")

    for name in ("analyze_part", "labels_of"):
        monkeypatch.setattr(cluster, name, fail)

    monkeypatch.setattr(here, "submit", lambda fail, *_, pure: type("Future", (), {"result": fail})())
    with pytest.raises(TraceMLError, match=r"No module named 'traceml'.* Workers need traceml"):
        summarize([traces], where=where, cached=False, dask=here)


def test_no_event_at_all(tmp_path, here):
    """An empty trace has no events here too, and a file that is no trace is an error."""
    file = tmp_path / "empty.json"
    file.write_text("[]")
    assert summarize([file], cached=False, dask=here)["events"] == 0
    file.write_text("no trace")
    with pytest.raises(TraceEmptyError):
        summarize([file], cached=False, dask=here)


def test_questions_travel():
    """A query with conditions can be pickled."""
    import pickle

    query = TraceQuery(parse_by("name"), parse_where("dur>2.5ms,name~a*"))
    assert pickle.loads(pickle.dumps(query)) == query


def test_nobody_answers(monkeypatch):
    """An absent scheduler is reported within seconds, with its address."""
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.5)
    with pytest.raises(UsageError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"):
        summarize([Path(__file__)], cached=False, dask="tcp://127.0.0.1:1")


@pytest.mark.parametrize("given", ["foo", "", "tcp://foo", "bad.json", "no_address.json"])
def test_what_is_no_address_is_reported_at_once(tmp_path, monkeypatch, given):
    """A name without a port, or a file that no scheduler has written, is an error that shows an address."""
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("no_address.json").write_text("{}")
    with pytest.raises(UsageError, match=re.escape(f"dask={given!r} is ") + ".* give HOST:PORT"):
        summarize([Path(__file__)], cached=False, dask=given)


def test_a_schedulers_file_is_taken(tmp_path, monkeypatch):
    """The file of `dask scheduler --scheduler-file` stands for the address in it."""
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.5)
    (tmp_path / "scheduler.json").write_text('{"address": "tcp://127.0.0.1:1"}')
    with pytest.raises(UsageError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"):
        summarize([Path(__file__)], cached=False, dask=str(tmp_path / "scheduler.json"))


@pytest.mark.process
def test_cluster_of_programs(traces, tmp_path):
    """A scheduler and workers started from the command line give the same JSON."""
    command = [sys.executable, "-m", "traceml", "analyze", str(traces), "--by", "name,pid", "--json", "--no-cache"]
    with dask_programs(tmp_path, workers=2) as address:
        wait = f"from distributed import Client; Client({address!r}).wait_for_workers(2, 240)"
        subprocess.run([sys.executable, "-c", wait], check=True)
        remote = subprocess.run([*command, "--dask", address], capture_output=True, text=True, check=True).stdout

    alone = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(remote) == json.loads(alone)
