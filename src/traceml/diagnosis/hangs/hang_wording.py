"""Sentences about a hang: who blocks the others, where, since when, and who waits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from traceml.database.snapshots.rank_snapshot import GroupSnapshot, RankSnapshot, ThreadSnapshot, user_line
from traceml.diagnosis.facts.ends import UnevenData
from traceml.diagnosis.hangs.blame import RENDEZVOUS, HangCause
from traceml.diagnosis.hangs.hang_detection import DetectedHang
from traceml.diagnosis.hangs.rank_state import (
    REMOTE_CALLS,
    WAITS_FOR_THREAD,
    awaited_thread,
    blocked_worker,
    calling_thread,
    doing,
    is_in_collective,
    rival_thread,
)
from traceml.formatting import (
    capitalized,
    count_text,
    duration_text,
    exception_line,
    phase_words,
    plural,
    ranks_text,
    short_exception,
)

__all__ = ["are_apart", "failed_thread", "handling_rank", "hang_summary", "operation_text", "rivals"]

_RECEIVES = ("recv", "broadcast", "scatter")  # operations whose data comes from the rank that is named
_WHY = {HangCause.SIZES: "sizes differ", HangCause.ROOTS: "they name different ranks"}
_LISTED = 3  # different places that a sentence lists


def operation_text(wait: GroupSnapshot) -> str:
    """Return `all_reduce #15`, with the group's name unless it is the default one; empty if nothing is known."""
    if not wait.operation:
        return f"collective #{wait.number}" if wait.number > 0 else ""

    number = f" #{wait.number}" if wait.number > 0 and not wait.is_p2p else ""
    direction = "from" if any(word in wait.operation for word in _RECEIVES) else "to"
    peer = f" {direction} rank {wait.peer}" if wait.peer is not None else ""

    group = f" of group {wait.name!r}" if wait.name and not wait.is_p2p else ""
    return f"{wait.operation}{number}{peer}{group}"


def hang_summary(found: DetectedHang) -> str:
    """Return one sentence with a period; what is seen of the ranks, and nothing that was not."""
    cause = found.blame.cause
    if found.blame.apart:
        text = _different_text(found)
    elif cause is HangCause.CYCLE:
        places = _places(found, found.blame.ranks)
        text = f"{ranks_text(found.blame.ranks)} wait for each other: {places}, for {_age(found)}{_waiters_text(found)}"
    elif cause in (HangCause.NETWORK, HangCause.RENDEZVOUS):
        text = _together_text(found)
    elif cause is HangCause.UNANSWERED:
        silent = f"; {ranks_text(found.blame.ranks)} did not answer" if found.blame.ranks else ""
        text = f"no rank has made progress for {_age(found)}: {_places(found, found.snapshots)}{silent}"
    elif found.blame.has_ended:
        text = _ended_text(found)
    elif cause is HangCause.STUCK:
        text = _stuck_text(found)
    else:
        text = _late_text(found)

    data = f" {found.blame.data.sentence}" if found.blame.data is not None and found.blame.has_ended else ""
    more = (_rivals_text, _time_limit_text, _failed_thread_text, _handled_text, _raised_text)
    return f"{capitalized(text)}.{data}{''.join(sentence(found) for sentence in more)}"


def _time_limit_text(found: DetectedHang) -> str:
    if not found.timed_out:
        return ""

    its = "its" if len(found.timed_out) == 1 else "their"
    waits = [found.blame.waits.get(rank) for rank in found.timed_out]
    is_set_up = all(wait is not None and wait.operation == RENDEZVOUS for wait in waits)
    what = RENDEZVOUS if is_set_up else f"{its} collective"
    return f" {capitalized(ranks_text(found.timed_out))} waited until the time limit of {what}."


def _failed_thread_text(found: DetectedHang) -> str:
    """Return the sentence about the thread of a rank that blocks the others, or is stuck, which has failed before."""
    rank, thread = failed_thread(found) or (0, None)
    if thread is None:
        return ""

    at = f" at {thread.line.place}" if thread.line else ""
    whose = f"Its thread {thread.name!r}" if len(found.snapshots) == 1 else f"Thread {thread.name!r} of rank {rank}"
    return f" {whose} had ended with {exception_line(thread.exception)}{at}."


def failed_thread(found: DetectedHang) -> tuple[int, ThreadSnapshot] | None:
    """Return a rank that blocks the others, or is stuck, and its newest thread that an exception has ended."""
    return next(((stuck.rank, each) for stuck in found.stuck for each in stuck.threads if each.exception), None)


