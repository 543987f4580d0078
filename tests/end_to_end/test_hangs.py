"""Real jobs that hang: the sentence while they do, and after somebody has ended them."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Running, Traceml
from tests.ports import free_port
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.findings import Finding
from traceml.run_folder import STORE_NAME
from traceml.runs.find import run_folders

HANGING = Path(__file__).with_name("hanging.py")


def line_of(mark: str) -> int:
    lines = HANGING.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))


def start(traceml: Traceml, how: str, *options: str) -> Running:
    return traceml.start(
        "run", "--nproc-per-node", "2", *options, HANGING, how, TRACEML_HANG_TIMEOUT="5", OMP_NUM_THREADS="1"
    )


def live_hang(running: Running) -> dict[str, Any]:
    """Wait for the live verdict HANG and return it.

    It is not one of the start: a busy machine may start one rank seconds after the other.
    """
    latest = running.folder / "traceml_runs" / "latest"

    def found() -> dict[str, Any] | None:
        if not (latest / STORE_NAME).is_file():
            return None

        with StoreReader((latest / STORE_NAME).resolve()) as reader:
            event = reader.last_event("verdict")

        verdict = event.data["verdict"] if event is not None else {}
        return verdict if verdict.get("kind") == "HANG" and verdict.get("phase") != "startup" else None

    return dict(running.wait_for(found, "the verdict HANG", 120))


def told_line(running: Running, begin: str) -> str:
    """Wait for a line of standard error that begins so; it is printed by a process that learns of it later."""
    assert running.process.stderr is not None
    return next(line for line in running.process.stderr if line.startswith(begin))


@pytest.mark.timeout(300)
def test_a_rank_that_sleeps_is_named_with_its_line(traceml: Traceml) -> None:
    """While the job hangs; and after Ctrl-C, which both ranks get."""
    running = start(traceml, "sleep")
    verdict = live_hang(running)

    assert verdict["ranks"] == [1]
    assert (verdict["evidence"]["line"], verdict["evidence"]["function"]) == (line_of("STUCK"), "stuck")
    assert "rank 0 waits for it in" in verdict["summary"]
    assert f"(hanging.py:{line_of('BACKWARD')} train)" in verdict["summary"]

    told_line(running, f"traceml: HANG: {Finding.from_dict(verdict).headline}; ")
    os.killpg(running.process.pid, signal.SIGINT)
    report = running.end().report
    after = report["verdict"]
    assert (report["run"]["state"], after["kind"]) == ("hung", "HANG")
    assert (after["ranks"], after["evidence"]["line"]) == ([1], line_of("STUCK")), after


MUTE = """
import ctypes, time, torch
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(60):
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(0.01)
    if step == 40:
        ctypes.PyDLL(None).pause()  # with the GIL
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", [("run",), ("launch", "--hostnames", "localhost", "--workers-per-host", "1")])
def test_a_job_whose_ranks_cannot_print_is_reported_by_the_command(traceml: Traceml, command: tuple[str, ...]) -> None:
    """C code has the GIL in the only process: no thread of it runs."""
    (traceml.folder / "mute.py").write_text(MUTE)
    running = traceml.start(*command, "mute.py", TRACEML_HANG_TIMEOUT="5", OMP_NUM_THREADS="1")
    told = told_line(running, "traceml: HANG: ")
    os.killpg(running.process.pid, signal.SIGKILL)  # the rank has no other way to end
    running.end()

    # It may have no core to answer the signal with its line before the first of them is told.
    place = r"(mute\.py:11|C code that holds the GIL, waiting for a signal)"
    assert re.match(f"traceml: HANG: Rank 0 makes no progress, in {place}; `traceml report ", told), told


SEEN = re.compile(
    rf"Rank 0 is in barrier #(\d+) \(hanging\.py:{line_of('SKIPPED')} train\), rank 1 is in all_reduce #(\d+) in "
    rf"backward \(hanging\.py:{line_of('BACKWARD')} train\)"
)


