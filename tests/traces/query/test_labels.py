"""Rank, host and file of events: from arguments, metadata, headers and names of files."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from tests.traces.brute import check, load
from traceml.traces.query.analysis import TraceQuery
from traceml.traces.query.conditions import parse_where
from traceml.traces.query.labels import Labels
from traceml.traces.query.summary import run_query, summarize

DFTRACER = Path(__file__).parent / "data" / "dftracer-2.2.0.pfw.gz"  # written by dftracer itself


def span(**more):
    return {"ph": "X", "name": "work", "pid": 1, "tid": 1, "ts": 0, "dur": 5, **more}


def write(path, events, **header):
    path.write_text(json.dumps({**header, "traceEvents": events}))
    return path


def groups(paths, by, **more):
    return {group[by]: group["count"] for group in summarize(paths, by=by, cached=False, **more)["groups"]}


def test_rank_of_torch_profiler(tmp_path):
    """The header of each rank's file contains its rank, also for the device, whose pid is 0 everywhere."""
    paths = [
        write(tmp_path / f"{rank}.json", [span(pid=0), span(pid=99)], distributedInfo={"rank": rank}) for rank in (0, 3)
    ]

    assert groups(paths, "rank") == {0: 2, 3: 2}


def test_rank_of_processes(tmp_path):
    """The name of a process may contain its rank and, in parentheses, its host; metadata may come last."""
    names = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"rank {pid - 1} (n{pid})"}} for pid in (1, 2)
    ]
    path = write(tmp_path / "run.json", [span(), span(pid=2), span(pid=2), *names])

    assert groups([path], "rank") == {1: 2, 0: 1}
    assert groups([path], "host") == {"n2": 2, "n1": 1}
    assert groups([path], "rank", where="rank=1,host=n2") == {1: 2}


@pytest.mark.parametrize(
    ("name", "rank", "host"),
    [
        ("trace_rank3.json", 3, None),
        ("rank-12.pt.trace.json", 12, None),
        ("node7_4242.1700000000.pt.trace.json", None, "node7"),
        ("frank5.json", None, None),
    ],
)
def test_rank_and_host_by_file_name(name, rank, host):
    """Without other labels the rank comes from the name of the file."""
    labels = Labels()
    labels.add_file(0, Path("somewhere", name), {})

    assert (labels.rank(0, 1), labels.host(0, 1)) == (rank, host)


def test_rank_by_folder_name(tmp_path, monkeypatch):
    """Whatever the working folder is; each spelling of a path has a result of its own."""
    folder = tmp_path / "rank_3"
    folder.mkdir()
    write(folder / "trace.json", [span()])
    os.utime(folder / "trace.json", (1, 1))  # old enough for a cached result
    monkeypatch.setenv("TRACEML_CACHE_DIR", str(tmp_path / "cache"))
    for cwd, path in ((folder, "trace.json"), (tmp_path, "rank_3/trace.json")):
        monkeypatch.chdir(cwd)
        result = summarize(path, by="rank")
        assert [group["rank"] for group in result["groups"]] == [3]
        assert result["files"][0]["path"] == path


def test_rank_by_argument_wins(tmp_path):
    """`args.rank` of an event has priority."""
    path = write(tmp_path / "rank9.json", [span(args={"rank": 4}), span()])

    assert groups([path], "rank") == {4: 1, 9: 1}


def test_dftracer_itself():
    """Hashes of hosts and files become names; the counts are those of a loop over its lines."""
    text = gzip.decompress(DFTRACER.read_bytes()).decode()
    events = load(text)
    hashes = {}
    for line in text.splitlines():
        if '"FH"' in line or '"HH"' in line:
            args = json.loads(line)["args"]
            hashes[args["value"]] = args["name"]

    for event in events:
        event["host"] = hashes[event["args"]["hhash"]]
        event["file"] = hashes.get(event["args"].get("fhash"))

    for by in (("name",), ("host", "file"), ("cat", "name")):
        check(summarize([DFTRACER], by=",".join(by), cached=False), events, by)

    only = summarize([DFTRACER], where="file~data.bin$,name=read", cached=False)
    assert only["events"] == sum(event["name"] == "read" and event["file"].endswith("data.bin") for event in events)


def test_labels_of_files_are_kept_only_for_queries_about_files():
    """dftracer writes a line per file: they are neither parsed nor kept where no field or condition needs them."""
    for query, kept in (
        (TraceQuery(("name",)), (0, 0)),
        (TraceQuery(("file",)), (1, 0)),
        (TraceQuery(("name",), parse_where("dur>0,host~.")), (0, 1)),
    ):
        labels = run_query(query, [DFTRACER])[0].context.labels
        assert (bool(labels.files), bool(labels.hosts)) == kept


def test_aggregated_rows_of_dftracer(tmp_path):
    """Both notations are counted as phase A, and are no spans."""
    row = {"name": "read", "cat": "POSIX", "pid": 1, "tid": 1, "ts": 0, "args": {"dur_sum": 92, "dft_cnt": 20}}
    path = write(tmp_path / "trace.json", [span(), {**row, "ph": 3}, {**row, "ph": "A"}])
    answer = summarize([path], cached=False)

    assert answer["letters"] == {"A": 2, "X": 1}
    assert (answer["events"], answer["spans"]) == (3, 1)
    assert [group["name"] for group in answer["groups"]] == ["work"]


def test_calls_behind_aggregated_rows(tmp_path):
    """They are counted and summed by the query's groups and conditions, apart from spans."""
    rows = [
        {
            "name": name,
            "cat": "POSIX",
            "pid": pid,
            "tid": 1,
            "ts": 0,
            "ph": 3,
            "args": {"dur_sum": us, "dft_cnt": count},
        }
        for name, pid, us, count in (("read", 1, 92, 20), ("read", 2, 8, 5), ("open", 1, 10, 184))
    ]
    untimed = {**rows[0], "name": "close", "args": {"dft_cnt": 3}}
    path = write(tmp_path / "trace.json", [span(), *rows, untimed])
    calls = summarize([path], cached=False)["aggregated"]

    assert (calls["rows"], calls["count"], calls["sum_us"]) == (4, 212, 110)
    assert calls["groups"] == [
        {"name": "read", "rows": 2, "count": 25, "sum_us": 100, "mean_us": 4.0},
        {"name": "open", "rows": 1, "count": 184, "sum_us": 10, "mean_us": 10 / 184},
        {"name": "close", "rows": 1, "count": 3, "sum_us": None, "mean_us": None},
    ]
    some = summarize([path], by="name,pid", where="name=read AND NOT pid=2", cached=False)["aggregated"]
    assert [(group["name"], group["pid"], group["count"]) for group in some["groups"]] == [("read", 1, 20)]
    assert "aggregated" not in summarize([write(tmp_path / "plain.json", [span()])], cached=False)
