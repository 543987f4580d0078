"""State of one job, built from the messages of its agents."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from traceml.errors import AgentFailedError
from traceml.launch.launcher.job.failures import JobFailure, preparation_failed, unreachable, worker_died, worker_raised
from traceml.launch.launcher.job.job_host import JobHost, Worker
from traceml.launch.launcher.logs.log_router import LogRouter, LogStream
from traceml.launch.shared.launch_messages import (
    AgentHello,
    Done,
    Exited,
    GroupReady,
    Idle,
    Message,
    PackageRequest,
    Prepared,
    Probed,
    Raised,
    Reserved,
    Snapshot,
    Stacks,
    Started,
    StreamOpened,
    TunnelReady,
    WorkerStack,
)
from traceml.launch.shared.payload_buffer import PayloadBuffer
from traceml.process_ends import exit_text

if TYPE_CHECKING:
    from traceml.launch.launcher.job.tracing import Tracing

__all__ = ["JobState", "MakeLogs"]

MakeLogs = Callable[[Mapping[str, int]], LogRouter]
"""Makes the log router of a job, given the number of workers of each host."""

_RESULT_WINDOW_BYTES = 8 << 20

_log = logging.getLogger("traceml.launch")


class JobState:
    """Handles the messages of agents and keeps the resulting state.

    Args:
        prepare: called with each host whose agent has answered.
        is_script: whether workers run a script, whose exit status is its result.

    Attributes:
        workers: by rank, once ranks are assigned.
        host_errors: errors of hosts that cannot be used.
        failures: of workers, and of hosts that were lost while workers ran; in order of arrival.
        rendezvous: address and port at which the workers meet.
        probed: names of the hosts that have tried to connect there.
        stacks_received: the hosts that have sent stacks.
        stopping: whether workers are being ended, so that their end is not a failure.
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
        is_script: bool = False,
    ) -> None:
        self.workers: list[Worker] = []
        self.host_errors: list[AgentFailedError] = []
        self.failures: list[JobFailure] = []
        self.rendezvous: tuple[str, int] | None = None
        self.probed: set[str] = set()
        self.stacks: dict[int, WorkerStack] = {}
        self.stacks_received: set[str] = set()
        self.stopping = self.released = False
        self._hosts, self._job, self._make_logs = hosts, job, make_logs
        self._prepare, self._tracing, self._is_script = prepare, tracing, is_script
        self._logs: LogRouter | None = None
        self._agent_logs: dict[str, LogStream] = {}
        self._early_output: list[tuple[JobHost, bytes]] = []

    def assign_ranks(self, selector: selectors.BaseSelector) -> None:
        """Assign ranks host by host, in the user's order, and open the logs."""
        for host in self._hosts:
            for local_rank in range(host.size):
                worker = Worker(len(self.workers), local_rank, host)
                host.workers.append(worker)
                self.workers.append(worker)

        logs = self._logs = self._make_logs({host.name: host.size for host in self._hosts})
        selector.register(logs.fd, selectors.EVENT_READ, lambda _: logs.grant_written())
        for host, data in self._early_output:
            self.on_stderr(host, data)

    def close(self) -> None:
        """Write the rest of the logs."""
        if self._logs is None:
            return

        for stream in self._agent_logs.values():
            stream.end()

        self._logs.close()

    def on_message(self, host: JobHost, message: Message) -> None:
        """Handle a message of a host's agent."""
        if getattr(message, "job", self._job) != self._job:
            return  # of an earlier job

        before = host.activity if _log.isEnabledFor(logging.DEBUG) else None
        host.warm = False
        _HANDLERS[type(message)](self, host, message)
        if before is not None and host.activity != before:
            _log.debug("%s: %s, was %s", host.name, host.activity, before)

    def _on_package(self, host: JobHost, _message: PackageRequest) -> None:
        host.connection.send_package()

    def _on_hello(self, host: JobHost, message: AgentHello) -> None:
        host.connection.hello = message
        self._prepare(host)

    def _on_prepared(self, host: JobHost, message: Prepared) -> None:
        host.prepared = message
        if message.env_file_log:
            _log.debug("%s: env_file printed: %s", host.name, message.env_file_log)

        if message.error is not None:
            self.host_errors.append(preparation_failed(host, message.error))

    def _on_reserved(self, host: JobHost, message: Reserved) -> None:
        if message.error:
            reason = f"no port for the workers to meet at ({message.error})"
            self.failures.append(JobFailure(AgentFailedError(host.name, reason)))
            return

        self.rendezvous = message.address, message.port

    def _on_probed(self, host: JobHost, message: Probed) -> None:
        self.probed.add(host.name)
        if message.error:
            assert self.rendezvous is not None
            self.host_errors.append(unreachable(host, self._hosts, self.rendezvous, message.error))

    def _on_started(self, _host: JobHost, message: Started) -> None:
        self.workers[message.rank].pid = message.pid

    def _on_group_ready(self, _host: JobHost, message: GroupReady) -> None:
        self.workers[message.rank].ready = True

    def _on_stream(self, host: JobHost, message: StreamOpened) -> None:
        kind, channel = message.kind, host.connection.channel
        if kind == "log":
            self._accept_log(host, message)
        elif kind in {"result", "error"}:
            self._accept_result(host, self.workers[message.rank], message)
        elif kind in {"tunnel", "flight"} and self._tracing is not None:
            self._tracing.stream_opened(host.name, message, channel)

    def _accept_log(self, host: JobHost, message: StreamOpened) -> None:
        assert self._logs is not None
        stream = self._logs.open(host.name, message.local_rank, message.fd, rank=message.rank)
        # credit is granted once files and screen are written: a chatty worker waits, and delays no other
        channel = host.connection.channel
        stream.grant = channel.accept(message.id, stream.feed, stream.end, manual=True).grant

    def _accept_result(self, host: JobHost, worker: Worker, message: StreamOpened) -> None:
        path = message.path
        buffer = worker.result = PayloadBuffer.open_path(path) if path else PayloadBuffer(message.size)
        host.connection.channel.accept(message.id, buffer.feed, lambda _: None, window_bytes=_RESULT_WINDOW_BYTES)

    def _on_done(self, _host: JobHost, message: Done) -> None:
        worker = self.workers[message.rank]
        if worker.result is not None and worker.result.complete:  # else its job was stopped meanwhile
            worker.done = worker.ready = True

    def _on_raised(self, _host: JobHost, message: Raised) -> None:
        worker = self.workers[message.rank]
        if self._tracing is not None:
            self._tracing.raised.add(worker.rank)

        self.failures.append(worker_raised(worker, message, worker.result))

    def _on_exited(self, host: JobHost, message: Exited) -> None:
        worker = self.workers[message.rank]
        worker.ended = True
        if self._is_script and message.code == 0:  # by `os._exit`, or it has closed its connection to the agent
            worker.done = worker.ready = True

        if self._tracing is not None:
            self._tracing.worker_exited(host.name, message, stopped=self.stopping and not worker.done)

        if worker.done:
            if message.signal and self.released:
                _log.warning("%s had returned, and then %s", worker, exit_text(None, message.signal))

            return

        if not self.stopping and not any(f.rank == worker.rank for f in self.failures):
            self.failures.append(worker_died(worker, message))

    def _on_stacks(self, host: JobHost, message: Stacks) -> None:
        self.stacks |= message.ranks
        self.stacks_received.add(host.name)

    def _on_snapshot(self, host: JobHost, message: Snapshot) -> None:
        if self._tracing is not None:
            self._tracing.worker_snapshot(host.name, message)

    def _on_idle(self, host: JobHost, _message: Idle) -> None:
        host.idle = True

    def _on_tunnel_ready(self, host: JobHost, message: TunnelReady) -> None:
        if self._tracing is not None:
            self._tracing.tunnel_ready(host.name, message)

    def on_stderr(self, host: JobHost, data: bytes) -> None:
        """Log what ssh, srun or the agent itself wrote to stderr."""
        if self._logs is None:
            self._early_output.append((host, data))
            return

        stream = self._agent_logs.get(host.name)
        if stream is None:
            stream = self._agent_logs[host.name] = self._logs.open(host.name, None, "err")

        stream.feed(data)

    def on_lost(self, host: JobHost, error: AgentFailedError) -> None:
        """Record a lost host."""
        if self._tracing is not None:
            ranks = {worker.rank: worker.pid for worker in host.workers if not worker.ended}
            self._tracing.host_lost(host.name, ranks, error.reason, stopped=self.stopping)

        if not self.workers:
            self.host_errors.append(error)
        elif all(worker.done for worker in self.workers):
            _log.warning("%s", error)
        elif not self.stopping:
            self.failures.append(JobFailure(error))


_HANDLERS: Mapping[type[Message], Callable[[JobState, JobHost, Any], None]] = {
    PackageRequest: JobState._on_package,
    AgentHello: JobState._on_hello,
    Prepared: JobState._on_prepared,
    TunnelReady: JobState._on_tunnel_ready,
    Reserved: JobState._on_reserved,
    Probed: JobState._on_probed,
    StreamOpened: JobState._on_stream,
    Started: JobState._on_started,
    GroupReady: JobState._on_group_ready,
    Done: JobState._on_done,
    Raised: JobState._on_raised,
    Exited: JobState._on_exited,
    Stacks: JobState._on_stacks,
    Snapshot: JobState._on_snapshot,
    Idle: JobState._on_idle,
}
