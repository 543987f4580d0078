"""Ranks that ended by a signal, an exit code or an exception, or whose connection was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from signal import SIGABRT

from traceml.diagnosis.deaths.closed_connections import failed_because_of_peer, left_early
from traceml.diagnosis.deaths.end_advice import for_exit
from traceml.diagnosis.deaths.end_wording import end_text, in_common, place_evidence, seen_text, step_text, was_cut_off
from traceml.diagnosis.deaths.ended_jobs import ended_by_scheduler, ended_from_outside, lost_steps, lost_steps_text
from traceml.diagnosis.deaths.lost_loader_workers import death_words, for_worker, worker_causing_end, worker_evidence
from traceml.diagnosis.deaths.out_of_memory import MemoryEnd, is_out_of_memory, memory_end, memory_end_of_worker
from traceml.diagnosis.facts.ends import LostWorker, RankExit, ended_badly, worker_in
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.memory_growth import MemoryKind
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.memory.growth_causes import GrowthCause, growth_cause
from traceml.formatting import capitalized, duration_text, ranks_text, short_exception
from traceml.process_ends import signal_name

__all__ = ["rank_lost", "root_causes", "was_stopped"]

# Ends that another rank's end causes: the launcher's SIGTERM, or a collective whose peer has gone.
_SWEPT_AWAY = ("SIGTERM", "SIGINT", "SIGHUP")
_TOGETHER_S = 1.0  # an exception within this time of the first came with it


def rank_lost(facts: JobFacts) -> Finding | None:
    """Return the finding about lost ranks, the first to end with its cause, or about a job ended as a whole."""
    bad = ended_badly(facts.exits)
    causes = root_causes(bad)
    as_a_whole = (
        ended_by_scheduler(bad, causes, facts) or ended_from_outside(causes, facts) or left_early(causes, facts)
    )
    if as_a_whole is not None or not causes:
        return as_a_whole

    first, at_end = causes[0], in_common(causes[0], causes)
    worker = worker_causing_end(first, facts)
    ranks = tuple(sorted(ended.rank for ended in causes))
    others = _without(causes, bad)
    beside = _beside(first, others)
    followed = [ended.rank for ended in _without(beside, others)]
    lost = lost_steps(first, facts.exits)
    memory = memory_end(first, facts) if worker is None else memory_end_of_worker(worker, first.rank, facts)
    grown = _grown_container(first, memory, facts)
    because = _beside_text(first, beside) + (f"; {ranks_text(followed)} ended because of that" if followed else "")
    summary = f"{_summary(causes, memory, worker)}{lost_steps_text(lost)}{because}."
    return Finding.of(
        Kind.RANK_LOST,
        severity=Severity.WARNING if was_cut_off(first) and not followed else None,
        ranks=ranks,
        phase=at_end.open_phase,
        summary=summary if grown is None else f"{summary}{grown.text}",
        next=for_worker(worker) if worker else grown.action if grown else for_exit(first, facts, memory),
        evidence={
            **({} if worker is None else worker_evidence(worker)),
            **_evidence(first, memory, followed, lost),
            **({"first_rank": first.rank} if _differ(causes) else {}),
            **({"failed_too": [ended.rank for ended in beside]} if beside else {}),
            **_of_container(first, grown),
        },
        cost_share=1.0,
    )


def root_causes(bad: Sequence[RankExit]) -> list[RankExit]:
    """Return the exits that caused the others, the earliest first; those that a signal ended as well come last.

    A run that was stopped by hand (Ctrl-C), or as a whole by its launcher, has none.
    """
    failed = _first_failures(bad)
    bad = [ended for ended in bad if not _outlives_a_failure(ended, failed)]
    own = [ended for ended in bad if not _follows(ended)]
    unforced = [ended for ended in bad if not ended.stopped]
    if not own and (not unforced or any(ended.interrupted for ended in bad)):
        return []

    causes = own or [ended for ended in unforced if not failed_because_of_peer(ended)] or unforced
    known = [ended for ended in causes if ended.state != "lost"]
    causes = sorted(causes, key=lambda ended: (_may_follow(ended, known), ended.at_s or 0.0, ended.rank))
    # Ranks with the same cause ended together; another one is a consequence, or `_beside` them.
    also = [ended for ended in _without(causes, bad) if _failed_by_itself(ended)]
    return [ended for ended in [*causes, *also] if _cause(ended) == _cause(causes[0])] if causes else []


def _first_failures(bad: Sequence[RankExit]) -> dict[str | None, float]:
    """Return when a rank of each host first failed in a collective."""
    found: dict[str | None, float] = {}
    for ended in bad:
        if ended.at_s is not None and failed_because_of_peer(ended):
            found[ended.host] = min(ended.at_s, found.get(ended.host, ended.at_s))

    return found


def _outlives_a_failure(ended: RankExit, failed: Mapping[str | None, float]) -> bool:
    """Whether a rank without a report still ran when another one of its host failed in a collective.

    That failure was not for its end. Most likely the launcher ended it for the other one. Of a rank whose connection
    alone was seen to end, or whose launcher reported its end later, it is not known what came first.
    """
    if ended.state != "lost" or not ended.process_gone or ended.reported_s is not None:
        return False

    return ended.host in failed and failed[ended.host] < (ended.at_s or 0.0)


def _may_follow(ended: RankExit, known: Sequence[RankExit]) -> bool:
    """Whether a lost rank may have ended because of those whose end is known.

    Ranks that are aborted after its connection was given up, as by NCCL's watchdog, waited for it. A process that is
    known to be gone has lived on after its last beat.
    """
    if ended.state != "lost" or ended.process_gone or ended.at_s is None:
        return ended.state == "lost"

    return not known or any(each.signal != SIGABRT or (each.at_s or 0.0) <= ended.at_s for each in known)


def was_stopped(exits: Sequence[RankExit]) -> bool:
    """Return whether ranks ended by Ctrl-C or by their launcher alone, which is not a failure of the run."""
    bad = ended_badly(exits)
    return bool(bad) and not root_causes(bad)


def _cause(ended: RankExit) -> tuple[object, ...]:
    if ended.exception:
        kind = ended.exception.partition(":")[0]
        place = () if is_out_of_memory(ended.exception) else (ended.file, ended.line)
        return ("exception", kind, worker_in(ended.exception) is not None, *place)

    return (ended.state, ended.signal, ended.code, ended.host_lost, ended.process_gone)


def _without(some: Sequence[RankExit], ends: Sequence[RankExit]) -> list[RankExit]:
    """Return the ends of the other ranks."""
    ranks = {ended.rank for ended in some}
    return [ended for ended in ends if ended.rank not in ranks]


def _beside(first: RankExit, others: Sequence[RankExit]) -> list[RankExit]:
    """Return the ranks that an exception of their own has ended, or that missed another one as the first did."""
    if failed_because_of_peer(first):
        return [ended for ended in others if failed_because_of_peer(ended)]

    return [ended for ended in others if _failed_by_itself(ended) and not ended.stopped]


def _beside_text(first: RankExit, beside: Sequence[RankExit]) -> str:
    if not beside:
        return ""

    ranks = ranks_text([ended.rank for ended in beside])
    did = end_text(beside[0], None, many=False) if len(beside) == 1 else "failed"
    known_s = [ended.at_s - first.at_s for ended in beside if ended.at_s is not None and first.at_s is not None]
    later_s = 0.0 if failed_because_of_peer(first) else max(known_s, default=0.0)
    when = "too" if later_s <= _TOGETHER_S else f"{'up to ' * (len(beside) > 1)}{duration_text(later_s)} later"
    return f"; {ranks} {did}, {when}"


def _failed_by_itself(ended: RankExit) -> bool:
    """Whether a rank had an exception of its own, also if its launcher's signal ended it before it was out."""
    return bool(ended.exception and ended.file) and not ended.interrupted and not failed_because_of_peer(ended)


