"""The report of a trace: kinds of work and their overlap, I/O, kernels and operators, ranks, the timeline."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from tests.forked import client as forked
from traceml.traces.aggregate.work_kinds import COMM, COMPUTE, COPY, HOST, HOST_COMM, IO, OTHER, classify, io_direction
from traceml.traces.query.summary import summarize


def report(tmp_path, events, **header):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({**header, "traceEvents": events}))
    return summarize([path], report=True, cached=False)["report"]


def span(name, cat, ts, dur, *, pid=1, tid=1, **args):
    return {"ph": "X", "name": name, "cat": cat, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


@pytest.mark.parametrize(
    ("cat", "name", "kind"),
    [
        ("POSIX", "read", IO),
        ("STDIO", "fwrite", IO),
        ("COMPUTE", "forward", COMPUTE),
        ("kernel", "void gemm<float>", COMPUTE),
        ("kernel", "ncclDevKernel_AllReduce_Sum_f32", COMM),
        ("gpu_memcpy", "Memcpy HtoD", COPY),
        ("cpu_op", "aten::mm", HOST),
        ("cpu_op", "c10d::allreduce_", HOST_COMM),
        ("user_annotation", "nccl:all_reduce", HOST_COMM),
        ("user_annotation", "enumerate(DataLoader)#_Iter.__next__", IO),
        ("phase", "backward", COMPUTE),
        ("phase", "input_wait", IO),
        ("python_function", "allreduce", OTHER),
        (None, None, OTHER),
        (5, 7, OTHER),
    ],
)
def test_kinds_of_work(cat, name, kind):
    """Category and name determine the kind of a span."""
    assert classify(cat, name) == kind


def test_direction_of_calls():
    """Names determine whether bytes were read or written; a word within another does not count."""
    assert [io_direction(name) for name in ("pread64", "fwrite", "open64", "compute", None)] == [
        "read",
        "write",
        "other",
        "other",
        "other",
    ]


def test_overlap_equals_a_count_of_microseconds(tmp_path):
    """A check of every microsecond of random spans gives the same times, also per process."""
    rng = random.Random(2)
    kinds = {"POSIX": "io", "COMPUTE": "compute", "comm": "comm", "gpu_memcpy": "copy", "misc": None}
    events = [
        span("x", rng.choice(list(kinds)), rng.randint(0, 900), rng.randint(0, 40), pid=rng.randint(1, 2))
        for _ in range(80)
    ]
    found = report(tmp_path, events)

    def expected(chosen):
        first, last = min(e["ts"] for e in chosen), max(e["ts"] + e["dur"] for e in chosen)
        count = Counter()
        for now in range(first, last):
            going_on = {kinds[e["cat"]] for e in chosen if e["ts"] <= now < e["ts"] + e["dur"]} - {None}
            count["duration_us"] += 1
            count["idle_us"] += not going_on
            for kind in going_on:
                count[f"{kind}_us"] += 1
                if kind != "compute" and "compute" not in going_on:
                    count[f"unoverlapped_{kind}_us"] += 1

        return {key: count[key] for key in found["overlap"]}

    assert found["overlap"] == expected(events)
    for row in found["processes"]:
        own = expected([event for event in events if event["pid"] == row["pid"]])
        assert {key: row[key] for key in own} == own


def test_bytes_and_bandwidth(tmp_path):
    """Sizes of reads and writes add up; the return values of open and getc are not sizes, that of fread is elements."""
    events = [
        span("read", "POSIX", 0, 100, ret=4096),
        span("read", "POSIX", 200, 300, ret=-1),
        span("write", "POSIX", 600, 100, size=1000),
        span("open64", "POSIX", 800, 400, ret=17),
        span("fread", "STDIO", 1200, 100, size=8, count=1000, ret=500),
        span("getc", "STDIO", 1300, 0, ret=101),
    ]
    io = report(tmp_path, events)["io"]

    assert (io["read_bytes"], io["write_bytes"], io["busy_us"]) == (8096, 1000, 1000)
    assert io["bytes_per_s"] == 9096 * 1e6 / 1000
    rates = {call["name"]: call["bytes_per_s"] for call in io["calls"]}
    usual = {"open64": 0.0, "read": 4096 * 1e6 / 400, "write": 1000 * 1e6 / 100}
    assert rates == usual | {"fread": 4000 * 1e6 / 100, "getc": None}


def test_devices_and_their_hosts(tmp_path):
    """If a device computes, host operators are not computing, and starting a collective is not communication."""
    events = [
        span("aten::mm", "cpu_op", 0, 1000, pid=7),
        span("c10d::allreduce_", "cpu_op", 0, 500, pid=7),
        span("gemm", "kernel", 100, 300, pid=0),
        span("ncclDevKernel_AllReduce", "kernel", 300, 200, pid=0, tid=2),
    ]
    found = report(tmp_path, events, distributedInfo={"rank": 3})

    row = found["overlap"]
    assert (row["compute_us"], row["comm_us"], row["unoverlapped_comm_us"], row["idle_us"]) == (300, 200, 100, 600)
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm", "ncclDevKernel_AllReduce"]
    assert [operator["self_us"] for operator in found["operators"]] == [500, 500]
    assert [each["rank"] for each in found["ranks"]] == [3]


def test_ranks_side_by_side(tmp_path):
    """Each rank's file is a separate row."""
    for rank, busy in ((0, 100), (1, 40)):
        events = [span("gemm", "kernel", 0, busy, pid=0), span("end", "kernel", 199, 1, pid=0)]
        (tmp_path / f"rank{rank}.json").write_text(json.dumps({"traceEvents": events}))

    ranks = summarize([tmp_path], report=True, cached=False)["report"]["ranks"]
    assert [(row["rank"], row["compute_us"], row["idle_us"]) for row in ranks] == [(0, 101, 99), (1, 41, 159)]


