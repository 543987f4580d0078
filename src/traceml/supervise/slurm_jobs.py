"""Jobs of Slurm, as its controller describes them, and requests to cancel one or to queue it again."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from traceml.errors import SlurmError

__all__ = [
    "SlurmJob",
    "cancel_job",
    "is_cancelled",
    "is_forgotten",
    "minutes_of",
    "read_job",
    "requeue_job",
    "scheduler_end",
    "scheduler_facts",
]

_TIMEOUT_S = 10.0
_FACTS_S = 3.0  # both commands together: a job that Slurm ends has some 30 s, in which its run must be stored
_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S*)")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_CANCELLED = ("CANCELLED", "COMPLETING")  # the second while its processes still run
_AT_LIMIT_S = 5.0  # the clocks of the controller and of this host may differ by as much

_NO_SUCH_JOB = "Invalid job id specified"  # Slurm's words, as the next ones
_NO_ACCOUNTING = "accounting storage is disabled"

_log = logging.getLogger("traceml")


class SlurmJob(NamedTuple):
    """A job as Slurm describes it."""

    job_id: str
    state: str  # RUNNING, PENDING, COMPLETED, …
    reason: str = ""  # why it is in that state, in Slurm's words
    # Epoch seconds at which it ends or has ended; sooner than its limit once it is preempted.
    end_s: float | None = None
    limit_s: float | None = None  # epoch seconds of its time limit; None without one
    limit_minutes: int | None = None  # the time limit; None without one
    preempted: bool = False  # whether another job takes its place
    restarts: int = 0  # how often it was queued again


def read_job(job_id: str, limit_s: float = 2 * _TIMEOUT_S) -> SlurmJob | None:
    """Return what Slurm knows of a job; None if it knows nothing or does not answer.

    Args:
        limit_s: time for all commands together.
    """
    until_s = time.monotonic() + limit_s
    shown = _ask("scontrol", "show", "job", job_id, "--oneliner", until_s=until_s)
    if shown is None:  # it is forgotten some minutes after its end, unless there is accounting
        state = _ask("sacct", "-j", job_id, "-X", "-n", "-P", "-o", "State", until_s=until_s)
        return SlurmJob(job_id, state.split()[0]) if state and state.split() else None

    facts = dict(_FIELD.findall(shown))
    start_s, minutes = _seconds(facts.get("StartTime", "")), minutes_of(facts.get("TimeLimit", ""))
    return SlurmJob(
        job_id,
        facts.get("JobState", "UNKNOWN"),
        reason=facts.get("Reason", ""),
        end_s=_seconds(facts.get("EndTime", "")),
        limit_s=None if start_s is None or minutes is None else start_s + 60 * minutes,
        limit_minutes=minutes,
        preempted=facts.get("JobState") == "PREEMPTED" or _seconds(facts.get("PreemptTime", "")) is not None,
        restarts=int(facts.get("Restarts") or 0),
    )


def scheduler_facts(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return why Slurm ends the job that this process is part of, for a report of its end; empty if it does not.

    Also where Slurm takes more than three seconds to answer.

    Args:
        environ: as of `scheduler_end`.

    Returns:
        `scheduler`, as `scheduler_end` has it, or `cancelled`: Slurm ends the job for none of these reasons; `limit_s`,
        the job's time limit in seconds, if it has one.
    """
    job = read_job(job_id, _FACTS_S) if (job_id := environ.get("SLURM_JOB_ID")) else None
    if job is None:
        return {}

    why = _reason(job, environ, 0.0) or ("cancelled" if job.state in _CANCELLED else None)
    if why is None:
        return {}

    return {"scheduler": why} | ({} if job.limit_minutes is None else {"limit_s": 60 * job.limit_minutes})


def scheduler_end(environ: Mapping[str, str], early_s: float = 0.0) -> str | None:
    """Return why Slurm ends the job that this process is part of; None if it does not.

    Args:
        environ: with Slurm's variables, and ours of a submitted job.
        early_s: how much earlier than it was asked to Slurm may have sent the signal that announces the limit.

    Returns:
        `preempted`; `time_limit`; `warned`: the limit is not reached, but Slurm has sent the signal that announces it;
        or `requeued`: by an administrator, or where nothing else is known.
    """
    job = read_job(job_id) if (job_id := environ.get("SLURM_JOB_ID")) else None
    return None if job is None else _reason(job, environ, early_s)


def is_cancelled(environ: Mapping[str, str]) -> bool:
    """Return whether the job that this process is part of was cancelled: its processes are being ended."""
    job = read_job(job_id) if (job_id := environ.get("SLURM_JOB_ID")) else None
    return job is not None and job.state in _CANCELLED and _reason(job, environ, 0.0) is None


def is_forgotten(job_id: str) -> bool:
    """Return whether Slurm answers that it knows no such job, which it has forgotten some minutes after its end."""
    try:
        shown = _run(("scontrol", "show", "job", job_id, "--oneliner"))
        if not shown.returncode or _NO_SUCH_JOB not in shown.stderr:
            return False

        accounted = _run(("sacct", "-j", job_id, "-X", "-n", "-P", "-o", "State"))
    except (OSError, subprocess.TimeoutExpired):
        return False

    is_answer = not accounted.returncode or _NO_ACCOUNTING in accounted.stderr  # else its database does not answer
    return is_answer and not accounted.stdout.strip()


def _reason(job: SlurmJob, environ: Mapping[str, str], early_s: float) -> str | None:
    if job.preempted:
        return "preempted"

    if job.state == "TIMEOUT" or job.reason == "TimeLimit":
        return "time_limit"

    if job.restarts > int(environ.get("SLURM_RESTART_COUNT") or 0):
        return "requeued"

    end_s = min((each for each in (job.end_s, job.limit_s) if each is not None), default=None)
    if end_s is None or job.state != "RUNNING":
        return None

    left_s, warning_s = end_s - time.time(), float(environ.get("TRACEML_JOB_WARNING_S") or 0)
    return "time_limit" if left_s <= _AT_LIMIT_S else "warned" if 0 < warning_s >= left_s - early_s else None


def requeue_job(job_id: str) -> None:
    """Queue a job again, which ends it here.

    Raises:
        SlurmError: Slurm does not do it.
    """
    _request("scontrol", "requeue", job_id)


def cancel_job(job_id: str) -> None:
    """End a job, or take it from the queue; one that has ended is left alone.

    Raises:
        SlurmError: Slurm does not do it.
    """
    _request("scancel", job_id)


def minutes_of(text: str) -> int | None:
    """Return the whole minutes of a duration as Slurm writes it, rounded up; None if it is not a duration.

    The forms are `90`, `90:00`, `1:30:00`, `1-12`, `1-12:30` and `1-12:30:00`.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        return None

    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return 24 * 60 * int(match["days"]) + 60 * hours + minutes + (seconds > 0)

    hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
    return 60 * hours + minutes + (seconds > 0)


def _seconds(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # Unknown, None, N/A
        return None


def _ask(*command: str, until_s: float) -> str | None:
    """Return the output of a command of Slurm; None if it fails, or has not ended by then."""
    left_s = min(until_s - time.monotonic(), _TIMEOUT_S)
    if left_s <= 0:
        return None

    try:
        done = _run(command, left_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.debug("`%s` failed: %s", " ".join(command), error)
        return None

    return None if done.returncode else done.stdout


def _request(*command: str) -> None:
    try:
        done = _run(command)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"`{' '.join(command)}` cannot be run: {error}") from error

    if done.returncode:
        raise SlurmError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")


def _run(command: tuple[str, ...], timeout_s: float = _TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
    )
