"""Commands: what launchers and people ask of the aggregator, and what it passes on to ranks."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.streams import Stream
from traceml.transport.server import Peer

if TYPE_CHECKING:
    from traceml.aggregator.aggregator import Aggregator

__all__ = ["CommandError", "Commands"]

# A launcher says that its processes have ended; what they wrote last may still lie in our sockets.
_DRAIN_LOOKS, _DRAIN_LOOK_S = 200, 0.01
_END_TRIES, _END_PAUSE_S = 25, 0.2
_ANSWER_S = 10.0

_log = logging.getLogger("traceml")


class CommandError(Exception):
    """A command that cannot be done; the text goes back to who gave it."""


@dataclass(slots=True)
class _RankQuery:
    """A command passed on to ranks, and what they answered so far."""

    waiting: set[int]
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def answer(self, rank: int, reply: dict[str, Any]) -> None:
        self.answers[rank] = reply
        self.waiting.discard(rank)
        if not self.waiting:
            self.done.set()


class Commands:
    """Answers `command{id, name, args}`.

    Args:
        aggregator: whose commands they are.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator
        self._numbers = itertools.count(1)
        self._questions: dict[int, _RankQuery] = {}
        self._own: dict[str, Callable[[Peer, dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "status": self._status,
            "exits": self._exits,
            "finish": self._finish,
            "deliveries": self._deliveries,
            "stop": self._stop,
        }

    async def run(self, peer: Peer, message: dict[str, Any]) -> None:
        """Do one command and reply, whatever comes of it."""
        number, name = message.get("id"), str(message.get("name"))
        args = message.get("args")
        try:
            reply = await self._own.get(name, self._pass_on)(peer, {"name": name, **(args or {})})
        except CommandError as error:
            reply = {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - a command that fails must not take the aggregator with it
            _log.exception("command %r failed", name)
            reply = {"error": f"internal error: {error!r}"}

        peer.send({"t": "reply", "id": number, **reply})

    def answered(self, stream: Stream, reply: dict[str, Any]) -> None:
        """Take a rank's reply to a command that was passed on to it."""
        question = self._questions.get(reply.get("id", 0))
        if question is not None:
            question.answer(stream.rank, {key: value for key, value in reply.items() if key not in ("t", "id")})

    async def _status(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        return {"pid": os.getpid(), **self._aggregator.statistics()}

    async def _exits(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        run = self._run_of(peer)
        exits = args.get("exits")
        for told in exits if isinstance(exits, list) else []:
            if isinstance(told, dict):
                run.exited(told)

        run.commit(force=True)
        return {}

    async def _finish(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        run = self._run_of(peer)
        status = args["status"] if isinstance(args.get("status"), int) else None
        for _ in range(_DRAIN_LOOKS):
            if not run.is_connected:
                break

            await asyncio.sleep(_DRAIN_LOOK_S)

        run.give_up_waiting(status)
        for _ in range(_END_TRIES):
            if run.ended or await self._aggregator.end(run, status):
                break

            await asyncio.sleep(_END_PAUSE_S)
        else:
            raise CommandError(f"the last rows of run {run.id} cannot be stored; see the aggregator's log")

        return {"state": run.state, "run_dir": str(run.path)}

    async def _deliveries(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Tell whether what a run that is over has logged is still on its way to trackers."""
        return {"busy": self._aggregator.is_delivering(self._run_of(peer).path)}

    async def _stop(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        asyncio.get_running_loop().call_soon(self._aggregator.stop)
        return {}

    async def _pass_on(self, peer: Peer, args: dict[str, Any]) -> dict[str, Any]:
        """Pass a command on to the ranks in `ranks`, or to all, and gather what they answer."""
        run = self._run_of(peer)
        name = args.pop("name")
        ranks = args.pop("ranks", None)
        asked = [stream for stream in run.connected if ranks is None or stream.rank in ranks]
        if not asked:
            raise CommandError(f"no rank of run {run.id} is connected")

        number = next(self._numbers)
        question = self._questions[number] = _RankQuery({stream.rank for stream in asked})
        for stream in asked:
            if stream.peer is not None:
                stream.peer.send({"t": "command", "id": number, "name": name, "args": args})

        try:
            async with asyncio.timeout(_ANSWER_S):
                await question.done.wait()
        except TimeoutError:
            pass  # those who did not answer are named in the reply
        finally:
            del self._questions[number]

        replies = [{"rank": rank, **answer} for rank, answer in sorted(question.answers.items())]
        return {"replies": replies, "missing": sorted(question.waiting)}

    def _run_of(self, peer: Peer) -> ActiveRun:
        wanted = peer.hello.run if peer.hello is not None else ""
        run = self._aggregator.registry.find(wanted)
        if run is None:
            raise CommandError(f"there is no run {wanted!r} here" if wanted else "there is no run here yet")

        return run