def _handled_text(found: DetectedHang) -> str:
    """Return the sentence about the exception that a rank was handling, or failed with, when it came where it is."""
    snapshot = handling_rank(found)
    if snapshot is None:
        return ""

    who, raised = "It" if len(found.snapshots) == 1 else f"Rank {snapshot.rank}", snapshot.raised_line
    at = f", raised at {raised.place}" if raised else ""
    does = "had failed with" if snapshot.phase == "exit" else "is handling"
    return f" {who} {does} {exception_line(snapshot.handled)}{at}."


def _raised_text(found: DetectedHang) -> str:
    """Return the sentence about the exception with which a hang has ended by itself."""
    ended, handling = found.raised, handling_rank(found)
    if ended is None or (handling is not None and handling.rank == ended.rank):
        return ""

    who, at = "It" if len(found.snapshots) == 1 else f"Rank {ended.rank}", f" at {ended.place}" if ended.place else ""
    return f" {who} then ended with {short_exception(ended.exception or '')}{at}."


def handling_rank(found: DetectedHang) -> RankSnapshot | None:
    """Return a rank that blocks the others, or is stuck, while it handles an exception; None without one."""
    return next((each for each in found.stuck if each.handled), None)


def _late_text(found: DetectedHang) -> str:
    """Return who did not reach a collective, where it is, and who waits."""
    named, operation = found.blame.ranks, found.blame.operation
    what = operation_text(operation) if operation is not None else ""
    if found.blame.cause is HangCause.ALONE:
        (alone,) = found.blame.waits
        return (
            f"rank {alone} alone has waited in {_where_they_wait(found, [alone])} for {_age(found)}: "
            f"{ranks_text(named)} never reached it: {_places(found, named)}"
        )

    data = found.blame.data
    if data is not None:
        return f"{_of_data_text(found, data, what)}{_waiters_text(found)}"

    is_numbered = operation is not None and operation.number > 0 and not operation.is_p2p
    never = f" never reached {what}:" if what and is_numbered else ""
    it, have = ("it has", "has") if len(named) == 1 else ("they have", "have")
    subject = f"{ranks_text(named)}{never} {it if never else have}"
    since = f"for {_age(found, named)}{_seen_text(found, named)}"
    return f"{subject} been {_state_text(found, named)} {since}{_waiters_text(found)}"


def _of_data_text(found: DetectedHang, data: UnevenData, what: str) -> str:
    """Return that the data of some ranks has ended, after how many batches, and where these ranks are now."""
    whose, have = ("its", "it has") if len(data.ranks) == 1 else ("their", "they have")
    text = f"{whose} data ended ({data.text}), and {have} been {_state_text(found, data.ranks)}"
    return f"{ranks_text(data.ranks)} never reached {what or 'the collective'}: {text} for {_age(found, data.ranks)}"


def are_apart(found: DetectedHang) -> bool:
    """Return whether the ranks that block the others, or that are stuck, are at several places."""
    return len({_place(found, stuck.rank) for stuck in found.stuck}) > 1


def _stuck_text(found: DetectedHang) -> str:
    ranks = sorted(found.snapshots)
    if len(ranks) == 1 or len({_place(found, rank) for rank in ranks}) == 1:
        has = "has" if len(ranks) == 1 else "have"
        return f"{ranks_text(ranks)} {has} been {_state_text(found, ranks)} for {_age(found)}{_seen_text(found, ranks)}"

    return f"no rank has made progress for {_age(found)}: {_places(found, ranks)}"


def _together_text(found: DetectedHang) -> str:
    """Return that all ranks are in one operation; where they do not find each other, what each waits for."""
    text = f"all ranks have been in {_where_they_wait(found, sorted(found.snapshots))} for {_age(found)}"
    if found.blame.cause is HangCause.NETWORK:
        return f"{text}: none is missing, so look at network and devices"

    waits = _by_place(found.snapshots, lambda rank: doing(found.snapshots[rank]) or "silent")
    return f"{text} and do not find each other: {', '.join(f'{ranks_text(at)} {what}' for what, at in waits[:_LISTED])}"


def _ended_text(found: DetectedHang) -> str:
    """Return that ranks have ended, after how many steps where that differs, and who waits."""
    gone = found.blame.ranks
    steps = {found.ended[rank].steps for rank in gone if rank in found.ended}
    others = {
        snapshot.step + (0 if snapshot.in_step else 1) for snapshot in found.snapshots.values() if snapshot.step >= 0
    }
    after = ""
    if len(steps) == 1 and (count := next(iter(steps))) > 0:
        after = f" after {plural(count, 'step')}"
        if others and min(others) > count:
            after += f", the others had {count_text(min(others))}"

    returned = any(found.ended[rank].returned for rank in gone if rank in found.ended)
    what, ended = ("function", "returned") if returned else ("script", "ended")
    whose = f"{ranks_text(gone)}'s {what}" if len(gone) == 1 else f"the {what}s of {ranks_text(gone)}"
    return f"{whose} {ended}{after}{_waiters_text(found)}, for {_age(found)}"


