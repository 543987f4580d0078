"""Jobs that were ended as a whole, by the scheduler or another process; and the steps that an end loses."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import NamedTuple

from traceml.database.states import RunStatus
from traceml.diagnosis.deaths.end_wording import in_common, step_text, whereabouts
from traceml.diagnosis.facts.ends import EndingSignal, RankExit, ended_badly
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Explanation, Finding, known_facts
from traceml.diagnosis.kinds import Kind, Severity
from traceml.formatting import capitalized, count_text, duration_text, left_text, plural, ranks_text
from traceml.process_ends import signal_name

__all__ = [
    "end_by_scheduler", "ended_by_scheduler", "ended_from_outside", "ended_with_job", "lost_steps", "lost_steps_text",
]  # fmt: skip

# A scheduler ends a job at its limit, and may warn it before: Slurm with --signal=USR2@120.
_EARLY_S = {
    signal.SIGTERM: 60.0,
    signal.SIGKILL: 30.0,
    signal.SIGXCPU: 60.0,
    signal.SIGUSR1: 900.0,
    signal.SIGUSR2: 900.0,
}

_WAITING = ("backward", "comm")  # phases in which ranks wait for each other
_LONG_S, _LONG_STEPS = 60.0, 5.0  # of an open step: seconds, and steps of the mean length that the run allows for
_CLOCKS_S = 0.5  # clocks of hosts differ a little
# A scheduler signals all processes of a job, the launcher not always first; a rank's last beat is a second older.
_SAME_SIGNAL_S = 5.0
_LATE_S = 600.0  # a script that continues for longer, and then ends well, has ignored the signal
# Names of programs, or how the names of a product's programs begin.
_SENDERS = (
    ((), ("slurm",), "Ask Slurm why: sacct -j JOBID -o State,ExitCode,Elapsed (CANCELLED, PREEMPTED, TIMEOUT)"),
    (("timeout",), (), "The command `timeout` ended it: give it more time"),
    (("systemd-oomd", "earlyoom"), (), "It ends programs when the host lacks memory: use less, or a host with more"),
    (("init",), ("systemd",), "Its unit was stopped, its session was closed, or the machine shuts down"),
    (("res", "sbatchd"), ("pbs_", "sge_", "lsf", "condor"), "Ask the scheduler why it ended the job"),
)
_OUTSIDE = "A container is ended by its runtime: a deleted or evicted pod, a preempted node, docker stop"
_HANG_UP = "The terminal or the ssh session was closed: start the run in tmux or screen, or with setsid"
_LAUNCHER = (
    "Find out what killed the launcher: `kill -9`, the limit of a job or a container, or the kernel for lack of memory "
    "(dmesg)"
)
_UNKNOWN = "Find out what sent it: a scheduler's limit or preemption, or a kill command"
_ADVICE = "Save a checkpoint on the signal, or often, and resume from the last one."
_NO_WARNING = "Save checkpoints often, and resume from the last one."
_SAVED = "Resume from the checkpoint, which has all steps."


class _Words(NamedTuple):
    what: str
    next: str


_CAUSES = {
    "time_limit": _Words(
        "ended the job at its time limit",
        "Ask for more time, and resume from the last checkpoint. To lose fewer steps, save when the scheduler "
        "warns: sbatch --signal=USR2@120 sends a signal two minutes before the end.",
    ),
    "preempted": _Words(
        "preempted the job",
        "Resume from the last checkpoint: `traceml launch --submit` and sbatch --requeue queue the job again. To lose "
        "fewer steps, save more often, or on SIGTERM and the signal of sbatch --signal, if the partition gives a grace "
        "time.",
    ),
    "warned": _Words(
        "warned the job of its time limit, and the job ended",
        "Ask for more time, or resume from the last checkpoint: `traceml launch --submit` queues the job again.",
    ),
    "requeued": _Words(
        "ended the job to queue it again",
        "It resumes from the last checkpoint when it starts again. To lose fewer steps, save more often.",
    ),
    "cancelled": _Words(
        "ended the job",
        "It was cancelled (scancel), or lost a node: sacct -j JOBID -o State,ExitCode,Elapsed tells which. Resume from "
        "the last checkpoint.",
    ),
}


def ended_by_scheduler(bad: Sequence[RankExit], causes: Sequence[RankExit], facts: JobFacts) -> Finding | None:
    """Return the finding about a job that its scheduler ended; None if another cause came before.

    Args:
        bad: the ends that are failures.
        causes: those that caused the others.
    """
    by, found = facts.ended_by, end_by_scheduler(bad, causes, facts.job_end_s)
    if by is not None and by.scheduler is not None and bad and not _failed_before(causes, by):  # by its own words
        found = max(bad, key=lambda each: each.last_step or 0), by.scheduler

    if found is None:
        return None

    last, cause = in_common(found[0], _with_phase(facts)), found[1]
    lost, limit_s = lost_steps(last, facts.exits), _limit_s(cause, last, facts)
    waiting = _waiting(facts)
    did = f"{_CAUSES[cause].what}{'' if limit_s is None else f' of {left_text(limit_s)}'}"
    return Finding.of(
        Kind.RANK_LOST,
        phase=last.open_phase,
        summary=f"The scheduler {did}{_how(last)}{step_text(last)}{lost_steps_text(lost)}.{waiting.text}",
        next=_CAUSES[cause].next,
        evidence=_evidence(
            last, lost, cause=cause, limit_s=limit_s, signal=last.signal, code=last.code, **waiting.evidence
        ),
        cost_share=1.0,
    )


def end_by_scheduler(
    bad: Sequence[RankExit], causes: Sequence[RankExit], job_end_s: float | None
) -> tuple[RankExit, str] | None:
    """Return the rank that came furthest and the cause, if the scheduler ended a job; None if something else did.

    Args:
        job_end_s: epoch second of the job's time limit; None if it is not known.
    """
    ended = [each for each in causes or bad if _cause(each, job_end_s)]
    if not ended or len(ended) < len(causes or bad):
        return None

    last = max(ended, key=lambda each: each.last_step or 0)
    return last, str(_cause(last, job_end_s))


def _with_phase(facts: JobFacts) -> list[RankExit]:
    return [ended for ended in facts.exits if ended.open_phase]


def _failed_before(causes: Sequence[RankExit], by: EndingSignal) -> bool:
    """Return whether a rank had failed by itself when the job was asked to end."""
    # Ranks that a killed launcher takes with it tell nothing of their end.
    known = [ended for ended in causes if by.launcher_pid is None or ended.state != "lost"]
    known = [ended for ended in known if not ended_with_job(ended, by)]
    return any(ended.at_s is not None and ended.at_s < by.at_s - _CLOCKS_S for ended in known)


def ended_with_job(ended: RankExit, by: EndingSignal | None) -> bool:
    """Return whether a rank got the signal that ended the job, as its launcher did, or was lost at that time."""
    if by is None or not by.number or ended.at_s is None:
        return False

    may_be_of_signal = ended.signal == by.number or (ended.state == "lost" and ended.code is None)
    return may_be_of_signal and ended.at_s > by.at_s - _SAME_SIGNAL_S


def lost_steps(ended: RankExit, exits: Sequence[RankExit]) -> int | None:
    """Return the steps that ended since the last checkpoint of any rank; None if none was saved."""
    saved = max((each.saved_steps for each in exits if each.saved_steps is not None), default=None)
    if saved is None or ended.last_step is None:
        return None

    return max(ended.last_step + 1 - saved, 0)


def lost_steps_text(lost: int | None) -> str:
    """Return what a sentence says of lost steps; empty if there are none, or that is not known."""
    if not lost:
        return ""

    return f"; {plural(lost, 'step')} since the last checkpoint {'is' if lost == 1 else 'are'} lost"


def _cause(ended: RankExit, job_end_s: float | None) -> str | None:
    """Return why the scheduler ended a rank: by its own words, else by the time; None if it did not."""
    # Ranks that did not report are ended by SIGKILL, which comes last.
    number = ended.signal if ended.signal is not None else signal.SIGKILL if ended.state == "lost" else None
    if ended.oom:
        return None

    if ended.scheduler in _CAUSES and ended.exception is None:
        return ended.scheduler if number in _EARLY_S or (number is None and ended.code) else None

    if job_end_s is None or number not in _EARLY_S or ended.at_s is None:
        return None

    return "time_limit" if ended.at_s >= job_end_s - _EARLY_S[signal.Signals(number)] else None


def _limit_s(cause: str, last: RankExit, facts: JobFacts) -> float | None:
    """Return the time limit that a job has reached, by the scheduler's own words where it was asked."""
    if cause != "time_limit":
        return None

    reported_s = None if facts.ended_by is None else facts.ended_by.limit_s
    return reported_s or last.limit_s or facts.job_limit_s


