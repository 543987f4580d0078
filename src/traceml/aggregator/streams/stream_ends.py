"""Ends of ranks and of runs, by the reports of the launcher, flight files and the ranks themselves."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec.structs import replace

from traceml.aggregator.streams.stream import RankStream, StreamState
from traceml.database.flight.flight_header import FlightState
from traceml.database.flight.postmortem import FlightSnapshot
from traceml.database.schema import Slot
from traceml.database.states import RunStatus
from traceml.diagnosis.deaths.ended_jobs import ended_with_job
from traceml.diagnosis.deaths.lost_ranks import was_stopped
from traceml.diagnosis.facts.ends import EndingSignal, RankExit, ended_badly, scheduler_words
from traceml.inspection.crash_stacks import crash_facts
from traceml.transport.exit_report import ExitReport

__all__ = ["final_state", "note_exit", "note_flight", "note_host_lost", "note_oom", "resumed_at", "state_of_dead"]

# Exit status of a job that was ended from outside before its ranks had started.
_STOPPED_STATUS = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}


def note_exit(stream: RankStream, report: ExitReport) -> None:
    """Add the launcher's report of its end to a stream."""
    code = report.exitcode or 0
    stream.exit |= {"signal": -code} if code < 0 else {"code": code}
    stream.reported_dead = stream.incarnation.pid == report.pid
    if report.stopped:
        stream.exit["stopped"] = True

    if report.flight:
        stream.reported_flight = Path(report.flight)

    if report.time is not None:
        stream.exit["reported_s"] = report.time

    if report.oom is not None:
        stream.exit["oom"] = report.oom

    stream.exit |= scheduler_words(report.to_message())
    if report.crash:
        stream.exit = {**crash_facts(report.crash), **stream.exit}


def note_host_lost(stream: RankStream, report: ExitReport) -> None:
    """Add to a stream that its launcher has lost the host; where it was ending the rank, that is no failure."""
    stream.exit["host_lost"] = report.lost
    if report.stopped:
        stream.exit["stopped"] = True


def note_oom(stream: RankStream) -> None:
    """Add to a stream that ended badly whether the kernel killed it for lack of memory."""
    ended = stream.exit
    if "oom" in ended or stream.oom_watch is None or ended.get("stopped"):
        return

    by_signal = ended.get("signal") == signal.SIGKILL or bool(ended.get("process_gone"))
    if by_signal and (where := stream.oom_watch.killed()):
        ended["oom"] = where


def resumed_at(stream: RankStream, place: int, streams: Iterable[RankStream]) -> int:
    """Return the steps in the newest checkpoint that an earlier attempt of a job has saved in a folder; 0 without one.

    Args:
        stream: of the rank that reads it.
    """
    saved = [each for each in streams if each.attempt < stream.attempt and each.exit.get("saved_in") == place]
    before = [each for each in saved if each.rank == stream.rank] or saved  # each rank may save its own
    newest = max((each.attempt for each in before), default=-1)
    return max((each.resumes_at + each.exit["saved_steps"] for each in before if each.attempt == newest), default=0)


def note_flight(stream: RankStream, image: FlightSnapshot) -> None:
    """Add what the flight file of a dead process shows: its launcher may report the end when the file is gone."""
    in_loop = image.open_phase[0] is not None or image.slot(Slot.ITERATING) > 0
    stream.flight_state = image.state
    if not image.slot(Slot.EXIT_START) and image.state is not FlightState.FINISHED:
        stream.exit["skipped_exit"] = True
        stream.was_in_loop = in_loop and image.open_step is not None


def state_of_dead(stream: RankStream, world_size: int) -> StreamState:
    """Return the final state of a dead process, by the reports of its launcher and its flight file.

    Args:
        world_size: ranks of the job. Of several, the others show whether one that left by os._exit(0) is missed.
    """
    if stream.exit.get("signal"):
        return StreamState.KILLED

    if stream.exit.get("code") or stream.exit.get("exception") or stream.flight_state is FlightState.FAILED:
        return StreamState.FAILED

    if stream.state is StreamState.FINISHED or stream.flight_state is FlightState.FINISHED:
        return StreamState.FINISHED

    if stream.exit.get("code") != 0 or (world_size == 1 and stream.was_in_loop):
        return StreamState.LOST

    return StreamState.FINISHED


def final_state(members: Sequence[RankStream], status: int | None, by: EndingSignal | None = None) -> str:
    """Return the state of a run that is over: finished, stopped, failed or lost.

    Args:
        members: the ranks of its last attempt.
        by: the signal that ended the job, as its launcher reports it.
    """
    states = {stream.state for stream in members}
    exits = [RankExit.from_facts(stream.rank, str(stream.state), stream.exit) for stream in members]
    exits = [replace(ended, stopped=True) if ended_with_job(ended, by) else ended for ended in exits]
    if was_stopped(exits) or (status in _STOPPED_STATUS and not ended_badly(exits)):
        return RunStatus.STOPPED.value

    if status or states & {StreamState.FAILED, StreamState.KILLED}:
        return RunStatus.FAILED.value

    return RunStatus.LOST.value if StreamState.LOST in states else RunStatus.FINISHED.value
