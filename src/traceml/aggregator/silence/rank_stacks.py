"""The answer to the command `stacks`: each rank's snapshot, with equal stacks once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from traceml.aggregator.silence.silent_ranks import silent_snapshots
from traceml.database.silent_snapshots import SilentSnapshots, silent_s

if TYPE_CHECKING:
    from traceml.aggregator.streams import Stream
    from traceml.database.snapshots import RankSnapshot

__all__ = ["snapshots_from_outside", "stacks_reply"]

_SILENT_S = 1.0  # a rank that only lacks a core is not asked by a signal


async def snapshots_from_outside(streams: Sequence[Stream], *, is_last: bool = False) -> dict[Stream, RankSnapshot]:
    """Take snapshots of ranks of this host that did not answer; those of other hosts are left out.

    Args:
        streams: the ranks.
        is_last: whether the job is being ended.
    """
    known = [(stream, snapshots) for stream in streams if (snapshots := silent_snapshots(stream)) is not None]
    made = await asyncio.gather(*(asyncio.to_thread(_snapshot, snapshots, is_last) for _, snapshots in known))
    return {stream: snapshot for (stream, _), snapshot in zip(known, made, strict=True) if snapshot is not None}


def stacks_reply(
    streams: Sequence[Stream],
    answers: Mapping[int, Mapping[str, Any]],
    silent: Mapping[Stream, RankSnapshot],
    absent: Iterable[int] = (),
) -> dict[str, Any]:
    """Return the reply: `ranks`, of which each has the number of its stack in `stacks`, and `missing`.

    Args:
        streams: the ranks that were asked.
        answers: rank -> its reply, with the snapshot as `result`.
        silent: snapshots from outside of those that did not answer.
        absent: ranks that have never connected: their hosts and processes are not known.
    """
    ranks: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = [
        {"rank": rank, "host": "", "pid": 0, "why": "it has not connected"} for rank in sorted(absent)
    ]
    stacks: dict[str, tuple[int, Any]] = {}
    for stream in sorted(streams, key=lambda each: each.rank):
        about = {"rank": stream.rank, "host": stream.incarnation.host, "pid": stream.incarnation.pid}
        snapshot = _row(stream, answers, silent)
        if snapshot is None:
            missing.append(about | {"why": str(answers.get(stream.rank, {}).get("error", "it did not answer"))})
            continue

        frames = snapshot.pop("frames", [])
        number, _ = stacks.setdefault(repr(frames), (len(stacks), frames))
        ranks.append({**snapshot, **about, "stack": number})

    return {"ranks": ranks, "stacks": [frames for _, frames in stacks.values()], "missing": missing}


def _snapshot(snapshots: SilentSnapshots, is_last: bool) -> RankSnapshot | None:
    words = snapshots.words()
    return snapshots.make(is_last=is_last) if words is not None and silent_s(words) >= _SILENT_S else None


def _row(
    stream: Stream, answers: Mapping[int, Mapping[str, Any]], silent: Mapping[Stream, RankSnapshot]
) -> dict[str, Any] | None:
    answer = answers.get(stream.rank, {}).get("result")
    if isinstance(answer, dict):
        return dict(answer)

    return silent[stream].to_row() if stream in silent else None
