"""What the agents of one job have told: who runs, has returned, has failed, is gone."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from traceml.errors import AgentFailedError
from traceml.launch.launcher.failures import JobFailure, died, raised, unprepared
from traceml.launch.launcher.job_host import JobHost, Worker
from traceml.launch.launcher.log_router import LogRouter, LogStream
from traceml.launch.wire.payload import PayloadBuffer

if TYPE_CHECKING:
    from traceml.launch.launcher.tracing import Tracing

__all__ = ["JobState", "MakeLogs"]

MakeLogs = Callable[[Mapping[str, int]], LogRouter]
"""Given the number of workers of each host, makes what takes their words."""

_RESULT_WINDOW_BYTES = 8 << 20

_log = logging.getLogger("traceml.launch")


class JobState:
    """Takes what agents say, and keeps what follows from it.

    Args:
        hosts: the hosts, in the order of ranks.
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
        hosts: Sequence[JobHost],
        job: str,
        *,
        make_logs: MakeLogs,
        prepare: Callable[[JobHost], None],
        tracing: Tracing | None,
    ) -> None:
        self.workers: list[Worker] = []
        self.bad: list[AgentFailedError] = []
        self.failures: list[JobFailure] = []
        self.meeting: tuple[str, int] | None = None
        self.stacks: dict[int, dict[str, Any]] = {}
        self.told_stacks: set[str] = set()
        self.stopping = self.released = False
        self._hosts, self._id, self._make_logs = hosts, job, make_logs
        self._prepare, self._tracing = prepare, tracing
        self._logs: LogRouter | None = None
        self._agents_words: dict[str, LogStream] = {}
        self._early_words: list[tuple[JobHost, bytes]] = []

    def appoint(self, selector: selectors.BaseSelector) -> None:
        """Give out the ranks, host after host, in the order in which the user named them; and open the logs.

        Args:
            selector: the loop's.
        """
        for host in self._hosts:
            for local_rank in range(host.size):
                worker = Worker(len(self.workers), local_rank, host)
                host.workers.append(worker)
                self.workers.append(worker)

        self._logs = self._make_logs({host.name: host.size for host in self._hosts})
        selector.register(self._logs.fd, selectors.EVENT_READ, lambda _: self._settle())
        for host, data in self._early_words:
            self.said(host, data)

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

    def message(self, host: JobHost, message: dict[str, Any]) -> None:
        """Take a message of a host's agent."""
        name = message["t"]
        if name != "hello" and message.get("job", self._id) != self._id:
            return  # of a job before this one

        host.warm = False
        handler = _HANDLERS.get(name)
        if handler is not None:
            handler(self, host, message)

    def _on_hello(self, host: JobHost, message: dict[str, Any]) -> None:
        host.connection.hello = message
        self._prepare(host)

    def _on_prepared(self, host: JobHost, message: dict[str, Any]) -> None:
        host.prepared = message
        if error := message.get("error"):
            self.bad.append(unprepared(host, error))

    def _on_reserved(self, host: JobHost, message: dict[str, Any]) -> None:
        if message.get("error"):
            reason = f"no port for the workers to meet at ({message['error']})"
            self.failures.append(JobFailure(AgentFailedError(host.name, reason)))
            return

        self.meeting = str(message["address"]), int(message["port"])

    def _on_started(self, _host: JobHost, message: dict[str, Any]) -> None:
        self.workers[message["rank"]].pid = message["pid"]

    def _on_group_ready(self, _host: JobHost, message: dict[str, Any]) -> None:
        self.workers[message["rank"]].ready = True

    def _on_stream(self, host: JobHost, message: dict[str, Any]) -> None:
        kind, channel = message.get("kind"), host.connection.channel
        if kind == "log":
            self._take_log(host, message)
        elif kind in {"result", "error"}:
            self._receive(host, self.workers[message["rank"]], message)
        elif kind in {"tunnel", "flight"} and self._tracing is not None:
            self._tracing.opened(host.name, message, channel)

    def _take_log(self, host: JobHost, message: dict[str, Any]) -> None:
        assert self._logs is not None
        rank = int(message.get("rank", -1))
        local_rank = None if rank < 0 else int(message["local_rank"])
        feed = self._logs.open(host.name, local_rank, str(message["fd"]), rank=None if rank < 0 else rank)
        # what was written to files and screen is granted anew: who writes more waits, and holds up nobody else
        feed.grant = host.connection.channel.accept(message["id"], feed.feed, feed.end, manual=True).grant

    def _receive(self, host: JobHost, worker: Worker, message: dict[str, Any]) -> None:
        path = message.get("path")
        receiver = worker.result = PayloadBuffer.of(path) if path else PayloadBuffer(int(message["size"]))

        def ended(error: dict[str, Any] | None) -> None:
            if message["kind"] == "result" and error is None:
                worker.done = worker.ready = True

        host.connection.channel.accept(message["id"], receiver.feed, ended, window_bytes=_RESULT_WINDOW_BYTES)

    def _on_done(self, _host: JobHost, message: dict[str, Any]) -> None:
        if message.get("result") is None:
            worker = self.workers[message["rank"]]
            worker.done = worker.ready = True

    def _on_raised(self, _host: JobHost, message: dict[str, Any]) -> None:
        worker = self.workers[message["rank"]]
        if self._tracing is not None:
            self._tracing.raised(worker.rank)

        self.failures.append(raised(worker, message, worker.result))

    def _on_exited(self, host: JobHost, message: dict[str, Any]) -> None:
        worker = self.workers[message["rank"]]
        worker.ended = True
        if self._tracing is not None:
            self._tracing.exited(host.name, message, stopped=self.stopping and not worker.done)

        if worker.done:
            if message.get("signal") and self.released:
                _log.warning("%s had returned, and was then ended by signal %s", worker, message["signal"])

            return

        if not self.stopping and not any(f.rank == worker.rank for f in self.failures):
            self.failures.append(died(worker, message))

    def _on_stacks(self, host: JobHost, message: dict[str, Any]) -> None:
        self.stacks |= {int(rank): told for rank, told in message["ranks"].items()}
        self.told_stacks.add(host.name)

    def _on_idle(self, host: JobHost, _message: dict[str, Any]) -> None:
        host.idle = True

    def _on_tunnelled(self, host: JobHost, message: dict[str, Any]) -> None:
        if self._tracing is not None:
            self._tracing.tunnelled(host.name, message)

    def said(self, host: JobHost, data: bytes) -> None:
        """Take what ssh, srun or the agent itself wrote to stderr."""
        if self._logs is None:
            self._early_words.append((host, data))
            return

        feed = self._agents_words.get(host.name)
        if feed is None:
            feed = self._agents_words[host.name] = self._logs.open(host.name, None, "err")

        feed.feed(data)

    def lost(self, host: JobHost, error: AgentFailedError) -> None:
        """Take note that a host is out of reach."""
        if self._tracing is not None:
            ranks = {worker.rank: worker.pid for worker in host.workers if not worker.ended}
            self._tracing.host_lost(host.name, ranks, error.reason)

        if not self.workers:
            self.bad.append(error)
        elif all(worker.done for worker in self.workers):
            _log.warning("%s", error)
        elif not self.stopping:
            self.failures.append(JobFailure(error))


_HANDLERS = {name.removeprefix("_on_"): handler for name, handler in vars(JobState).items() if name.startswith("_on_")}
