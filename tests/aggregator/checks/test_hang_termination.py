"""The end of hung jobs, by a run of stand-ins."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from traceml.aggregator.checks import hang_termination
from traceml.aggregator.checks.hang_termination import HungJobs
from traceml.aggregator.live_rows import LiveRows
from traceml.clock import process_start_ticks


def run_of(*streams: Any, attempt: int = 0) -> Any:
    live = LiveRows(1)
    live.set_hang_rule(60.0, aborts=True)
    return SimpleNamespace(
        id="run",
        path=None,
        attempt=attempt,
        ended=False,
        streams=streams,
        connected=(),
        connected_ranks=(),
        live=live,
        store=SimpleNamespace(event=lambda *_: None),
        commit=lambda **_: None,
    )


class Run:
    """Hashable, as the runs of an aggregator are."""


def stream_of(pid: int) -> Any:
    incarnation = SimpleNamespace(pid=pid, start_ticks=process_start_ticks(pid))
    return SimpleNamespace(incarnation=incarnation, ended=False, pid_here=pid, peer=None)


def test_each_attempt_that_hangs_is_ended_once(monkeypatch):
    """The verdict may be that of the attempt before, until the next one has had time to hang."""
    now = [1000.0]
    monkeypatch.setattr(hang_termination.time, "monotonic", lambda: now[0])
    jobs, run = HungJobs(None), Run()
    run.__dict__.update(vars(run_of()))

    assert jobs.is_due(run)
    assert not jobs.is_due(run)
    run.attempt = 1
    assert not jobs.is_due(run)
    now[0] += 100
    assert jobs.is_due(run)
    assert not jobs.is_due(run)


def test_a_process_that_has_just_ended_does_not_save_the_others(monkeypatch):
    """Its own programs are asked to end first, which takes time."""
    killed: list[int] = []

    def kill(pid: int, _signal: int) -> None:
        killed.append(pid)
        if pid == os.getpid():
            raise ProcessLookupError

    monkeypatch.setattr(hang_termination.os, "kill", kill)
    monkeypatch.setattr(hang_termination, "end_started_processes", lambda _pid: None)
    abort_at_once(monkeypatch, run_of(stream_of(os.getpid()), stream_of(os.getppid())))

    assert killed == [os.getpid(), os.getppid()]


def test_a_run_that_ends_while_its_report_is_written_is_not_ended(monkeypatch):
    """Its store is closed then."""
    killed: list[int] = []
    run = run_of(stream_of(os.getpid()))
    run.store.event = None
    monkeypatch.setattr(hang_termination, "_kill", killed.append)

    abort_at_once(monkeypatch, run, lambda _path: setattr(run, "ended", True))

    assert killed == []


def abort_at_once(monkeypatch, run, report=None, meanwhile=lambda: None) -> None:
    """End a run, without the time in which its processes may end by themselves."""

    async def sleep(_seconds: float) -> None:
        meanwhile()

    monkeypatch.setattr(hang_termination.asyncio, "sleep", sleep)
    monkeypatch.setattr(hang_termination, "UnconnectedRanks", lambda _run: SimpleNamespace(find=list))
    monkeypatch.setattr(hang_termination, "snapshots_from_outside", lambda *_, **__: asyncio.to_thread(dict))
    asyncio.run(HungJobs(report).abort(run))


@pytest.mark.parametrize("restarts", [False, True])
def test_processes_of_the_next_attempt_are_not_killed(restarts, monkeypatch):
    """The launcher may have started it before the time is over in which the hung ones may end by themselves."""
    killed: list[int] = []
    stream = stream_of(os.getpid())
    run = run_of(stream)

    def restart() -> None:
        if restarts:
            stream.incarnation = SimpleNamespace(pid=os.getppid(), start_ticks=5)
            monkeypatch.setattr(hang_termination, "process_start_ticks", lambda pid: {os.getpid(): None}.get(pid, 5))

    monkeypatch.setattr(hang_termination, "_kill", killed.append)
    abort_at_once(monkeypatch, run, meanwhile=restart)

    assert killed == ([] if restarts else [os.getpid()])