def _different_text(found: DetectedHang) -> str:
    parts = []
    groups: dict[tuple[str, tuple[int, ...], int | None], list[int]] = defaultdict(list)
    for rank in found.blame.apart:
        wait = found.blame.waits[rank]
        sizes = wait.sizes if found.blame.cause is HangCause.SIZES else ()
        groups[wait.operation, sizes, wait.peer if found.blame.cause is HangCause.ROOTS else None].append(rank)

    has_sums = len({sum(sizes) for _, sizes, _ in groups}) == len(groups)  # that differ; else each tensor is told
    for (_, sizes, _), ranks in sorted(groups.items(), key=lambda item: item[1]):
        of = _elements_text((sum(sizes),) if has_sums else sizes) if sizes else ""
        be = "is" if len(ranks) == 1 else "are"
        parts.append(f"{ranks_text(ranks)} {be} in {_where_they_wait(found, ranks, of)}")

    why = _WHY.get(found.blame.cause, "" if rivals(found) else "different code paths")
    return f"{', '.join(parts)}, for {_age(found)}{why and f': {why}'}{_waiters_text(found)}"


def _elements_text(sizes: tuple[int, ...]) -> str:
    """Return ` of 4,096 elements`; of several tensors ` of 2 + 4,096 elements`."""
    return f" of {' + '.join(map(count_text, sizes))} element{'' if sizes == (1,) else 's'}"


def _state_text(found: DetectedHang, ranks: Sequence[int]) -> str:
    """Return what the named ranks do: their place if it is one, and what the kernel says."""
    places = {_place(found, rank) for rank in ranks}
    if len(places) == 1:
        return places.pop()

    return f"elsewhere ({_places(found, ranks)})"


def _place(found: DetectedHang, rank: int) -> str:
    """Return `in train.py:6 stuck, sleeping` of a rank, with the operation or the worker that it waits for."""
    snapshot = found.snapshots.get(rank)
    if snapshot is None:
        return "silent"

    wait = found.blame.waits.get(rank)
    if wait is not None:
        others = _threads_text(snapshot) if wait.operation in REMOTE_CALLS else ""  # such a call may be in one of them
        return f"in {_where_they_wait(found, [rank])}{others}"

    worker = blocked_worker(snapshot)
    if worker is not None:
        line = user_line(worker)
        at = f"in {line.place}" if line else ""
        where = ", ".join(filter(None, [at, doing(worker)])) or "in unknown code"
        return (
            f"waiting for batch {worker.waits_for_batch} of its data loader, whose worker {worker.index} "
            f"(process {worker.pid}) is {where}"
        )

    if (thread := awaited_thread(snapshot)) is not None:
        return f"at its end, waiting for its {_thread_place(thread)}"

    return _own_place(snapshot) + _threads_text(snapshot)


def _thread_place(thread: ThreadSnapshot) -> str:
    at = f" in {thread.line.place if thread.line else thread.collective}" if thread.line or thread.collective else ""
    return f"thread {thread.name!r}{at}" if thread.name else f"thread{at}"


def _threads_text(snapshot: RankSnapshot) -> str:
    """Return where other threads are, of which one may hold the lock that a rank waits for."""
    if not doing(snapshot).endswith(WAITS_FOR_THREAD):
        return ""

    places = Counter(_thread_place(thread) for thread in snapshot.threads if not thread.exception)
    its = {
        place: f"{number} of its threads{place.removeprefix('thread')}"
        for place, number in places.items()
        if number > 1
    }
    return "".join(f", with {its.get(place, f'its {place}')}" for place in list(places)[:_LISTED])


def _own_place(snapshot: RankSnapshot) -> str:
    """Return `in evaluation, in train.py:6 stuck, sleeping` of a rank: what is known of phase, line and state."""
    line, what = user_line(snapshot), doing(snapshot)
    at = f"in {line.place}" if line is not None else ""
    if line is not None and what.startswith("in C code"):
        at, what = "", what.replace("in C code", f"in C code called at {at.removeprefix('in ')}", 1)

    phase = _phase_text(snapshot) if line is None or snapshot.phase != "outside" else ""  # a line says more
    return ", ".join(part for part in (phase, at, what) if part) or "in unknown code"