def test_all_files_and_processes_of_a_rank_count(tmp_path):
    """As of torch.profiler with `repeat`, and of a run that was started again in the same trace."""
    for number in range(3):
        events = [span("k", "kernel", 1000 * number, 100), span("cpu", "cpu_op", 1000 * number + 100, 20)]
        (tmp_path / f"{number}.json").write_text(json.dumps({"distributedInfo": {"rank": 1}, "traceEvents": events}))

    names = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": "rank 4 (n1)"}} for pid in (7, 8)]
    again = [span("k", "kernel", 0, 30, pid=7), span("k", "kernel", 500, 40, pid=8), *names]
    (tmp_path / "again.json").write_text(json.dumps(again))
    ranks = summarize([tmp_path], report=True, cached=False)["report"]["ranks"]

    assert [(row["rank"], row["duration_us"], row["compute_us"]) for row in ranks] == [(1, 360, 300), (4, 70, 70)]


def test_timeline_accounts_for_all_time(tmp_path):
    """Bins contain every span's start once and every busy nanosecond once."""
    rng = random.Random(4)
    events = [span("x", "POSIX", rng.randint(0, 10**7), rng.randint(0, 10**4)) for _ in range(500)]
    found = report(tmp_path, events)
    bins = found["timeline"]["bins"]

    assert len(bins) <= 60
    assert sum(each["spans"] for each in bins) == 500
    assert sum(each["io_us"] for each in bins) == pytest.approx(found["overlap"]["io_us"], abs=1e-3)
    begin, width = found["timeline"]["begin_us"], found["timeline"]["bin_us"]
    for place, each in enumerate(bins):
        low, high = begin + place * width, begin + (place + 1) * width
        assert each["spans"] == sum(low <= event["ts"] < high for event in events)


@pytest.mark.process
def test_torch_profiler_itself(tmp_path):
    """An export of torch.profiler has the counts and sums of a loop over its events, gzipped too."""
    code = (
        "import sys, torch\n"
        "from torch.profiler import profile, record_function\n"
        "with profile() as prof:\n"
        "    for _ in range(5):\n"
        "        with record_function('step'):\n"
        "            torch.ones(8, 8, requires_grad=True).mm(torch.ones(8, 8)).sum().backward()\n"
        "prof.export_chrome_trace(sys.argv[1])\n"
    )
    path = tmp_path / "trace.json.gz"
    forked.run_code(code, str(path), check=True)
    import gzip

    whole = json.loads(gzip.decompress(path.read_bytes()))
    spans = [event for event in whole["traceEvents"] if event["ph"] == "X"]
    answer = summarize([path], report=True, cached=False)

    assert answer["spans"] == len(spans)
    for group in answer["groups"]:
        own = [event["dur"] for event in spans if event["name"] == group["name"]]
        assert group["count"] == len(own)
        assert group["sum_us"] == pytest.approx(sum(own))

    steps = next(group for group in answer["groups"] if group["name"] == "step")
    assert steps["count"] == 5
    assert "aten::mm" in {operator["name"] for operator in answer["report"]["operators"]}
