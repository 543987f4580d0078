"""Commands of launchers and users: answered by the aggregator, or forwarded to ranks."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.alerts.finding_profiles import FindingProfiles
from traceml.aggregator.joined_nodes import JoinedNodes
from traceml.aggregator.registry import Registry
from traceml.aggregator.silent_ranks.silent_ranks import store_snapshot
from traceml.aggregator.silent_ranks.stacks_reply import snapshots_from_outside, stacks_reply
from traceml.aggregator.streams.stream import RankStream
from traceml.database.snapshots.rank_snapshot import RankSnapshot
from traceml.fail_open import fail_open
from traceml.ids import safe_run_id
from traceml.track.tracker_state import TrackerState
from traceml.transport.exit_report import ExitReport
from traceml.transport.server import Peer

__all__ = ["CommandError", "Commands"]

# A launcher reports the end of its processes; their last rows may still be in our sockets.
_DRAIN_POLLS, _DRAIN_POLL_S = 200, 0.01
_END_TRIES, _END_PAUSE_S = 25, 0.2
_ANSWER_S = 10.0
# A rank's recorder wakes at least twice a second, and ten times while the rank makes no progress.
_SNAPSHOT_S, _LAST_SNAPSHOT_S = 2.0, 0.2

_log = logging.getLogger("traceml")


class CommandTarget(Protocol):
    """Part of the aggregator that commands use."""

    registry: Registry
    profiles: FindingProfiles

    def statistics(self) -> dict[str, Any]:
        """Return counters of the server and of each open run."""

    async def end(self, run: ActiveRun, status: int | None = None) -> bool:
        """Close a run and write its report; return False while its rows cannot be stored."""

    def is_delivering(self, path: Path) -> bool:
        """Whether rows of an ended run are still being delivered to trackers."""

    def stop(self) -> None:
        """Stop the aggregator."""


class CommandError(Exception):
    """A command that cannot be carried out; the text goes back to its sender."""


class _RankQuery(msgspec.Struct):
    """A command that was forwarded to ranks, and their answers so far."""

    waiting: set[int]
    answers: dict[int, dict[str, Any]] = {}
    done: asyncio.Event = msgspec.field(default_factory=asyncio.Event)

    def answer(self, rank: int, reply: dict[str, Any]) -> None:
        self.answers[rank] = reply
        self.waiting.discard(rank)
        if not self.waiting:
            self.done.set()


class Commands:
    """Handler of `command{id, name, args}`."""

    def __init__(self, aggregator: CommandTarget) -> None:
        self._aggregator = aggregator
        self._numbers = itertools.count(1)
        self._queries: dict[int, _RankQuery] = {}
        self._nodes = JoinedNodes()
        self._own: dict[str, Callable[[Peer, dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "status": self._status,
            "exits": self._exits,
            "finish": self._finish,
            "join": self._join,
            "leave": self._leave,
            "archive": self._archive,
            "deliveries": self._deliveries,
            "trackers": self._trackers,
            "stacks": self._stacks,
            "profile_later": self._profile_later,
            "snapshot_from_outside": self._snapshot_from_outside,
            "stop": self._stop,
        }

    async def run(self, peer: Peer, message: dict[str, Any]) -> None:
        """Carry out one command and reply, also after an error."""
        number, name = message.get("id"), str(message.get("name"))
        args = message.get("args") or {}
        try:
            if not isinstance(args, dict):
                raise CommandError(f"the command's args are a map, not a {type(args).__name__}")

            with fail_open(_log, "aggregator", f"command {name!r} failed", reraise=CommandError) as guarded:
                reply = await self._own.get(name, self._forward)(peer, {"name": name, **args})

            if guarded.error is not None:
                reply = {"error": f"internal error: {guarded.error!r}"}
        except CommandError as error:
            reply = {"error": str(error)}

        peer.send({"t": "reply", "id": number, **reply})

    def take_reply(self, stream: RankStream, reply: dict[str, Any]) -> None:
        """Add a rank's reply to a forwarded command."""
        number = reply.get("id")
        query = self._queries.get(number) if isinstance(number, int) else None
        if query is not None:
            query.answer(stream.rank, {key: value for key, value in reply.items() if key not in ("t", "id")})

    async def _status(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        return {"pid": os.getpid(), **self._aggregator.statistics()}

    async def _exits(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        run = self._run_of(peer)
        exits = args.get("exits")
        if run.ended:  # too late: this aggregator is stopping
            return {}

        for message in exits if isinstance(exits, list) else []:
            if (report := ExitReport.from_message(message)) is not None:
                run.take_exit(report)

        run.commit(force=True)
        return {}

    async def _finish(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        run = self._run_of(peer)
        status = args["status"] if isinstance(args.get("status"), int) else None
        for _ in range(_DRAIN_POLLS):
            if not run.is_connected:
                break

            await asyncio.sleep(_DRAIN_POLL_S)

        await self._nodes.left(run.id)
        run.note_ending(args.get("ended_by"))
        run.end_remaining(status)
        for _ in range(_END_TRIES):
            if await self._aggregator.end(run, status):
                break

            await asyncio.sleep(_END_PAUSE_S)
        else:
            raise CommandError(f"the last rows of run {run.id} cannot be stored; see the aggregator's log")

        return {"state": run.state, "run_dir": str(run.path)}

    async def _join(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        """Take the ranks of another node into the run, which may not have begun."""
        run_id = self._run_id_of(peer)
        self._nodes.join(run_id, args)
        return {"run_dir": str(self._aggregator.registry.runs_dir / run_id)}

    async def _leave(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        self._nodes.leave(self._run_id_of(peer), args)
        run = self._aggregator.registry.find(self._run_id_of(peer))
        if run is not None and not run.ended and not run.has_ending:
            run.note_ending(args.get("ended_by"))

        return {}

    async def _archive(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        run_dir = self._aggregator.registry.runs_dir / self._run_id_of(peer)
        try:
            path = await self._nodes.take_archive(run_dir, args)
        except (OSError, ValueError) as error:
            raise CommandError(str(error)) from error

        return {} if path is None else {"path": str(path)}

    async def _deliveries(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Report whether rows of an ended run are still being delivered to trackers."""
        return {"busy": self._aggregator.is_delivering(self._run_of(peer).path)}

    async def _trackers(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        """Report what trackers have: for ranks on hosts that do not see the run's folder."""
        path, backends = self._run_of(peer).path, args.get("backends")
        states = [TrackerState.load(path, str(each)) for each in (backends if isinstance(backends, list) else [])]
        found = [{"backend": each.backend, "phase": str(each.phase), "reached": each.reached} for each in states]
        return {"trackers": found}

    async def _profile_later(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        run, after_s = self._run_of(peer), args.get("after_s")
        if not isinstance(after_s, int | float) or after_s <= 0:
            raise CommandError("after_s has to be a number of seconds above 0")

        path = self._aggregator.profiles.profile_later(run, float(after_s))
        if path is None:
            raise CommandError(f"run {run.id} has already been profiled automatically: that is done once per run")

        return {"path": str(path)}

    async def _stop(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        asyncio.get_running_loop().call_soon(self._aggregator.stop)
        return {}

    async def _forward(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        """Forward a command to the ranks in `ranks`, or to all, and collect their answers."""
        run = self._run_of(peer)
        name = args.pop("name")
        ranks = args.pop("ranks", None)
        asked = [each for each in _askable(run) if ranks is None or each.rank in ranks]
        if not asked:
            raise CommandError(f"no rank of run {run.id} is connected")

        query = await self._ask(asked, name, args, _ANSWER_S)
        replies = [{"rank": rank, **answer} for rank, answer in sorted(query.answers.items())]
        return {"replies": replies, "missing": sorted(query.waiting)}

    async def _stacks(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        """Take a snapshot of each rank: by asking it, or from outside where it does not answer."""
        run = self._run_of(peer)
        asked, is_last = _askable(run), args.get("last") is True
        query = await self._ask(asked, "snapshot", {"last": is_last}, _LAST_SNAPSHOT_S if is_last else _SNAPSHOT_S)
        waiting = [stream for stream in asked if stream.rank in query.waiting]
        found = await snapshots_from_outside(run, waiting, is_last=is_last)
        if not asked and not found:
            raise CommandError(f"no rank of run {run.id} is connected")

        if is_last:
            run.commit(force=True)

        silent = {process.rank: snapshot for process, snapshot in found.items()}
        absent = set(range(run.world_size)) - {stream.rank for stream in run.streams}
        for rank in {stream.rank for stream in waiting} | absent:
            if rank not in silent and (reported := run.live.snapshot_from_outside(rank)) is not None:
                silent[rank] = reported  # by the agent of its host

        here = {process.rank: process for process in found if process.stream is None}
        return stacks_reply(asked, query.answers, silent, {rank: here.get(rank) for rank in absent | here.keys()})

    async def _snapshot_from_outside(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        """Take an agent's snapshot of a rank of its host: `{host, rank, pid, snapshot, job}`."""
        run, who = self._run_of(peer), (args.get("host"), args.get("rank"), args.get("pid"))
        if not isinstance(args.get("snapshot"), dict):
            return {}

        job = args["job"] if isinstance(args.get("job"), dict) else {}
        run.expect(job)

        snapshot = RankSnapshot.from_row(args["snapshot"])
        for stream in run.connected:
            about = (stream.incarnation.host, stream.rank, stream.incarnation.pid)
            if about == who and not stream.is_helper:
                store_snapshot(run, stream, snapshot)

        if 0 <= snapshot.rank < run.world_size and run.lacks({**job, "rank": snapshot.rank}):
            run.live.absent_elsewhere.add(snapshot.rank)
            store_snapshot(run, None, snapshot)

        return {}

    async def _ask(self, streams: Sequence[RankStream], name: str, args: dict[str, Any], limit_s: float) -> _RankQuery:
        """Send a command to ranks, and wait for their answers; `waiting` of the result did not answer in time."""
        number = next(self._numbers)
        query = self._queries[number] = _RankQuery({stream.rank for stream in streams})
        for stream in streams:
            if stream.peer is not None:
                stream.peer.send({"t": "command", "id": number, "name": name, "args": args})

        if not streams:
            query.done.set()

        try:
            async with asyncio.timeout(limit_s):
                await query.done.wait()
        except TimeoutError:
            pass  # the reply names the ranks that did not answer
        finally:
            del self._queries[number]

        return query

    def _run_id_of(self, peer: Peer) -> str:
        """Return the run of a command, also if it has not begun.

        Raises:
            CommandError: it names none.
        """
        try:
            return safe_run_id(peer.hello.run if peer.hello is not None else "")
        except ValueError as error:
            raise CommandError(str(error)) from error

    def _run_of(self, peer: Peer) -> ActiveRun:
        wanted = peer.hello.run if peer.hello is not None else ""
        run = self._aggregator.registry.find(wanted)
        if run is None:
            raise CommandError(f"there is no run {wanted!r} here" if wanted else "there is no run here yet")

        return run


def _askable(run: ActiveRun) -> list[RankStream]:
    """Return the connected ranks of a run.

    Raises:
        CommandError: they are connected to the aggregators of their hosts, which carry out commands.
    """
    ranks = [stream for stream in run.connected if not stream.is_helper]
    if ranks and all(stream.is_relayed for stream in ranks):
        hosts = sorted({stream.incarnation.host for stream in ranks})
        where = f"{', '.join(hosts[:3])}{', ...' if len(hosts) > 3 else ''}"
        raise CommandError(f"the ranks of run {run.id} are connected to the aggregators of their hosts: ask on {where}")

    return [stream for stream in ranks if not stream.is_relayed]
