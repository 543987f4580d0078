"""Text of `traceml stacks`: ranks with equal stacks together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from traceml.database.looks import FrameLook, GroupLook, RankLook, WorkerLook
from traceml.formatting import duration_text, line_text, phase_label, plural, printable, ranks_text

__all__ = ["MissingRank", "RankStack", "stacks_text"]

_STANDS_S = 2.0
_STATES = {
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "waiting for a disk or a device",
    "Z": "dead",
    "X": "gone",
}


@dataclass(frozen=True, slots=True)
class RankStack:
    """A rank's host, process id, and the look at it."""

    host: str
    pid: int
    look: RankLook


@dataclass(frozen=True, slots=True)
class MissingRank:
    """A rank of which nothing is known now: its host, and why."""

    rank: int
    host: str
    why: str


def stacks_text(ranks: Sequence[RankStack], missing: Sequence[MissingRank] = ()) -> str:
    """Return the stacks of a job, the largest group of equal ones first.

    Args:
        ranks: the ranks that were looked at.
        missing: the others.
    """
    groups: dict[object, list[RankStack]] = {}
    for each in ranks:
        groups.setdefault(_key(each.look), []).append(each)

    parts = [_group_text(group) for group in sorted(groups.values(), key=lambda each: (-len(each), each[0].look.rank))]
    parts += [_missing_text(missing)] if missing else []
    return printable("\n\n".join(parts), lines=True)


def _key(look: RankLook) -> object:
    """Return all that is said of a rank, but step and time: what is said of a group must be true of each."""
    stuck = [(worker.index, worker.pid, worker.frames) for worker in look.workers if worker.waits_for_batch is not None]
    return look.phase, look.frames, _operation(look.groups), tuple(_why_silent(look)), tuple(stuck), look.threads


def _group_text(group: Sequence[RankStack]) -> str:
    looks = [each.look for each in group]
    first = looks[0]
    ranks = ranks_text(look.rank for look in looks) if len(looks) > 1 else f"rank {first.rank}"
    of_one = f" ({group[0].host}, pid {group[0].pid})" if len(group) == 1 else ""
    lines = [f"{ranks}{of_one}: {', '.join(_facts(looks))}"]
    lines += [f"  {text}" for text in (_operation(first.groups), *_why_silent(first)) if text]
    lines += _frames(first.frames, "  ") or ["  no Python stack"]
    lines += [f"  thread {each.name!r}: {_line(each.line)}" for each in first.threads if each.line]
    for worker in first.workers:
        lines += _worker(worker) if worker.waits_for_batch is not None else []

    return "\n".join(lines)


def _facts(looks: Sequence[RankLook]) -> Iterable[str]:
    steps = sorted({look.step for look in looks})
    if steps[-1] >= 0:
        yield f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"

    yield phase_label(looks[0].phase)
    shortest, longest = min(look.quiet_s for look in looks), max(look.quiet_s for look in looks)
    if longest >= _STANDS_S:
        least = f"{duration_text(shortest)} to " if longest - shortest > _STANDS_S else ""
        yield f"no progress for {least}{duration_text(longest)}"


def _why_silent(look: RankLook) -> Iterable[str]:
    """Say why the rank could not answer itself, and what it waits for."""
    if look.process_state in _STATES:
        yield _STATES[look.process_state]
    elif look.answered == "signal":
        yield f"holds the GIL in C code, {'computing' if look.process_state == 'R' else 'waiting'}"
    elif look.answered == "kernel":
        yield f"does not answer; {'it runs' if look.process_state == 'R' else f'it sleeps in {look.wchan}'}"

    if look.waits_on:
        yield f"waits on {look.waits_on}"

    if look.blocker is not None:
        yield f"waits for process {look.blocker.pid} ({look.blocker.name})"


def _operation(groups: Sequence[GroupLook]) -> str:
    running = [each for each in groups if each.in_flight and each.operation]
    return "; ".join(f"{_operation_name(each)} is not done" for each in running)


def _operation_name(group: GroupLook) -> str:
    if group.is_p2p:
        way = "from" if "recv" in group.operation else "to"
        return group.operation + (f" {way} rank {group.peer}" if group.peer is not None else "")

    return f"{group.operation} {group.number} of {f'group {group.name}' if group.name else 'the default group'}"


def _frames(frames: Sequence[FrameLook], indent: str) -> list[str]:
    return [f"{indent}{'>' if each.is_user else ' '} {_line(each)}" for each in frames]


def _line(frame: FrameLook) -> str:
    return line_text(frame.file, frame.line, frame.function)


def _worker(worker: WorkerLook) -> list[str]:
    head = f"  waits for batch {worker.waits_for_batch} of loader worker {worker.index} (pid {worker.pid})"
    asleep = f", which sleeps in {worker.wchan}" if worker.state == "S" and worker.wchan else ""
    running = ", which runs" if worker.state == "R" else ""
    ended = f", which is {_STATES[worker.state]}" if worker.state in _STATES else ""
    return [f"{head}{asleep}{running}{ended}", *_frames(worker.frames, "    ")]


def _missing_text(missing: Sequence[MissingRank]) -> str:
    if len(missing) > 1:
        hosts = sorted({each.host for each in missing})
        where = f"on {plural(len(hosts), 'host')}: {', '.join(hosts[:5])}"
        return f"{ranks_text(each.rank for each in missing)} did not answer, {where}"

    return f"rank {missing[0].rank} on {missing[0].host}: {missing[0].why}"
