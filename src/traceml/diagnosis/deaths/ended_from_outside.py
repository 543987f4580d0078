"""Jobs that another process ended as a whole: a scheduler, a preemption, a kill command, a closed session."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from traceml.diagnosis.deaths.end_words import step_text
from traceml.diagnosis.deaths.scheduler_ends import advice_on, failed_before, lost_steps, lost_steps_text
from traceml.diagnosis.facts.ends.ending_signal import EndingSignal
from traceml.diagnosis.facts.ends.rank_exit import RankExit, ended_badly
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding, known
from traceml.diagnosis.kinds import Kind, Severity
from traceml.formatting import duration_text
from traceml.process_ends import signal_name

__all__ = ["ended_from_outside"]

_LATE_S = 600.0  # a script that goes on for longer, and then ends well, has ignored the signal
_SENDERS = (
    (("slurm",), "Ask Slurm why: sacct -j JOBID -o State,ExitCode,Elapsed (CANCELLED, PREEMPTED, TIMEOUT)"),
    (("timeout",), "The command `timeout` ended it: give it more time"),
    (("systemd-oomd", "earlyoom"), "It ends programs when the host lacks memory: use less, or a host with more"),
    (("systemd", "init"), "Its unit was stopped, its session was closed, or the machine shuts down"),
    (("pbs", "sge", "lsf", "res", "condor"), "Ask the scheduler why it ended the job"),
)
_OUTSIDE = "A container is ended by its runtime: a deleted or evicted pod, a preempted node, docker stop"
_HANG_UP = "The terminal or the ssh session was closed: start the run in tmux or screen, or with setsid"
_UNKNOWN = "Find out what sent it: a scheduler's limit or preemption, or a kill command"


def ended_from_outside(causes: Sequence[RankExit], facts: JobFacts) -> list[Finding]:
    """Return the finding about a job that its launcher was asked to end; empty where a rank had failed before.

    Args:
        causes: ends of ranks that nothing else explains.
    """
    by = facts.ended_by
    if by is None or failed_before(causes, by):
        return []

    returned = not ended_badly(facts.exits)
    if returned and by.waited_s > _LATE_S:
        return []

    last = max(facts.exits, key=lambda each: each.last_step or 0, default=RankExit(rank=0))
    lost = lost_steps(last, facts.exits)
    return [
        Finding.of(
            Kind.RANK_LOST,
            severity=Severity.WARNING if returned else None,
            phase=None if returned else last.open_phase,
            summary=_summary(by, last, returned=returned) + f"{lost_steps_text(lost)}.",
            next=f"{_reason(by)}. {_SAVED if lost == 0 else _ADVICE}"
            if by.scheduler is None
            else advice_on(by.scheduler),
            evidence=_evidence(by, last, lost),
            cost_share=1.0,
        )
    ]


_ADVICE = "Save a checkpoint on the signal, or often, and resume from the last one."
_SAVED = "Resume from the checkpoint, which has all steps."


def _summary(by: EndingSignal, last: RankExit, *, returned: bool) -> str:
    name = f"{signal_name(by.number)} from {_sender(by)}"
    if returned:
        after = f", {duration_text(by.waited_s)} later" if by.waited_s else ""
        return f"{name} asked the job to end, and it exited on its own{after}{step_text(last)}"

    return f"{name} ended the job{step_text(last)}"


def _sender(by: EndingSignal) -> str:
    if by.sender_pid == 0:
        return "outside the container"

    if by.sender_pid is None:
        return "another process" if by.number != signal.SIGHUP else "the terminal"

    return f"{by.sender or 'a program that has ended'} (process {by.sender_pid})"


def _reason(by: EndingSignal) -> str:
    if by.sender_pid == 0:
        return _OUTSIDE

    known = (text for names, text in _SENDERS if by.sender.startswith(names))
    return next(known, _HANG_UP if by.number == signal.SIGHUP else _UNKNOWN)


def _evidence(by: EndingSignal, last: RankExit, lost: int | None) -> dict[str, object]:
    return known(
        cause="ended_from_outside",
        signal=by.number,
        sender=by.sender or None,
        sender_pid=by.sender_pid,
        step=last.step,
        last_step=last.last_step,
        lost_steps=lost,
    )