def _how(ended: RankExit) -> str:
    """Return the signal or the exit code; empty if nobody has seen it, as without a launcher."""
    if ended.signal is not None:
        return f" ({signal_name(ended.signal)})"

    return f" (exit code {ended.code})" if ended.code else ""


def _evidence(ended: RankExit, lost: int | None, **more: object) -> dict[str, object]:
    return known_facts(**more, step=ended.step, last_step=ended.last_step, lost_steps=lost)


def ended_from_outside(causes: Sequence[RankExit], facts: JobFacts) -> Finding | None:
    """Return the finding about a job that its launcher was asked to end, or took with it when it was killed.

    None where a rank had failed before.

    Args:
        causes: ends of ranks that nothing else explains.
    """
    by = facts.ended_by
    if by is None or _failed_before(causes, by):
        return None

    returned = not ended_badly(facts.exits)
    goes_on = facts.state == RunStatus.RUNNING  # scripts may handle or ignore the signal of a launcher that is gone
    if returned and (by.waited_s > _LATE_S or (by.launcher_pid is not None and (facts.exits or goes_on))):
        return None

    last = max(facts.exits, key=lambda each: each.last_step or 0, default=RankExit(rank=0))
    last = in_common(last, _with_phase(facts))
    lost, waiting = lost_steps(last, facts.exits), _waiting(facts)
    return Finding.of(
        Kind.RANK_LOST,
        severity=Severity.WARNING if returned and by.launcher_pid is None else None,
        phase=None if returned else last.open_phase,
        summary=f"{_outside_summary(by, last, returned=returned)}{lost_steps_text(lost)}.{waiting.text}",
        next=f"{_for_sender(by)}. {_to_resume(by, lost)}" if by.scheduler is None else _CAUSES[by.scheduler].next,
        evidence=_evidence(
            last,
            lost,
            cause="ended_from_outside",
            signal=by.number or None,
            sender=by.sender or None,
            sender_pid=by.sender_pid,
            launcher_pid=by.launcher_pid,
            **waiting.evidence,
        ),
        cost_share=1.0,
    )


