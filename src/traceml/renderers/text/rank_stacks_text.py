"""Text of `traceml stacks`: ranks with equal stacks together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from traceml.database.snapshots.rank_snapshot import (
    FrameSnapshot,
    GroupSnapshot,
    RankSnapshot,
    ThreadSnapshot,
    WorkerSnapshot,
)
from traceml.formatting import count_text, duration_text, phase_label, plural, printable, ranks_text

__all__ = ["MissingRank", "StacksRank", "stacks_text"]

_STUCK_S = 2.0
_STATES = {
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "waiting for a disk or a device, or frozen by its cgroup",
    "Z": "dead",
    "X": "gone",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StacksRank(RankSnapshot):
    """A rank of `traceml stacks`: where it runs, and the snapshot of it."""

    host: str = ""


@dataclass(frozen=True, slots=True)
class MissingRank:
    """A rank of which nothing is known now: its host, empty if it has never connected, and why."""

    rank: int
    host: str
    why: str


def stacks_text(ranks: Sequence[StacksRank], missing: Sequence[MissingRank] = ()) -> str:
    """Return the stacks of a job, the largest group of equal ones first."""
    groups: dict[object, list[StacksRank]] = {}
    for each in ranks:
        groups.setdefault(_key(each), []).append(each)

    parts = [_group_text(group) for group in sorted(groups.values(), key=lambda each: (-len(each), each[0].rank))]
    absent, silent = [each for each in missing if not each.host], [each for each in missing if each.host]
    parts += [_absent_text(absent)] if absent else []
    parts += [_missing_text(silent)] if silent else []
    return printable("\n\n".join(parts), lines=True)


def _key(snapshot: RankSnapshot) -> object:
    """Return everything printed about a rank except its step and time: a group prints it once for all its ranks."""
    stuck = [
        (worker.index, worker.pid, worker.frames) for worker in snapshot.workers if worker.waits_for_batch is not None
    ]
    return (
        snapshot.phase,
        snapshot.frames,
        _operation(snapshot.groups),
        tuple(_why_silent(snapshot)),
        tuple(stuck),
        snapshot.threads,
    )


def _group_text(group: Sequence[StacksRank]) -> str:
    first = group[0]
    ranks = ranks_text(each.rank for each in group) if len(group) > 1 else f"rank {first.rank}"
    of_one = f" ({first.host}, pid {first.pid})" if len(group) == 1 else ""
    lines = [f"{ranks}{of_one}: {', '.join(_facts(group))}"]
    lines += [f"  {text}" for text in (_operation(first.groups), *_why_silent(first)) if text]
    lines += _frames(first.frames, "  ") or ["  no Python stack"]
    lines += [_thread_text(each) for each in first.threads if each.line or each.collective]
    for worker in first.workers:
        lines += _worker(worker) if worker.waits_for_batch is not None else []

    return "\n".join(lines)


def _thread_text(thread: ThreadSnapshot) -> str:
    where = [thread.line.place] if thread.line else []
    where += [f"in {thread.collective}"] if thread.collective else []
    return f"  thread{thread.name and f' {thread.name!r}'}: {', '.join(where)}"


def _facts(snapshots: Sequence[RankSnapshot]) -> Iterable[str]:
    steps = sorted({snapshot.step for snapshot in snapshots})
    if steps[-1] >= 0:
        first, last = (count_text(steps[at]) for at in (0, -1))
        yield f"step {first}" if len(steps) == 1 else f"steps {first} to {last}"

    yield phase_label(snapshots[0].phase)
    shortest, longest = min(snapshot.quiet_s for snapshot in snapshots), max(snapshot.quiet_s for snapshot in snapshots)
    if longest >= _STUCK_S:
        least = f"{duration_text(shortest)} to " if longest - shortest > _STUCK_S else ""
        yield f"no progress for {least}{duration_text(longest)}"


def _why_silent(snapshot: RankSnapshot) -> Iterable[str]:
    """Say why the rank could not answer itself, and what it waits for."""
    if snapshot.process_state in _STATES:
        where = f" (in {snapshot.wchan})" if snapshot.process_state == "D" and snapshot.wchan else ""
        yield f"{_STATES[snapshot.process_state]}{where}"
    elif snapshot.is_waiting_for_gil:
        yield "waits for the GIL, which another thread holds in C code"
    elif snapshot.answered == "signal":
        yield f"holds the GIL in C code, {'computing' if snapshot.process_state == 'R' else 'waiting'}"
    elif snapshot.answered == "kernel":
        yield f"does not answer; {'it runs' if snapshot.process_state == 'R' else f'it sleeps in {snapshot.wchan}'}"

    if snapshot.waits_on:
        yield f"blocked on {snapshot.waits_on}"

    if snapshot.blocker is not None:
        yield f"waits for process {snapshot.blocker.pid} ({snapshot.blocker.name})"


def _operation(groups: Sequence[GroupSnapshot]) -> str:
    running = [each for each in groups if each.in_flight and each.operation]
    return "; ".join(f"{_operation_name(each)} is not done" for each in running)


def _operation_name(group: GroupSnapshot) -> str:
    if group.is_p2p:
        way = "from" if "recv" in group.operation else "to"
        return group.operation + (f" {way} rank {group.peer}" if group.peer is not None else "")

    return f"{group.operation} {group.number} of {f'group {group.name}' if group.name else 'the default group'}"


def _frames(frames: Sequence[FrameSnapshot], indent: str) -> list[str]:
    return [f"{indent}{'>' if each.is_user else ' '} {each.place}" for each in frames]


def _worker(worker: WorkerSnapshot) -> list[str]:
    head = f"  waits for batch {worker.waits_for_batch} of loader worker {worker.index} (pid {worker.pid})"
    asleep = f", which sleeps in {worker.wchan}" if worker.state == "S" and worker.wchan else ""
    running = ", which runs" if worker.state == "R" else ""
    ended = f", which is {_STATES[worker.state]}" if worker.state in _STATES else ""
    return [f"{head}{asleep}{running}{ended}", *_frames(worker.frames, "    ")]


def _absent_text(absent: Sequence[MissingRank]) -> str:
    has = "has" if len(absent) == 1 else "have"
    return (
        f"{ranks_text(each.rank for each in absent)} {has} not connected: still starting, or stuck before tracing began"
    )


def _missing_text(missing: Sequence[MissingRank]) -> str:
    if len(missing) > 1:
        hosts = sorted({each.host for each in missing})
        where = f"on {plural(len(hosts), 'host')}: {', '.join(hosts[:5])}"
        return f"{ranks_text(each.rank for each in missing)} did not answer, {where}"

    return f"rank {missing[0].rank} on {missing[0].host}: {missing[0].why}"
