"""Ranks that ended by a signal, an exit code or an exception, or lost their connection; loader workers that died."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from traceml.diagnosis import advice
from traceml.diagnosis.facts.job_facts import JobFacts, RankExit, ended_badly
from traceml.diagnosis.facts.lost_workers import LostWorker, worker_in
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import capitalized, count_text, phase_words, ranks_text, signal_name

__all__ = ["rank_lost", "root_causes", "worker_behind", "worker_lost"]

# Ends that another rank's end causes: the launcher's SIGTERM, or a collective whose peer has gone.
_SWEPT_AWAY = ("SIGTERM", "SIGINT", "SIGHUP")
_PEER_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "socket timeout",
    "gloo",
    "nccl",
    "distbackenderror",
    "distnetworkerror",
    "process group",
    "store->get",
)

# What reading a batch of a worker that is gone raises, where torch does not notice its end first.
_CONNECTION_CUT = ("ConnectionResetError", "ConnectionRefusedError", "BrokenPipeError", "EOFError")


def rank_lost(facts: JobFacts) -> list[Finding]:
    """Return the finding about lost ranks: the first to end, the cause, the step and the phase."""
    bad = ended_badly(facts.exits)
    causes = root_causes(bad)
    if not causes:
        return []

    first = causes[0]
    worker = worker_behind(first, facts)
    ranks = tuple(sorted(ended.rank for ended in causes))
    followed = [ended.rank for ended in bad if ended not in causes]
    return [
        Finding(
            kind=Kind.RANK_LOST,
            severity=Kind.RANK_LOST.severity_for(0.0),
            ranks=ranks,
            phase=first.open_phase,
            summary=_summary(causes, followed, worker),
            next=advice.for_exit(first, facts) if worker is None else advice.for_worker(worker),
            evidence=({} if worker is None else _worker_evidence(worker)) | _evidence(first, followed),
            cost_share=1.0,
        )
    ]


def root_causes(bad: Sequence[RankExit]) -> list[RankExit]:
    """Return the exits that caused the others, the earliest first.

    A run that was stopped by hand (Ctrl-C), or as a whole by its launcher, has none.
    """
    own = [ended for ended in bad if not _follows(ended)]
    unforced = [ended for ended in bad if not ended.stopped]
    if not own and (not unforced or any(ended.interrupted for ended in bad)):
        return []

    causes = own or [ended for ended in unforced if not _failed_because_of_peer(ended)] or unforced
    causes = sorted(causes, key=lambda ended: (_weight(ended), ended.at_s or 0.0, ended.rank))
    # Ranks with the same cause ended together; another cause later is a consequence.
    return [ended for ended in causes if _cause(ended) == _cause(causes[0])] if causes else []


def was_stopped(exits: Sequence[RankExit]) -> bool:
    """Return whether ranks ended by Ctrl-C or by their launcher alone, which is no failure of the run."""
    bad = ended_badly(exits)
    return bool(bad) and not root_causes(bad)


def _weight(ended: RankExit) -> int:
    # A lost rank may be a consequence of the others' end, so known causes come first.
    return 1 if ended.state == "lost" else 0


def _cause(ended: RankExit) -> tuple[object, ...]:
    if ended.exception:
        return ("exception", ended.exception.partition(":")[0], ended.file, ended.line)

    return (ended.state, ended.signal, ended.code)


def _follows(ended: RankExit) -> bool:
    if ended.stopped:
        return True

    if ended.signal is not None:
        return signal_name(ended.signal) in _SWEPT_AWAY

    return ended.interrupted or _failed_because_of_peer(ended)


def _failed_because_of_peer(ended: RankExit) -> bool:
    text = (ended.exception or "").lower()
    return any(word in text for word in _PEER_GONE)


def _summary(causes: Sequence[RankExit], followed: Sequence[int], worker: LostWorker | None) -> str:
    first = causes[0]
    subject = capitalized(ranks_text(sorted(ended.rank for ended in causes)))
    how = f"ended because {_death_words(worker)}" if worker else _end_text(first, many=len(causes) > 1)
    text = f"{subject} {how}{_step_text(first)}"
    if followed:
        text += f"; {ranks_text(followed)} ended because of that"

    return text + "."


def _end_text(ended: RankExit, *, many: bool) -> str:
    was = "were" if many else "was"
    if ended.signal is not None:
        return f"{was} killed by signal {ended.signal} ({signal_name(ended.signal)})"

    if ended.exception:
        at = f" at {ended.file}:{ended.line}" if ended.file else ""
        return f"ended with {_short(ended.exception)}{at}"

    if ended.state == "lost" and ended.process_gone:
        return "ended without a report: by a signal or by os._exit"

    if ended.state == "lost":
        return "lost its connection without a report" if not many else "lost their connections without a report"

    return f"ended with exit code {ended.code}"


def _step_text(ended: RankExit) -> str:
    step = ended.open_step if ended.open_step is not None else ended.last_step
    if step is None:
        return ", before the first step"

    inside = f", in {phase_words(ended.open_phase)}" if ended.open_phase else ""
    return f", {'in' if ended.open_step is not None else 'after'} step {step}{inside}"


def _short(exception: str, limit: int = 160) -> str:
    line = exception.strip().splitlines()[0] if exception.strip() else exception
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _evidence(ended: RankExit, followed: Sequence[int]) -> dict[str, object]:
    known = {
        "signal": ended.signal,
        "code": ended.code,
        "exception": ended.exception,
        "file": ended.file,
        "line": ended.line,
        "function": ended.function,
        "step": ended.open_step if ended.open_step is not None else ended.last_step,
        "last_step": ended.last_step,
        "host": ended.host,
        "stack": ended.stack,
        "followed": list(followed) or None,
    }
    return {key: value for key, value in known.items() if value is not None}


def worker_lost(facts: JobFacts, explained: Iterable[int] = ()) -> list[Finding]:
    """Return the finding about workers that died while their rank went on: the first of them.

    Args:
        facts: about the job.
        explained: ranks whose end is a finding already.
    """
    known = set(explained)
    lost = [(rank, each) for rank, workers in facts.lost_workers.items() if rank not in known for each in workers]
    if not lost or facts.state == "stopped":
        return []

    lost.sort(key=lambda each: (each[1].step is None, each[1].step or 0, each[0]))
    rank, first = lost[0]
    more = f"; {count_text(len(lost) - 1)} more died later" if len(lost) > 1 else ""

    died = f"{capitalized(_death_words(first))} on {ranks_text((rank,))}{_worker_step(first)}{more}"
    return [
        Finding(
            kind=Kind.WORKER_LOST,
            severity=Kind.WORKER_LOST.severity_for(0.0),
            ranks=tuple(sorted({rank for rank, _ in lost})),
            phase="input_wait",
            summary=f"{died}. The script went on; batches of that iterator may be missing.",
            next=advice.for_worker(first),
            evidence=_worker_evidence(first) | {"lost": len(lost)},
        )
    ]


def worker_behind(ended: RankExit, facts: JobFacts) -> LostWorker | None:
    """Return the worker whose death ended a rank; None if something else did."""
    lost, exception = facts.lost_workers.get(ended.rank, ()), ended.exception or ""
    told = worker_in(exception)
    if told is not None:
        return next((each for each in lost if each.pid == told.pid), told)

    is_cut = ended.open_phase == "input_wait" and exception.startswith(_CONNECTION_CUT)
    return lost[-1] if lost and is_cut else None


def _death_words(lost: LostWorker) -> str:
    """Return `loader worker 1 of 2 (process 4711) was killed by signal 9 (SIGKILL)`."""
    of = "" if lost.workers is None else f" of {lost.workers}"
    name = f"{'a loader worker' if lost.worker is None else f'loader worker {lost.worker}{of}'} (process {lost.pid})"
    if lost.signal is not None:
        return f"{name} was killed by signal {lost.signal} ({signal_name(lost.signal)})"

    status = "" if lost.code is None else f" with exit code {lost.code}"
    return f"{name} ended{status}"


def _worker_evidence(lost: LostWorker) -> dict[str, Any]:
    """Return the facts about a death, as a finding has them."""
    known = {
        "worker": lost.worker,
        "workers": lost.workers,
        "worker_pid": lost.pid,
        "worker_signal": lost.signal,
        "worker_code": lost.code,
        "step": lost.step,
        "oom_kills": lost.oom_kills,
        "shm_bytes": lost.shm_bytes if lost.signal == advice.BUS_ERROR else None,
        "memory_limit_bytes": lost.memory_limit_bytes if lost.signal == advice.KILL else None,
    }
    return {key: value for key, value in known.items() if value is not None}


def _worker_step(lost: LostWorker) -> str:
    return ", before the first step" if lost.step is None else f", in step {count_text(lost.step)}"
