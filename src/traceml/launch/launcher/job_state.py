"""What the agents of one job have told: who runs, has returned, has failed, is gone."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from traceml.errors import AgentFailedError
from traceml.launch.launcher.failures import Failure, died, raised, unprepared
from traceml.launch.launcher.job_host import Member, Worker
from traceml.launch.launcher.log_router import Feed, LogRouter
from traceml.launch.wire.payload import Receiver

if TYPE_CHECKING:
    from traceml.launch.launcher.tracing import Tracing

__all__ = ["Ledger", "MakeLogs"]

MakeLogs = Callable[[Mapping[str, int]], LogRouter]
"""Given the number of workers of each host, makes what takes their words."""

_RESULT_WINDOW_BYTES = 8 << 20

_log = logging.getLogger("traceml.launch")


class Ledger:
    """Takes what agents say, and keeps what follows from it.

    Args:
        members: the hosts, in the order of ranks.
        job: the job's id.
        make_logs: makes what takes the workers' words.
        prepare: called with each host whose agent has answered.
        tracing: the run that the job is traced as.

    Attributes:
        workers: by rank, once they are appointed.
        bad: hosts that cannot be used.
        failures: what went wrong with workers, and hosts that were lost while they ran; in the order of their coming.
        meeting: address and port at which the workers find each other.
        stacks: where workers were, by rank.
        told_stacks: the hosts that have told.
        stopping: whether workers are being ended, so that their end is no failure.
        released: whether that is because all had returned.
    """

    def __init__(
        self,
        members: Sequence[Member],
        job: str,
        *,
        make_logs: MakeLogs,
        prepare: Callable[[Member], None],
        tracing: Tracing | None,
    ) -> None:
        self.workers: list[Worker] = []
        self.bad: list[AgentFailedError] = []
        self.failures: list[Failure] = []
        self.meeting: tuple[str, int] | None = None
        self.stacks: dict[int, dict[str, Any]] = {}
        self.told_stacks: set[str] = set()
        self.stopping = self.released = False
        self._members, self._id, self._make_logs = members, job, make_logs
        self._prepare, self._tracing = prepare, tracing
        self._logs: LogRouter | None = None
        self._agents_words: dict[str, Feed] = {}
        self._early_words: list[tuple[Member, bytes]] = []

    def appoint(self, selector: selectors.BaseSelector) -> None:
        """Give out the ranks, host after host, in the order in which the user named them; and open the logs.

        Args:
            selector: the loop's.
        """
        for member in self._members:
            for local_rank in range(member.size):
                worker = Worker(len(self.workers), local_rank, member)
                member.workers.append(worker)
                self.workers.append(worker)

        self._logs = self._make_logs({member.name: member.size for member in self._members})
        selector.register(self._logs.fd, selectors.EVENT_READ, lambda _: self._settle())
        for member, data in self._early_words:
            self.said(member, data)

    def _settle(self) -> None:
        assert self._logs is not None
        self._logs.settle()

    def close(self) -> None:
        """Write what is still to be written to the logs."""
        if self._logs is None:
            return

        for feed in self._agents_words.values():
            feed.end()

        self._logs.close()

    def message(self, member: Member, message: dict[str, Any]) -> None:
        """Take a message of a host's agent."""
        name = message["t"]
        if name != "hello" and message.get("job", self._id) != self._id:
            return  # of a job before this one

        member.warm = False
        handler = _HANDLERS.get(name)
        if handler is not None:
            handler(self, member, message)

    def _on_hello(self, member: Member, message: dict[str, Any]) -> None:
        member.link.hello = message
        self._prepare(member)

    def _on_prepared(self, member: Member, message: dict[str, Any]) -> None:
        member.prepared = message
        if error := message.get("error"):
            self.bad.append(unprepared(member, error))

    def _on_reserved(self, member: Member, message: dict[str, Any]) -> None:
        if message.get("error"):
            reason = f"no port for the workers to meet at ({message['error']})"
            self.failures.append(Failure(AgentFailedError(member.name, reason)))
            return

        self.meeting = str(message["address"]), int(message["port"])

    def _on_started(self, _member: Member, message: dict[str, Any]) -> None:
        self.workers[message["rank"]].pid = message["pid"]

    def _on_group_ready(self, _member: Member, message: dict[str, Any]) -> None:
        self.workers[message["rank"]].ready = True

    def _on_stream(self, member: Member, message: dict[str, Any]) -> None:
        kind, channel = message.get("kind"), member.link.channel
        if kind == "log":
            self._take_log(member, message)
        elif kind in {"result", "error"}:
            self._receive(member, self.workers[message["rank"]], message)
        elif kind in {"tunnel", "flight"} and self._tracing is not None:
            self._tracing.opened(member.name, message, channel)

    def _take_log(self, member: Member, message: dict[str, Any]) -> None:
        assert self._logs is not None
        rank = int(message.get("rank", -1))
        local_rank = None if rank < 0 else int(message["local_rank"])
        feed = self._logs.open(member.name, local_rank, str(message["fd"]), rank=None if rank < 0 else rank)
        # what was written to files and screen is granted anew: who writes more waits, and holds up nobody else
        feed.grant = member.link.channel.accept(message["id"], feed.feed, feed.end, manual=True).grant

    def _receive(self, member: Member, worker: Worker, message: dict[str, Any]) -> None:
        path = message.get("path")
        receiver = worker.result = Receiver.of(path) if path else Receiver(int(message["size"]))

        def ended(error: dict[str, Any] | None) -> None:
            if message["kind"] == "result" and error is None:
                worker.done = worker.ready = True

        member.link.channel.accept(message["id"], receiver.feed, ended, window_bytes=_RESULT_WINDOW_BYTES)

    def _on_done(self, _member: Member, message: dict[str, Any]) -> None:
        if message.get("result") is None:
            worker = self.workers[message["rank"]]
            worker.done = worker.ready = True

    def _on_raised(self, _member: Member, message: dict[str, Any]) -> None:
        worker = self.workers[message["rank"]]
        if self._tracing is not None:
            self._tracing.raised(worker.rank)

        self.failures.append(raised(worker, message, worker.result))

    def _on_exited(self, member: Member, message: dict[str, Any]) -> None:
        worker = self.workers[message["rank"]]
        worker.ended = True
        if self._tracing is not None:
            self._tracing.exited(member.name, message, stopped=self.stopping and not worker.done)

        if worker.done:
            if message.get("signal") and self.released:
                _log.warning("%s had returned, and was then ended by signal %s", worker, message["signal"])

            return

        if not self.stopping and not any(f.rank == worker.rank for f in self.failures):
            self.failures.append(died(worker, message))

    def _on_stacks(self, member: Member, message: dict[str, Any]) -> None:
        self.stacks |= {int(rank): told for rank, told in message["ranks"].items()}
        self.told_stacks.add(member.name)

    def _on_idle(self, member: Member, _message: dict[str, Any]) -> None:
        member.idle = True

    def _on_tunnelled(self, member: Member, message: dict[str, Any]) -> None:
        if self._tracing is not None:
            self._tracing.tunnelled(member.name, message)

    def said(self, member: Member, data: bytes) -> None:
        """Take what ssh, srun or the agent itself wrote to stderr."""
        if self._logs is None:
            self._early_words.append((member, data))
            return

        feed = self._agents_words.get(member.name)
        if feed is None:
            feed = self._agents_words[member.name] = self._logs.open(member.name, None, "err")

        feed.feed(data)

    def lost(self, member: Member, error: AgentFailedError) -> None:
        """Take note that a host is out of reach."""
        if self._tracing is not None:
            ranks = {worker.rank: worker.pid for worker in member.workers if not worker.ended}
            self._tracing.host_lost(member.name, ranks, error.reason)

        if not self.workers:
            self.bad.append(error)
        elif all(worker.done for worker in self.workers):
            _log.warning("%s", error)
        elif not self.stopping:
            self.failures.append(Failure(error))


_HANDLERS = {name.removeprefix("_on_"): handler for name, handler in vars(Ledger).items() if name.startswith("_on_")}
