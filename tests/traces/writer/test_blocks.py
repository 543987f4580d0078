"""Behavior of the block writer under kills, full disks and high rates."""

from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter

import pytest

from tests.eventually import eventually
from traceml import traces

_BUSY = """
import sys, time
from traceml import traces
trace = traces.Writer(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    with trace.span("work", number=number):
        pass
"""


def whole_members(data: bytes) -> tuple[list[bytes], int]:
    """Return the complete members, and the number of bytes after the last of them."""
    members = []
    while data:
        unpacker = zlib.decompressobj(31)
        try:
            text = unpacker.decompress(data)
        except zlib.error:
            break

        if not unpacker.eof:
            break

        members.append(text)
        data = unpacker.unused_data

    return members, len(data)


@pytest.mark.process
@pytest.mark.parametrize("suffix", ["pfw.gz", "pfw", "json"])
def test_killed_writer_leaves_what_it_wrote(tmp_path, suffix):
    """After SIGKILL all blocks except possibly the last are readable, and none is missing in between."""
    path = tmp_path / f"trace.{suffix}"
    process = subprocess.Popen([sys.executable, "-c", _BUSY, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    eventually(lambda: path.stat().st_size >= 100_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    data = path.read_bytes()
    if suffix == "pfw.gz":
        members, _ = whole_members(data)
        assert len(members) >= 2
        lines = b"".join(members).splitlines()
    else:
        lines = [line.rstrip(b",") for line in data.splitlines() if line not in (b"[", b"]")]
        lines = lines if lines[-1].endswith(b"}") else lines[:-1]

    spans = [event for event in map(json.loads, lines) if event["ph"] == "X"]
    assert [span["args"]["number"] for span in spans] == list(range(1, len(spans) + 1))
    assert len(spans) >= 2_000


@pytest.mark.process
def test_full_disk_is_survived(tmp_path):
    """Events that the disk does not accept are counted and reported as lost; the file stays valid."""
    path = tmp_path / "trace.pfw.gz"
    code = (
        "import sys, resource, logging; from traceml import traces\n"
        "logging.basicConfig()\n"
        "trace = traces.Writer(sys.argv[1])\n"
        "trace.instant('before'); trace.flush()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for i in range(20_000): trace.instant(f'x{i}')\n"
        "trace.close(); print(trace.statistics.lost, trace.statistics.written)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)

    lost, written = map(int, done.stdout.split())
    assert lost + written == 20_003
    assert lost >= 10_000
    assert done.stderr.count("cannot write the trace") == 1
    members, rest = whole_members(path.read_bytes())
    assert rest == 0
    assert sum(len(member.splitlines()) for member in members) == written


def test_full_disk_leaves_an_array_closed(tmp_path):
    """A JSON array is valid again after a block that did not fit."""
    path = tmp_path / "trace.json"
    trace = traces.Writer(path)
    trace.instant("before")
    trace.flush()
    size = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, before[1]))
    try:
        for number in range(1_000):
            trace.instant(f"lost {number}")
        trace.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    trace.instant("after")
    trace.close()

    names = Counter(event["name"].split()[0] for event in json.loads(path.read_bytes()))
    assert (names["before"], names["after"], names["lost"]) == (1, 1, 0)
    assert trace.statistics.lost == 1_000


def test_memory_is_bounded(tmp_path):
    """At any rate of events, no more than the limit are pending; a thread that adds too many writes them."""
    with traces.Writer(tmp_path / "trace.pfw.gz") as trace:
        most = 0
        for _ in range(100_000):
            trace.write_span("x", 0, 1, pid=1, tid=1)
            most = max(most, trace.statistics.pending) if most < 70_000 else most

        assert most <= 65_536

    assert trace.statistics.written == 100_000


def test_events_after_the_end_are_counted(tmp_path, caplog):
    """A closed writer accepts no events, raises nothing, and counts the loss."""
    trace = traces.Writer(tmp_path / "trace.pfw")
    trace.close()
    with caplog.at_level(logging.WARNING, "traceml"):
        with trace.span("late"):
            pass
        trace.close()

    assert trace.statistics.lost == 3  # with the names of process and thread
    assert (tmp_path / "trace.pfw").read_bytes() == b""


def test_idle_writer_writes_soon(tmp_path):
    """A single event is written without further calls."""
    path = tmp_path / "trace.pfw"
    trace = traces.Writer(path)
    trace.instant("x")
    eventually(lambda: path.stat().st_size > 0)
    trace.close()


def test_without_a_thread_blocks_are_written_by_those_that_add_events(tmp_path):
    """The system gives no thread with such a stack; the traced program is not affected."""
    before = threading.stack_size(1 << 46)
    try:
        trace = traces.Writer(tmp_path / "trace.pfw")
        for _ in range(20_000):
            with trace.span("work"):
                pass
    finally:
        threading.stack_size(before)

    assert trace.statistics.written > 16_000
    trace.close()
    assert (tmp_path / "trace.pfw").read_text().count('"ph":"X"') == 20_000


def test_the_writers_thread_takes_no_signal_of_the_script(tmp_path):
    """A script may block one, and wait for it in its own threads: another thread that took it would end the process."""
    with traces.Writer(tmp_path / "trace.pfw") as trace:
        with trace.span("work"):
            pass

        named = (each for each in threading.enumerate() if each.name == "traceml-trace-writer")
        blocked = [_blocked(each.native_id) for each in named]

    assert blocked
    assert all(signal.SIGTERM in each and signal.SIGSEGV not in each for each in blocked)


def _blocked(thread):
    with open(f"/proc/self/task/{thread}/status") as status:
        mask = int(next(line for line in status if line.startswith("SigBlk")).split()[1], 16)

    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}
