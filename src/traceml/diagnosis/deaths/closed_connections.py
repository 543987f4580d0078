"""Ranks that failed because another rank's script ended first and closed its connection."""

from __future__ import annotations

from collections.abc import Sequence

from traceml.diagnosis.advice import EVEN_BATCHES, EVEN_OR_TOGETHER, EXPLICIT_EXIT, SAME_COLLECTIVES, STOP_TOGETHER
from traceml.diagnosis.deaths.end_wording import step_text
from traceml.diagnosis.facts.ends import STORE_TIME_LIMITS, RankExit, UnevenData, ended_badly
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.progress.step_sequences import DivergedRanks
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import Kind
from traceml.formatting import capitalized, plural, ranks_text

__all__ = ["early_ends", "failed_because_of_peer", "left_early"]

_OF_GROUPS = ("runtimeerror", "torch.distributed.", "dist")  # a data set's server closes connections too
_PEER_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "socket timeout",
    "gloo/",  # of the source file that follows
    "connectfullmesh",
    "monitoredbarrier",
    "nccl error",
    "nccl communicator",
    "watchdog",
    "distbackenderror",
    "distnetworkerror",
    "store->get",
    *STORE_TIME_LIMITS,
)
_OWN_ERRORS = ("collective mismatch", "invalid usage", "invalid argument", "duplicate gpu", "cuda error", "eaddrinuse")
"""What the same sources say of a call that its own arguments or device made fail."""


def failed_because_of_peer(ended: RankExit) -> bool:
    """Whether a rank's exception shows that another one was gone.

    That a message has the name of a backend is not enough: the call may have been wrong by itself
    (`ProcessGroupGloo::allgather: invalid tensor size`, `Distributed package doesn't have NCCL built in`).
    """
    is_of_group = (ended.exception or "").lower().startswith(_OF_GROUPS)
    return is_of_group and ended.exception_mentions(*_PEER_GONE) and not ended.exception_mentions(*_OWN_ERRORS)


def left_early(causes: Sequence[RankExit], facts: JobFacts) -> Finding | None:
    """Return the finding about ranks whose script had ended when the others failed; None without such ranks.

    Args:
        causes: ends of ranks that nothing else explains.
    """
    gone = early_ends(causes, facts.exits)
    if not gone:
        return None

    causes = [each for each in ended_badly(facts.exits) if failed_because_of_peer(each)]
    failed = min(causes, key=lambda each: each.rank)
    first, diverged = gone[0], facts.progress.diverged if facts.progress is not None else None
    data = _ended_data(gone, failed)
    why = [data.sentence if data is not None else "", diverged.text if diverged is not None else ""]
    return Finding.of(
        Kind.RANK_LOST,
        ranks=tuple(sorted(each.rank for each in gone)),
        summary=" ".join(filter(None, [_summary(gone, causes, failed), *why])),
        next=_advice(gone, failed, diverged) if data is None else EVEN_BATCHES,
        evidence=known_facts(
            cause="left_early",
            code=first.code or 0,
            last_step=first.last_step,
            apart_since_step=None if diverged is None else diverged.since,
            followed=sorted(each.rank for each in causes),
            exception=failed.exception,
            file=first.file,
            line=first.line,
            function=first.function,
            **({} if data is None else data.evidence),
        ),
        cost_share=1.0,
    )


def early_ends(causes: Sequence[RankExit], exits: Sequence[RankExit]) -> list[RankExit]:
    """Return the ranks whose script had ended when the others, which needed them, failed.

    Args:
        causes: ends of ranks that nothing else explains.
        exits: those of all ranks.
    """
    gone = [each for each in exits if each.state == "finished"]
    if not causes or not all(map(failed_because_of_peer, causes)):
        return []

    failed = min((each for each in ended_badly(exits) if failed_because_of_peer(each)), key=lambda each: each.rank)
    # One that had come further did not need the others any more.
    return [] if any(each.steps > (failed.step or 0) + 1 for each in gone) else gone


def _ended_data(gone: Sequence[RankExit], failed: RankExit) -> UnevenData | None:
    """Return the data of the ranks that have ended, if it was over while a rank that failed still had some."""
    read = [each.data for each in gone if each.data is not None and each.data.is_over and each.data.batches >= 0]
    if len(read) < len(gone) or failed.data is None or failed.data.is_over or not failed.in_step:
        return None

    if failed.data.epoch > min(each.epoch for each in read):
        return None

    batches = sorted(each.batches for each in read)
    return UnevenData(tuple(sorted(each.rank for each in gone)), (batches[0], batches[-1]))


def _advice(gone: Sequence[RankExit], failed: RankExit, diverged: DivergedRanks | None) -> str:
    first = gone[0]
    if first.skipped_exit:
        return EXPLICIT_EXIT

    has_data = all(each.data is not None and each.data.batches >= 0 and not each.data.is_over for each in gone)
    end = STOP_TOGETHER if has_data else EVEN_OR_TOGETHER
    if first.place:
        return f"Find out why rank {first.rank} reaches {first.place}, which ends it before the others. {end}"

    return end if failed.in_step and diverged is None else SAME_COLLECTIVES


def _summary(gone: Sequence[RankExit], causes: Sequence[RankExit], failed: RankExit) -> str:
    ranks = sorted(each.rank for each in gone)
    one, more, code = "script", "scripts", ""
    if all(each.skipped_exit for each in gone):
        one, more, code = "process", "processes", " with exit code 0"

    whose = f"{ranks_text(ranks)}'s {one}" if len(ranks) == 1 else f"the {more} of {ranks_text(ranks)}"
    counts, places = {each.steps for each in gone}, {each.place for each in gone}
    after = f" after {plural(counts.pop(), 'step')}" if len(counts) == 1 else ""
    ended = f" at {gone[0].place}" if gone[0].place and len(places) == 1 else ""
    others = ranks_text(sorted(each.rank for each in causes))
    of_one = f", {ranks_text([failed.rank])}" if len({(each.place, each.step) for each in causes}) > 1 else ""
    at = f"{of_one} at {failed.place}" if failed.place else of_one
    needed = "still trained" if failed.in_step else f"still needed {'it' if len(ranks) == 1 else 'them'}"
    return (
        f"{capitalized(whose)} ended{code}{ended}{after} while {others} {needed}, which failed{at}{step_text(failed)}."
    )