@pytest.mark.timeout(300)
def test_a_collective_on_one_rank_is_a_different_path(traceml: Traceml) -> None:
    """Rank 0 is in a barrier, rank 1 in the next backward; after SIGTERM, which no rank can be blamed for."""
    running = start(traceml, "skip")
    verdict = live_hang(running)
    os.killpg(running.process.pid, signal.SIGTERM)
    ended = running.end()

    for seen in (verdict, ended.report["verdict"]):
        assert (seen["kind"], seen["evidence"]["cause"]) == ("HANG", "mismatch"), seen
        barrier, reduction = SEEN.search(seen["summary"]).groups()
        assert barrier == reduction, seen


@pytest.mark.timeout(300)
def test_a_rank_with_fewer_batches_waits_in_the_barrier(traceml: Traceml) -> None:
    """Its data has ended, and that of the other one has not: both lines are told, and both numbers of batches."""
    running = start(traceml, "uneven")
    verdict = live_hang(running)
    os.killpg(running.process.pid, signal.SIGINT)
    ended = running.end()

    for seen in (verdict, ended.report["verdict"]):
        assert (seen["evidence"]["cause"], seen["ranks"]) == ("data_ended", [1]), seen
        assert "its data ended (40 batches, the others 41)" in seen["summary"]
        assert f"(hanging.py:{line_of('BARRIER')} train)" in seen["summary"]
        assert f"(hanging.py:{line_of('BACKWARD')} train)" in seen["summary"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", [("run", "--nproc-per-node"), ("launch", "--workers-per-host")])
def test_a_hung_job_is_ended_where_that_is_wanted(traceml: Traceml, command: tuple[str, str]) -> None:
    """Its report is written, and its status is not 0."""
    name, ranks = command
    running = traceml.start(
        name, ranks, "2", "--kill-after-report", HANGING, "sleep", TRACEML_HANG_TIMEOUT="5", OMP_NUM_THREADS="1"
    )
    ended = running.end(200)

    assert ended.status != 0
    assert ended.report["run"]["state"] == "hung"
    assert ended.report["verdict"]["ranks"] == [1]
    assert ended.report["verdict"]["evidence"]["line"] == line_of("STUCK")
    assert "HANG" in ended.stderr


LEAVES_A_THREAD = """
import queue, signal, sys, threading, torch

def consume():
    queue.Queue().get()

signal.signal(signal.SIGINT, signal.default_int_handler)
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
threading.Thread(target=consume).start()
for _ in range(40):
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()

sys.exit(0)
"""


@pytest.mark.timeout(300)
def test_an_end_that_waits_for_a_thread_has_hung(traceml: Traceml) -> None:
    """Python ignores the interrupt by which the user ends it, and leaves with status 0."""
    script = traceml.folder / "leaves.py"
    script.write_text(LEAVES_A_THREAD)
    running = traceml.start("run", script, TRACEML_HANG_TIMEOUT="5")
    live = live_hang(running)
    os.killpg(running.process.pid, signal.SIGINT)
    ended = running.end()

    assert (ended.status, ended.report["run"]["state"]) == (0, "hung")
    for seen in (live, ended.report["verdict"]):
        assert "waiting for its thread 'Thread-1 (consume)' in leaves.py:5 consume" in seen["summary"]


ONE_NEVER_COMES = """
import datetime, sys, time
import torch.distributed as dist
import torch.multiprocessing as mp

def train(rank, address, late_s):
    time.sleep(rank * late_s)
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20)
    )

if __name__ == "__main__":
    mp.spawn(train, (f"tcp://127.0.0.1:{sys.argv[1]}", 600.0), nprocs=2)
"""


@pytest.mark.timeout(300)
def test_processes_of_mp_spawn_that_do_not_meet_are_ranks_of_one_run(traceml: Traceml) -> None:
    """They have made no optimizer yet, and no group; the one that waits says how many should come."""
    script = traceml.folder / "meets.py"
    script.write_text(ONE_NEVER_COMES)

    ended = traceml("run", script, str(free_port()), TRACEML_HANG_TIMEOUT="5")

    verdict = ended.report["verdict"]
    assert (verdict["kind"], verdict["ranks"], ended.report["run"]["world_size"]) == ("HANG", [1], 2)
    assert "rank 0 in init_process_group in start-up (meets.py:8 train); rank 1 did not answer" in verdict["summary"]
    assert len(run_folders(traceml.folder / "traceml_runs")) == 1