def _outside_summary(by: EndingSignal, last: RankExit, *, returned: bool) -> str:
    if by.launcher_pid is not None:
        which = f"The job's launcher (process {by.launcher_pid})"
        return f"{which} was killed or crashed, and the job ended with it{step_text(last)}"

    name = f"{signal_name(by.number)} from {_sender(by)}"
    if returned:
        after = f", {duration_text(by.waited_s)} later" if by.waited_s else ""
        return f"{name} asked the job to end, and it exited on its own{after}{step_text(last)}"

    return f"{name} ended the job{step_text(last)}"


def _waiting(facts: JobFacts) -> Explanation:
    """Return a sentence on ranks that had waited long for others, which were elsewhere; empty without such ranks.

    A job that seems to hang is ended by hand, or by its time limit.
    """
    waiting = [each for each in facts.exits if each.open_phase in _WAITING and _is_long(each, facts)]
    elsewhere = whereabouts(each for each in facts.exits if each.open_phase not in (*_WAITING, "exit"))
    if not waiting or not elsewhere:
        return Explanation()

    longest = max(waiting, key=lambda each: each.open_s or 0.0)
    ranks = capitalized(ranks_text(sorted(each.rank for each in waiting)))
    passed = duration_text(longest.open_s or 0.0)
    text = f" {ranks} had been in step {count_text(longest.step)} for {passed}; meanwhile {elsewhere}."
    return Explanation(text, evidence={"waiting_step": longest.step})


def _is_long(ended: RankExit, facts: JobFacts) -> bool:
    """Return whether the open step of a rank had taken far longer than its steps before could have."""
    if not ended.in_step or ended.open_s is None or ended.last_step is None or facts.time is None:
        return False

    made = max(ended.last_step + 1 - facts.first_step, 1)
    return ended.open_s >= max(_LONG_S, _LONG_STEPS * facts.time.wall_s / made)


def _sender(by: EndingSignal) -> str:
    if by.from_terminal:
        return "the terminal"

    if by.sender_pid == 0:
        return "outside the container"

    if by.sender_pid is None:
        return "another process"

    return f"{by.sender or 'a program that has ended'} (process {by.sender_pid})"


def _to_resume(by: EndingSignal, lost: int | None) -> str:
    if lost == 0:
        return _SAVED

    return _ADVICE if by.launcher_pid is None else _NO_WARNING


def _for_sender(by: EndingSignal) -> str:
    if by.launcher_pid is not None:
        return _LAUNCHER

    if by.from_terminal:
        return _HANG_UP if by.number == signal.SIGHUP else _UNKNOWN

    if by.sender_pid == 0:
        return _OUTSIDE

    known = (text for names, starts, text in _SENDERS if by.sender in names or by.sender.startswith(starts))
    return next(known, _UNKNOWN)