def _follows(ended: RankExit) -> bool:
    if ended.stopped:
        return True

    if ended.signal is not None:
        return signal_name(ended.signal) in _SWEPT_AWAY

    return ended.interrupted or failed_because_of_peer(ended)


def _grown_container(ended: RankExit, memory: MemoryEnd | None, facts: JobFacts) -> GrowthCause | None:
    """Return the container that explains the growth of a rank's memory until its end; None if none does."""
    if memory is None or not memory.grows or memory.of_workers or memory.cause == "device_allocation":
        return None

    resident = (
        growth for rank, kind, _, growth in facts.memory.steady() if (rank, kind) == (ended.rank, MemoryKind.RESIDENT)
    )
    growth = next(resident, None)
    return None if growth is None else growth_cause(facts, ended.rank, growth)


def _of_container(ended: RankExit, grown: GrowthCause | None) -> dict[str, object]:
    """Return the evidence about a container; where an exception has its own line, that stays."""
    own = ("file", "line", "function") if ended.file else ()
    return {} if grown is None else {key: value for key, value in grown.evidence.items() if key not in own}


def _differ(causes: Sequence[RankExit]) -> bool:
    """Whether ranks with the same cause ended at several lines, or in several steps."""
    return len({(ended.place, ended.step, ended.in_step) for ended in causes}) > 1


def _summary(causes: Sequence[RankExit], memory: MemoryEnd | None, worker: LostWorker | None) -> str:
    first, is_one = causes[0], len(causes) == 1
    subject = capitalized(ranks_text(sorted(ended.rank for ended in causes)))
    how = end_text(first, memory, many=not is_one)
    if worker is not None:
        died = death_words(worker)
        how = f"ended because {died}" if is_one else f"ended because loader workers died: on rank {first.rank} {died}"

    has_rank = worker is not None or (len({ended.place for ended in causes}) > 1 and first.exception is not None)
    if has_rank and worker is None:
        how += f" on {ranks_text((first.rank,))}"

    when = step_text(in_common(first, causes), of_one=_differ(causes) and not has_rank)
    seen = seen_text(first) if worker is None and is_one else ""
    used = memory.words() if memory is not None and is_one else ""
    again = f", which was raised again as {short_exception(first.raised_as)}" if first.raised_as else ""
    return f"{subject} {how}{when}{seen}{used}{again}"


def _lost(ended: RankExit) -> str | None:
    """Return what was lost with a rank of whose process nothing is known; None if it is known to have ended."""
    if ended.state != "lost" or ended.process_gone or ended.code is not None:
        return None

    return "host" if ended.host_lost else "connection"


def _evidence(
    ended: RankExit, memory: MemoryEnd | None, followed: Sequence[int], lost: int | None
) -> dict[str, object]:
    return known_facts(
        **(memory.evidence() if memory is not None else {}),
        signal=ended.signal,
        code=ended.code,
        exception=ended.exception,
        raised_as=ended.raised_as,
        lost=_lost(ended),
        **place_evidence(ended),
        step=ended.step,
        last_step=ended.last_step if ended.in_step else ended.step,
        lost_steps=lost,
        counts_anew=ended.counts_anew or None,
        host=ended.host,
        stack=ended.stack,
        followed=list(followed) or None,
    )