def _seen_text(found: DetectedHang, ranks: Sequence[int]) -> str:
    """Return `, last seen at train.py:6 stuck` of a rank that could not report where it is."""
    snapshot = found.snapshots.get(ranks[0]) if len(ranks) == 1 else None
    seen = snapshot.seen_line if snapshot is not None and user_line(snapshot) is None else None
    return f", last seen at {seen.place}" if seen is not None else ""


def _phase_text(snapshot: RankSnapshot) -> str:
    if not snapshot.phase or snapshot.phase == "other":
        return ""

    return "at its end" if snapshot.phase == "exit" else f"in {phase_words(snapshot.phase)}"


def _places(found: DetectedHang, ranks: Iterable[int]) -> str:
    """Return where ranks are, those at one place together: `rank 0 in ..., ranks 1-3 in ...`."""
    parts = [f"{ranks_text(at)} {place}" for place, at in _by_place(ranks, lambda rank: _place(found, rank))]
    more = f", and {plural(len(parts) - _LISTED, 'other place')}" if len(parts) > _LISTED else ""
    return ", ".join(parts[:_LISTED]) + more


def _by_place(ranks: Iterable[int], place: Callable[[int], str]) -> list[tuple[str, list[int]]]:
    found: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        found[place(rank)].append(rank)

    return list(found.items())


def _where_they_wait(found: DetectedHang, ranks: Sequence[int], of: str = "") -> str:
    """Return `all_reduce #15 (train.py:28 main)` of ranks that wait in one operation, with their different lines."""
    wait, snapshot = found.blame.waits[ranks[0]], found.snapshots[ranks[0]]
    what = operation_text(wait) or (phase_words(snapshot.phase) if snapshot.phase else "a collective")
    callers = [calling_thread(found.snapshots[rank], wait) for rank in ranks]
    if callers[0] is not None and len(set(callers)) == 1:
        return f"{what}{of} in {'its' if len(ranks) == 1 else 'their'} {_caller_text(callers[0], snapshot)}"

    called = zip(callers, ranks, strict=True)
    known = filter(None, (each.line if each else user_line(found.snapshots[rank]) for each, rank in called))
    lines = list(dict.fromkeys(line.place for line in known))
    at = f" ({', '.join(lines[:_LISTED])}{', …' if len(lines) > _LISTED else ''})" if lines else ""
    phase = _phase_text(snapshot) if wait.operation and snapshot.phase not in ("comm", "outside") else ""
    return f"{what}{of}{phase and f' {phase}'}{at}"


def _caller_text(thread: ThreadSnapshot, snapshot: RankSnapshot) -> str:
    """Return `thread 'metrics' in train.py:10 publish, while train.py:19 main is waiting for a lock`."""
    line, what = user_line(snapshot), "" if is_in_collective(snapshot) else doing(snapshot)
    if line is None:
        return _thread_place(thread)

    return f"{_thread_place(thread)}, {f'while {line.place} is {what}' if what else f'beside {line.place}'}"


def _rivals_text(found: DetectedHang) -> str:
    """Return the sentence about a thread in a collective, where ranks are in different ones."""
    rival = rivals(found)
    if rival is None:
        return ""

    ranks, thread = rival
    return f" On {ranks_text(ranks)} the {_thread_place(thread)} is in a collective, too."


def rivals(found: DetectedHang) -> tuple[list[int], ThreadSnapshot] | None:
    """Return the ranks in different collectives that have a thread in one, too, and that of the first of them."""
    threads = {rank: rival_thread(found.snapshots[rank], found.blame.waits[rank]) for rank in found.blame.apart}
    ranks = [rank for rank, thread in threads.items() if thread is not None]
    first = threads[ranks[0]] if ranks else None
    return None if first is None else (ranks, first)


def _waiters_text(found: DetectedHang) -> str:
    """Return `; rank 0 waits for it in all_reduce #15 (train.py:28 main)`."""
    named = found.blame.ranks
    waiting = sorted(found.blame.waits.keys() - {*named, *found.blame.apart})
    if not waiting:
        return ""

    it = "it" if len(named) == 1 else "them"
    (place, ranks), *others = _by_place(waiting, lambda rank: _where_they_wait(found, [rank]))
    first = f"{ranks_text(ranks)} {'waits' if len(ranks) == 1 else 'wait'} for {it} in {place}"
    more = [f"{ranks_text(ranks)} in {place}" for place, ranks in others]
    return "; " + ", ".join([first, *more[: _LISTED - 1]]) + (", …" if len(more) >= _LISTED else "")


def _age(found: DetectedHang, ranks: Sequence[int] = ()) -> str:
    return duration_text(
        min((found.snapshots[rank].quiet_s for rank in ranks if rank in found.snapshots), default=found.quiet_s)
    )
