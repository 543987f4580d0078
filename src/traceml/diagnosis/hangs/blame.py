"""Comparison of the snapshots of all ranks: which of them the others wait for.

A rank that waits in a collective waits for the members of its group that have not come to it: their number is lower, or
they have ended. From rank to rank this leads to one that waits for nobody, or in a cycle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum

import msgspec

from traceml.database.snapshots.rank_snapshot import GroupSnapshot, RankSnapshot
from traceml.diagnosis.facts.ends import RankExit, ReadData, UnevenData, uneven_data
from traceml.diagnosis.hangs.rank_state import REMOTE_CALLS, collective_wait, device_wait, is_in_join

__all__ = ["RENDEZVOUS", "Blame", "HangCause", "blame"]

RENDEZVOUS = "init_process_group"
_Snapshots = Mapping[int, RankSnapshot]
_Waits = Mapping[int, GroupSnapshot]
"""Rank -> the operation that it waits in."""
_SAME_SIZES = ("all_reduce", "broadcast", "reduce", "allreduce")


class HangCause(StrEnum):
    """Cause of a hang, as the snapshots prove it."""

    NEVER_CAME = "never_came"  # some ranks do something else while the others wait for them
    ALONE = "alone"  # one rank is in a collective that no other has called
    ENDED = "ended"  # some ranks have ended, and the others wait for them
    MISMATCH = "mismatch"  # the same collective by its number, but another operation
    DATA_ENDED = "data_ended"  # the data of some ranks ended, after fewer batches than the others have had
    SIZES = "sizes"  # the same operation with other sizes
    ROOTS = "roots"  # the same operation, from or to another rank
    CYCLE = "cycle"  # ranks wait for each other in different groups
    NETWORK = "network"  # all are in the same collective
    RENDEZVOUS = "rendezvous"  # all are in init_process_group: they do not find each other
    STUCK = "stuck"  # no rank waits for another
    UNANSWERED = "unanswered"  # too little is known


_NEVER_CAME = (HangCause.NEVER_CAME, HangCause.ALONE)
_DIFFERENT: Mapping[HangCause, Callable[[GroupSnapshot], object]] = {
    HangCause.MISMATCH: lambda wait: wait.operation,
    HangCause.SIZES: lambda wait: wait.sizes if wait.operation in _SAME_SIZES else ("any",),
    HangCause.ROOTS: lambda wait: () if wait.peer is None else (wait.peer,),
}
"""What must be the same on all ranks in one collective; empty where it is not known."""
_APART = (*_DIFFERENT, HangCause.CYCLE)


class Blame(msgspec.Struct, frozen=True):
    """Ranks that block a job."""

    cause: HangCause
    ranks: tuple[int, ...]  # the ranks to name; empty for all
    waits: _Waits  # the operation that each waiting rank is in
    operation: GroupSnapshot | None = None  # the collective that the named ranks did not come to, or are in
    apart: tuple[int, ...] = ()  # ranks that have met in different operations, with different sizes or roots
    # how many batches the ranks have had, where the data of some ended before that of the others
    data: UnevenData | None = None
    has_ended: bool = False  # whether the named ranks have ended

    @property
    def is_certain(self) -> bool:
        """Whether the hang is certain at once: these ranks can never meet."""
        if self.operation is None or self.operation.number <= 0:
            return False

        is_met = self.cause is HangCause.DATA_ENDED and (
            self.has_ended or all(rank in self.waits and _is_known(self.waits[rank]) for rank in self.ranks)
        )
        return is_met or self.cause in (*_DIFFERENT, HangCause.ENDED)


def blame(snapshots: _Snapshots, ended: Mapping[int, RankExit], world_size: int) -> Blame:
    """Return which ranks block the job.

    Args:
        snapshots: of the ranks that run, by rank; none of them makes progress.
        ended: ends of the others.
    """
    met = _by_collectives(snapshots, ended, world_size)
    known = {rank: each.data for rank, each in ended.items() if each.data is not None}
    running = {rank: ReadData(each.batches, each.epoch, each.data_ended) for rank, each in snapshots.items()}
    data = uneven_data(known | running)
    return met if data is None else _of_data(met, data, snapshots)


def _of_data(met: Blame, data: UnevenData, snapshots: _Snapshots) -> Blame:
    """Return the blame of ranks that have left their loop over the data, if the others wait in theirs."""
    waiting = [wait for rank, wait in met.waits.items() if rank not in data.ranks]
    has_ended = met.cause is HangCause.ENDED
    if has_ended or met.cause in _NEVER_CAME:
        is_cause = set(met.ranks) <= set(data.ranks)
    else:
        are_apart = met.cause in _APART or _may_be_apart(met, snapshots)
        is_cause = are_apart and set(data.ranks) <= met.waits.keys()

    if not (waiting and is_cause):
        return met

    operation = min(waiting, key=lambda wait: wait.number)
    named = met.ranks if has_ended else data.ranks
    return Blame(HangCause.DATA_ENDED, named, met.waits, operation, data=data, has_ended=has_ended)


def _may_be_apart(met: Blame, snapshots: _Snapshots) -> bool:
    """Whether all ranks wait, and in which collective is not known of each: a busy host may not tell it in time.

    A rank in `Join` answers the collectives of the others, so they may be in the same one.
    """
    is_open = met.cause is HangCause.UNANSWERED and not met.ranks
    return is_open and snapshots.keys() == met.waits.keys() and not any(map(is_in_join, snapshots.values()))


def _is_known(wait: GroupSnapshot) -> bool:
    return wait.number > 0 or wait.is_p2p


def _by_collectives(snapshots: _Snapshots, ended: Collection[int], world_size: int) -> Blame:
    """Return which ranks block the job, by the collectives that they are in."""
    found = {rank: collective_wait(snapshot) for rank, snapshot in snapshots.items()} if world_size > 1 else {}
    waits = {rank: wait for rank, wait in found.items() if wait is not None}
    waits |= _device_waits(snapshots, waits, world_size)
    if not waits:
        return Blame(HangCause.STUCK, tuple(sorted(snapshots)), waits)

    targets = _targets(waits, snapshots, ended, world_size, waits)
    blockers = {rank for missing in set(targets.values()) for rank in missing if not targets.get(rank)}
    cycle = () if blockers else _cycle(targets)
    # Ranks that wait for none elsewhere; in a mesh some of them may have nobody who waits for them.
    last = {rank: wait for rank, wait in waits.items() if not blockers or not targets[rank]}
    last = last if blockers <= waits.keys() else {}
    different = _between_calls(waits, world_size) or _different(last, waits)
    if different is not None:
        return different

    if blockers:
        return _of_blockers(blockers, targets, waits, ended)

    if cycle:
        return Blame(HangCause.CYCLE, cycle, waits)

    if silent := set(range(world_size)) - snapshots.keys() - set(ended):
        return Blame(HangCause.UNANSWERED, tuple(sorted(silent)), waits)

    return _together(waits, snapshots)


def _together(waits: _Waits, snapshots: _Snapshots) -> Blame:
    """Return the blame of ranks of which none waits for a certain other one."""
    others = tuple(sorted(snapshots.keys() - waits.keys()))
    known = {(wait.name, wait.number, wait.operation) for wait in waits.values()}
    if others or len(known) > 1 or any(wait.is_p2p for wait in waits.values()):
        return Blame(HangCause.UNANSWERED, (), waits)

    met = next(iter(waits.values()))
    return Blame(HangCause.RENDEZVOUS if met.operation == RENDEZVOUS else HangCause.NETWORK, (), waits, met)


def _device_waits(snapshots: _Snapshots, waits: _Waits, world_size: int) -> dict[int, GroupSnapshot]:
    """Return the operations that ranks wait for on the device: running ranks have not come to them."""
    found = {rank: device_wait(snapshot) for rank, snapshot in snapshots.items() if rank not in waits}
    flying = {rank: wait for rank, wait in found.items() if wait is not None}
    targets = _targets(flying, snapshots, (), world_size, waits)
    return {rank: wait for rank, wait in flying.items() if targets[rank]}


def _targets(
    operations: _Waits, snapshots: _Snapshots, ended: Collection[int], world_size: int, waits: _Waits
) -> dict[int, frozenset[int]]:
    """Return the ranks that each rank waits for; ranks in one operation share the set, as there may be thousands."""
    missing: dict[object, frozenset[int]] = {}
    found = {}
    for rank, wait in operations.items():
        key = wait.name, wait.members, wait.number, wait.is_p2p, wait.peer
        if key not in missing:
            missing[key] = _missing(wait, snapshots, ended, world_size, waits)

        found[rank] = missing[key] - {rank} if rank in missing[key] else missing[key]

    return found


def _missing(
    wait: GroupSnapshot, snapshots: _Snapshots, ended: Collection[int], world_size: int, waits: _Waits
) -> frozenset[int]:
    """Return the ranks that have not come to an operation."""
    if wait.is_p2p and wait.peer is not None:
        return frozenset({wait.peer})

    return frozenset(
        member
        for member in wait.members or range(world_size)
        if member in ended or (member in snapshots and _is_behind(snapshots[member], wait, is_waiting=member in waits))
    )


def _is_behind(snapshot: RankSnapshot, wait: GroupSnapshot, *, is_waiting: bool) -> bool:
    """Whether a rank has not come to a collective that another one waits in."""
    if not snapshot.groups or wait.number <= 0 or wait.is_p2p:  # no numbers: who waits too is not blamed
        return not is_waiting

    own = next((group for group in snapshot.groups if group.name == wait.name and not group.is_p2p), None)
    return (own.number if own is not None else 0) < wait.number


def _cycle(targets: Mapping[int, frozenset[int]]) -> tuple[int, ...]:
    """Return the ranks that wait for each other: those for which none of them waits are left out, again and again."""
    ranks, before = set(targets), 0
    while len(ranks) != before:
        before = len(ranks)
        ranks &= frozenset().union(*{targets[rank] for rank in ranks})

    return tuple(sorted(ranks))


def _of_blockers(
    blockers: Collection[int], targets: Mapping[int, frozenset[int]], waits: _Waits, ended: Collection[int]
) -> Blame:
    gone = tuple(sorted(rank for rank in blockers if rank in ended))
    named = gone or tuple(sorted(blockers))
    awaiting = {missing for missing in set(targets.values()) if not missing.isdisjoint(named)}
    waiting = (waits[rank] for rank in sorted(waits) if targets[rank] in awaiting)
    operation = min(waiting, key=lambda wait: wait.number, default=None)
    if gone:
        return Blame(HangCause.ENDED, gone, waits, operation, has_ended=True)

    is_alone = len(waits) == 1 and len(named) > 1
    return Blame(HangCause.ALONE if is_alone else HangCause.NEVER_CAME, named, waits, operation)


def _different(last: _Waits, waits: _Waits) -> Blame | None:
    """Return the blame where ranks are in one collective by its number, but in different operations.

    Args:
        last: operations of the ranks that wait for none that is elsewhere.
        waits: operations of all that wait.
    """
    met: dict[tuple[str, tuple[int, ...], int], list[int]] = defaultdict(list)
    for rank, wait in last.items():
        if wait.number > 0 and not wait.is_p2p:
            met[wait.name, wait.members, wait.number].append(rank)  # a mesh names the groups of a dimension alike

    for ranks in met.values():
        for cause, key in _DIFFERENT.items():
            groups = defaultdict(list)
            for rank in ranks:
                groups[key(waits[rank])].append(rank)

            if len(groups) > 1 and all(groups):
                return Blame(cause, _minority(list(groups.values())), waits, waits[ranks[0]], tuple(ranks))

    return None


def _between_calls(waits: _Waits, world_size: int) -> Blame | None:
    """Return the blame where all ranks wait, some in one collective and the others in transfers with unknown peers.

    Neither can end: the collective lacks the ranks of the transfers, and these lack a peer that is in the collective.
    """
    meeting = {rank: wait for rank, wait in waits.items() if not wait.is_p2p}
    transfers = sorted(waits.keys() - meeting.keys())
    known = {(wait.name, wait.number, wait.operation) for wait in meeting.values()}
    if not transfers or len(known) != 1 or len(waits) < world_size:
        return None

    met = next(iter(meeting.values()))
    moved = [waits[rank] for rank in transfers]
    if met.number <= 0 or any(wait.peer is not None or wait.operation in REMOTE_CALLS for wait in moved):
        return None

    if not set(transfers) <= set(met.members or range(world_size)):
        return None

    return Blame(HangCause.MISMATCH, _minority([transfers, sorted(meeting)]), waits, moved[0], tuple(waits))


def _minority(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the ranks of all groups but the largest; those of all groups where none is the largest."""
    ordered = sorted(groups, key=len)
    named = ordered if len(ordered[-1]) == len(ordered[-2]) else ordered[:-1]
    return tuple(sorted(rank for group in named for rank in group))
