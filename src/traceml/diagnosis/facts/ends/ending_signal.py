"""Signal by which another process ended the whole job, as its launcher received it; or the launcher's own death."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["END", "EndingSignal", "ending_signal_of", "scheduler_words"]

END = "end"
"""Kind of the event at the end of a run: `{"state", "status", "ended_by"}`, see `ending_signal_of`."""

_SCHEDULER = ("time_limit", "preempted", "warned", "requeued")
_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that ask for the end; by SIGINT a user stops the job by hand."""


class EndingSignal(NamedTuple):
    """A signal that ended a job, or 0 if its launcher ended without a word, as by SIGKILL."""

    number: int
    at_s: float  # epoch seconds at which the launcher received it
    sender: str = ""  # name of the program that sent it; empty if unknown
    sender_pid: int | None = None  # its process, 0 if it is outside of this container; None if unknown
    waited_s: float = 0.0  # time from the signal to the end of the job, seconds
    from_terminal: bool = False  # whether it came because the launcher's terminal was closed
    launcher_pid: int | None = None  # the launcher that ended without a word; None if it received a signal
    # why the scheduler ended the job, as `RankExit` has it; None if it did not, or did not say
    scheduler: str | None = None
    limit_s: float | None = None  # the job's time limit, seconds; None if unknown


def ending_signal_of(facts: object) -> EndingSignal | None:
    """Return the signal that a launcher has reported: `{signal, time, sender, sender_pid, from_terminal, waited_s}`.

    It may have what the scheduler said, too: see `scheduler_words`. None if it reported no signal, or one by which
    nobody ends a job. Of a launcher that is gone, its aggregator reports `{launcher_pid, time}`.
    """
    if isinstance(facts, Mapping) and isinstance(pid := facts.get("launcher_pid"), int):
        return EndingSignal(0, _seconds(facts.get("time")), launcher_pid=pid)

    if not isinstance(facts, Mapping) or facts.get("signal") not in _ENDING:
        return None

    sender, pid = facts.get("sender"), facts.get("sender_pid")
    return EndingSignal(
        number=int(facts["signal"]),
        at_s=_seconds(facts.get("time")),
        sender=sender if isinstance(sender, str) else "",
        sender_pid=pid if isinstance(pid, int) else None,
        waited_s=_seconds(facts.get("waited_s")),
        from_terminal=facts.get("from_terminal") is True,
        **scheduler_words(facts),
    )


def scheduler_words(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a launcher's report has of the scheduler: `scheduler` and `limit_s`; empty if it ended nothing."""
    if facts.get("scheduler") not in _SCHEDULER:
        return {}

    limit_s = _seconds(facts.get("limit_s"))
    return {"scheduler": facts["scheduler"]} | ({"limit_s": limit_s} if limit_s > 0 else {})


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
