"""Durations while the wall clock jumps."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from tests.runs.fabricated_store import STARTED, add_rank, run_facts
from traceml.clock import SteadyClock, boot_id, monotonic_ns, process_start_ticks
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report

DAY = 86400.0


def store(folder: Path, clock: SteadyClock, ends_ns: int = 0, **watched: Any) -> Path:
    """Write a run that no aggregator has ended, with 30 steps up to a stamp of the monotonic clock."""
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(started=STARTED, ended=None, state="running", clock=clock.facts))
        gone = {"host": socket.gethostname(), "boot_id": boot_id(), "pid": 2**22 + 1, "start_ticks": 1}
        writer.put_meta("aggregator", gone | watched)
        rows = rows_of(Job(steps=30, ranks=1))[0]
        rows["t_end_ns"] = ends_ns - (29 - np.arange(30)) * 10**8
        add_rank(writer, 0, rows if ends_ns else rows[:0], state="running", boot_id=boot_id())

    return folder


@pytest.mark.parametrize("jump_s", [-2 * DAY, 3600.0])
def test_a_running_run_counts_by_the_monotonic_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    clock = SteadyClock(monotonic_ns() - 60 * 10**9, int(STARTED * 1e9), boot_id())
    alive = {"pid": os.getpid(), "start_ticks": process_start_ticks(os.getpid())}
    run_dir = store(tmp_path / "run", clock, **alive)
    monkeypatch.setattr(time, "time", lambda: STARTED + 60 + jump_s)

    run = build_report(run_dir).run

    assert run.state == "running"
    assert run.ended is None
    assert run.duration_s == pytest.approx(60, abs=30)


@pytest.mark.parametrize("jump_s", [-2 * DAY, 0.0, 3600.0])
def test_a_lost_run_ended_with_its_last_row(tmp_path: Path, jump_s: float) -> None:
    """The date of the file's last write depends on the wall clock, the rows' stamps do not."""
    now = monotonic_ns()
    clock = SteadyClock(now - 60 * 10**9, int(STARTED * 1e9), boot_id())
    run_dir = store(tmp_path / "run", clock, ends_ns=now - 20 * 10**9)
    for path in run_dir.iterdir():
        os.utime(path, (STARTED + 45 + jump_s, STARTED + 45 + jump_s))

    run = build_report(run_dir).run

    assert run.state == "lost"
    assert run.duration_s == pytest.approx(40)
    assert run.ended == pytest.approx(STARTED + 40)


def test_a_lost_run_without_rows_never_ends_before_its_start(tmp_path: Path) -> None:
    clock = SteadyClock(monotonic_ns(), int(STARTED * 1e9), boot_id())
    run_dir = store(tmp_path / "run", clock)
    for path in run_dir.iterdir():
        os.utime(path, (STARTED - DAY, STARTED - DAY))

    assert (build_report(run_dir).run.ended, build_report(run_dir).run.duration_s) == (STARTED, 0.0)
