"""The answer to the command `stacks`: each rank's snapshot, with equal stacks once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from traceml.aggregator.silent_ranks.silent_ranks import RankProcess, UnconnectedRanks, store_snapshot
from traceml.database.snapshots.external_snapshots import ExternalSnapshots, silent_s

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams.stream import RankStream
    from traceml.database.snapshots.rank_snapshot import RankSnapshot

__all__ = ["snapshots_from_outside", "stacks_reply"]

_SILENT_S = 1.0  # a rank that only lacks a core is not asked by a signal


async def snapshots_from_outside(
    run: ActiveRun, streams: Sequence[RankStream], *, is_last: bool = False
) -> dict[RankProcess, RankSnapshot]:
    """Take snapshots of ranks of this host: of those that did not answer, and of those that have never connected.

    Args:
        streams: the ranks that did not answer; those of other hosts are left out.
        is_last: whether the job is being ended: then the snapshots are stored.
    """
    known = [process for process in map(RankProcess.of, streams) if process is not None]
    asked = [*known, *UnconnectedRanks(run).find()]
    made = await asyncio.gather(*(asyncio.to_thread(_snapshot, each.snapshots(), is_last) for each in asked))
    found = {process: snapshot for process, snapshot in zip(asked, made, strict=True) if snapshot is not None}
    if is_last:
        for process, snapshot in found.items():
            store_snapshot(run, process.stream, snapshot)

    return found


def stacks_reply(
    streams: Sequence[RankStream],
    answers: Mapping[int, Mapping[str, Any]],
    silent: Mapping[int, RankSnapshot],
    absent: Mapping[int, RankProcess | None] | None = None,
) -> dict[str, Any]:
    """Return the reply: `ranks`, of which each has the number of its stack in `stacks`, and `missing`.

    Args:
        answers: rank -> its reply, with the snapshot as `result`.
        silent: rank -> snapshot from outside, of those that did not answer.
        absent: ranks that have never connected, with their processes where these are on this host.
    """
    ranks: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    stacks: dict[str, tuple[int, Any]] = {}
    for about, why in _asked(streams, answers, absent or {}):
        rank = about["rank"]
        snapshot = _row(answers.get(rank, {}).get("result"), silent.get(rank))
        if snapshot is None:
            missing.append(about | {"why": why})
            continue

        frames = snapshot.pop("frames", [])
        number, _ = stacks.setdefault(repr(frames), (len(stacks), frames))
        ranks.append({**snapshot, **about, "stack": number})

    return {"ranks": ranks, "stacks": [frames for _, frames in stacks.values()], "missing": missing}


def _asked(
    streams: Sequence[RankStream],
    answers: Mapping[int, Mapping[str, Any]],
    absent: Mapping[int, RankProcess | None],
) -> list[tuple[dict[str, Any], str]]:
    """Return rank, host and process of each rank, and why there is no answer if there is none."""
    found = []
    for rank, process in absent.items():
        host, pid = (socket.gethostname(), process.pid) if process is not None else ("", 0)
        found.append(({"rank": rank, "host": host, "pid": pid}, "it has not connected"))

    for stream in streams:
        why = str(answers.get(stream.rank, {}).get("error", "it did not answer"))
        found.append(({"rank": stream.rank, "host": stream.incarnation.host, "pid": stream.incarnation.pid}, why))

    return sorted(found, key=lambda each: each[0]["rank"])


def _snapshot(snapshots: ExternalSnapshots, is_last: bool) -> RankSnapshot | None:
    slots = snapshots.slots()
    return snapshots.make(is_last=is_last) if slots is not None and silent_s(slots) >= _SILENT_S else None


def _row(answer: Any, silent: RankSnapshot | None) -> dict[str, Any] | None:
    if isinstance(answer, dict):
        return dict(answer)

    return silent.to_row() if silent is not None else None
