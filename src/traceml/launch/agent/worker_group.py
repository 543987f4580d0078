"""The workers of one job on one host: started, watched, and ended with everything that they have started."""

from __future__ import annotations

import logging
import mmap
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from traceml.inspection.cgroups import OomWatch
from traceml.launch.agent.machine import core_slices, interface_towards
from traceml.launch.agent.pipe_reader import OutputTail, PipeReader
from traceml.launch.agent.worker_state import WorkerState
from traceml.launch.agent.zygote_client import ZygoteClient
from traceml.launch.shared.channel import Channel
from traceml.launch.shared.channel_streams import OutgoingStream
from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import (
    Done,
    Exited,
    Fork,
    GroupReady,
    Idle,
    Message,
    Prepare,
    Raised,
    Snapshot,
    Stacks,
    Start,
    Started,
    StreamOpened,
    TracedRun,
    WorkerDone,
    WorkerMayEnd,
    WorkerPayload,
    WorkerRaised,
    WorkerReady,
)
from traceml.launch.shared.payload_buffer import LARGE_BYTES, PayloadBuffer, path_of
from traceml.launch.shared.process_cleanup import MARK, ProcessTermination, find_leftovers
from traceml.process_ends import CRASHES

if TYPE_CHECKING:
    from traceml.database.snapshots.silent_workers import SilentWorker, SilentWorkers

__all__ = ["WORKER_MESSAGES", "WorkerGroup"]

# Time for processes that workers leave behind to end by themselves, once all workers have ended well.
_LEFTOVER_GRACE_S = 1.0
# Of another signal it does not die by itself: stacks in its output are of a loader worker then.
_CRASHES = CRASHES | {signal.SIGBUS}
WORKER_MESSAGES: Sequence[type[Message]] = (WorkerReady, WorkerDone, WorkerRaised)
_log = logging.getLogger("traceml")


class WorkerGroup:
    """Workers of one job.

    Args:
        selector: the agent's; what is registered there has a callable as data, which takes the events.
        start: the launcher's request.
        prepare: the one before it, for the zygote.
        variables: what workers set and remove, see `ZygoteClient.worker_variables`.
        listener: the socket at which ranks meet, on the host of rank 0.

    Attributes:
        idle: whether none of its processes is left.
        payload: id of the stream that carries the function and its arguments.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        channel: Channel,
        zygote: ZygoteClient,
        start: Start,
        *,
        prepare: Prepare,
        variables: tuple[dict[str, str], Sequence[str]],
        listener: socket.socket | None,
    ) -> None:
        self.job = start.job
        self.idle = False
        self._selector, self._channel, self._zygote = selector, channel, zygote
        self._request, self._prepare = start, prepare
        self._traced = start.trace if start.trace is not None and start.trace["flights"] else None
        self._silent = None if self._traced is None else self._silent_workers(self._traced)
        self._shared_fds: list[int] = []
        self._ending: ProcessTermination | None = None
        self._stopping = self._exiting = self._released = False
        self._is_over = False
        self._ask_s: float | None = None  # when workers are sent SIGTERM
        self._is_asked: Callable[[], bool] = lambda: False
        self._grace_s = self._exit_deadline_s = 0.0
        self._stack_requests: list[WorkerState] | None = None
        self.payload = start.payload
        self._oom_watch = OomWatch()
        self._ranks = {rank: self._make(rank, local_rank) for local_rank, rank in enumerate(start.ranks)}
        self._start(*variables, listener)

    # --- starting ----------------------------------------------------------------------------------------------------

    def _make(self, rank: int, local_rank: int) -> WorkerState:
        tail = OutputTail()
        streams = {
            fd: self._channel.open_stream(
                StreamOpened(kind="log", job=self.job, rank=rank, local_rank=local_rank, fd=fd)
            )
            for fd in ("out", "err", "records")
        }
        readers = [PipeReader(self._selector, stream, fd, tail) for fd, stream in streams.items()]
        ours, theirs = FdSocket.pair()
        worker = WorkerState(
            rank, local_rank, socket=ours, worker_end=theirs, streams=list(streams.values()), readers=readers, tail=tail
        )
        self._selector.register(ours.fileno(), selectors.EVENT_READ, lambda _: self._receive(worker))
        return worker

    def _start(self, env: dict[str, str], unset: Sequence[str], listener: socket.socket | None) -> None:
        start, prepare = self._request, self._prepare
        interface = interface_towards(start.master_addr)
        many = len(self._ranks) > 1
        for each, own in zip(self._ranks.values(), core_slices(len(self._ranks)), strict=True):
            request = Fork(
                rank=each.rank,
                env=env | self._environ(each),
                unset=unset,
                cwd=prepare.cwd,
                sys_path=prepare.sys_path,
                main=prepare.main,
                interface=interface,
                backend=start.backend,
                timeout_s=start.timeout_s,
                script=start.script,
                log_level=start.log_level,
                is_traced=start.trace is not None,
                cores=own if many and start.cpu_affinity else [],
                threads=max(1, len(own)) if many else None,
            )
            self._fork(each, request, listener if each.rank == 0 and start.backend is not None else None)

        if listener is not None:
            listener.close()

    def _environ(self, each: WorkerState) -> dict[str, str]:
        start = self._request
        return {
            "RANK": str(each.rank),
            "LOCAL_RANK": str(each.local_rank),
            "WORLD_SIZE": str(start.world_size),
            "LOCAL_WORLD_SIZE": str(len(start.ranks)),
            "GROUP_RANK": str(start.group_rank),
            "MASTER_ADDR": start.master_addr,
            "MASTER_PORT": str(start.master_port),
            MARK: self._zygote.mark,
            **start.env,
        }

    def _fork(self, each: WorkerState, request: Fork, listener: socket.socket | None) -> None:
        """Request a worker from the zygote, and close its descriptors here."""
        fds = [each.worker_end.fileno(), *(reader.write_fd for reader in each.readers), *each.stacks.worker_fds]
        if listener is not None:
            fds.append(listener.fileno())

        try:
            self._zygote.fork(request, fds)
        except OSError:  # the zygote is gone; the agent will report it
            each.status = -1

        each.worker_end.close()
        each.stacks.started()
        for reader in each.readers:
            reader.started()

    def send_payload(self, receiver: PayloadBuffer) -> None:
        """Pass the function and its arguments to all workers: they share the memory."""
        assert receiver.fd is not None
        for each in self._ranks.values():
            each.send(WorkerPayload(), [receiver.fd])

        receiver.close()

    # --- events of workers -------------------------------------------------------------------------------------------

    def forked(self, rank: int, pid: int) -> None:
        """Record that a worker was forked."""
        self._ranks[rank].pid = pid
        self._channel.send(Started(job=self.job, rank=rank, pid=pid))
        if self._released:
            self._ranks[rank].kill()

    def fork_failed(self, rank: int, text: str) -> None:
        """Record that a worker could not be forked."""
        each = self._ranks[rank]
        each.tail.add("err", f"traceml: this worker could not be started: {text}\n".encode())
        self._ended(each, 1 << 8)

    def ended(self, pid: int, status: int) -> None:
        """Record that a process has ended, which may be no worker."""
        for each in self._ranks.values():
            if each.pid == pid and each.status is None:
                self._ended(each, status)

    def zygote_lost(self, how: str) -> None:
        """Record that the zygote has ended, and with it all workers."""
        for each in self._ranks.values():
            each.tail.add("err", f"traceml: the process that forks the workers of this host {how}\n".encode())
            if each.pid is None and not each.end_sent:
                self._ended(each, signal.SIGKILL)

    def _ended(self, each: WorkerState, status: int) -> None:
        each.status = status
        self._receive(each)
        for reader in each.readers:
            reader.worker_ended()

        self.tick()

    def _receive(self, each: WorkerState) -> None:
        """Read a worker's messages."""
        try:
            while (
                each.socket.fileno() >= 0
                and (received := each.socket.receive(*WORKER_MESSAGES, wait=False)) is not None
            ):
                self._on_worker(each, *received)
        except EOFError:
            self._selector.unregister(each.socket.fileno())
            each.socket.close()

    def _on_worker(self, each: WorkerState, message: Message, fds: list[int]) -> None:
        if isinstance(message, WorkerReady):
            self._channel.send(GroupReady(job=self.job, rank=each.rank))
        elif isinstance(message, WorkerDone):
            self._on_done(each, fds[0])
        elif isinstance(message, WorkerRaised):
            self._on_raised(each, message, fds)

    def _on_done(self, each: WorkerState, fd: int) -> None:
        self._note_report(each)
        done = Done(job=self.job, rank=each.rank)
        self._send_memory(each, "result", fd).on_ended = lambda: self._channel.send(done)

    def _on_raised(self, each: WorkerState, message: WorkerRaised, fds: list[int]) -> None:
        self._note_report(each)
        raised = Raised(job=self.job, rank=each.rank, tail=each.tail.lines(), **vars(message))
        if fds:
            self._send_memory(each, "error", fds[0]).on_ended = lambda: self._channel.send(raised)
        else:
            self._channel.send(raised)

    def _note_report(self, each: WorkerState) -> None:
        each.reported = True
        if self._released:
            each.send(WorkerMayEnd(failed=self._stopping))

    def _send_memory(self, each: WorkerState, kind: str, fd: int) -> OutgoingStream:
        """Send the contents of a memory file, which is freed once it is sent."""
        size = os.fstat(fd).st_size
        shared = self._request.shares_memory and size >= LARGE_BYTES
        path = path_of(fd) if shared else None
        stream = self._channel.open_stream(StreamOpened(kind=kind, job=self.job, rank=each.rank, size=size, path=path))
        each.streams.append(stream)
        each.answers.append(stream)
        if shared:
            self._shared_fds.append(fd)  # open until the launcher has opened it
        else:
            stream.write(memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ)))
            os.close(fd)

        stream.end()
        return stream

    # --- requests of the launcher ------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let the workers end."""
        for each in self._ranks.values():
            each.send(WorkerMayEnd())

    def ask(self, delay_s: float, is_asked: Callable[[], bool]) -> None:
        """Have the workers end by themselves: by SIGTERM, or, if they have returned or raised, as they may end.

        Loader workers and others that they have started get no signal: their death is an exception in a script that
        is saving a checkpoint.

        Args:
            delay_s: time until the signal.
            is_asked: whether workers have got it from another then.
        """
        self._ask_s, self._is_asked, self._released = time.monotonic() + delay_s, is_asked, True
        for each in self._ranks.values():
            if each.reported:
                each.send(WorkerMayEnd())

        self.tick()

    def _ask_if_due(self) -> None:
        if self._ask_s is None or time.monotonic() < self._ask_s:
            return

        self._ask_s = None
        for each in self._ranks.values():
            if not each.reported and not self._is_asked():
                each.ask()

    def stop(self, grace_s: float, exit_s: float = 0) -> None:
        """End the workers and everything that they have started: by SIGTERM, after the grace period by SIGKILL.

        Args:
            exit_s: time for the exit handlers of workers that have returned or raised, before the same is done to them.
        """
        if self._stopping:
            return

        self._stopping = self._exiting = self._released = True
        self._grace_s, self._exit_deadline_s = grace_s, time.monotonic() + exit_s
        for each in self._ranks.values():
            for stream in each.answers:
                stream.abort({"text": "stopped"})

            if each.reported:
                each.send(WorkerMayEnd(failed=True))

        self._ending = ProcessTermination(self._find, grace_s=grace_s)
        self.tick()

    def request_stacks(self) -> None:
        """Collect the stacks of all workers; send them, at the latest after 4 s, once for repeated requests."""
        if self._stack_requests is not None:
            return

        self._stack_requests = list(self._ranks.values())
        for each in self._stack_requests:
            if each.running:
                assert each.pid is not None
                each.stacks.request(each.pid)

        self.tick()

    def tick(self) -> float:
        """Do periodic work; return the longest time until the next call, in seconds."""
        for each in self._ranks.values():
            for reader in each.readers:
                reader.tick()

            if each.status is not None and not each.end_sent and all(reader.closed for reader in each.readers):
                self._send_end(each)

        if self._stack_requests is not None and all(
            not each.running or each.stacks.done() for each in self._stack_requests
        ):
            self._channel.send(
                Stacks(job=self.job, ranks={e.rank: e.stacks.answer(e.pid) for e in self._stack_requests})
            )
            self._stack_requests = None

        if self._silent is not None and not self._stopping:  # a worker that is being ended does other things
            self._silent.check(each.pid for each in self._ranks.values() if each.running and each.pid)

        self._ask_if_due()
        self._finish()
        busy = (
            self._stack_requests is not None
            or self._ending is not None
            or any(not e.end_sent and e.status is not None for e in self._ranks.values())
        )
        if busy:
            return 0.01 if self._ending is None else self._ending.pause_s

        return 0.2 if any(reader.paused for e in self._ranks.values() for reader in e.readers) else 1.0

    def _finish(self) -> None:
        """Once all workers have ended, end the processes that they have left."""
        if self.idle:
            return

        if self._ending is None and all(each.end_sent for each in self._ranks.values()):
            self._ending = ProcessTermination(self._find, grace_s=_LEFTOVER_GRACE_S)

        if self._ending is None:
            return

        if self._exiting and not self._exiting_pids():
            self._exiting = False
            self._ending = ProcessTermination(self._find, grace_s=self._grace_s)

        if not self._is_over:  # then nothing can start another process: only streams are still read
            are_ended = not self._exiting and all(each.end_sent for each in self._ranks.values())
            self._is_over = self._ending.step() and are_ended

        if not self._is_over or not all(stream.ended for each in self._ranks.values() for stream in each.streams):
            return

        if self._ending.left:
            _log.error("processes %s of this job cannot be ended", sorted(self._ending.left))

        self.idle = True
        self.close()
        self._channel.send(Idle(job=self.job))

    def close(self) -> None:
        """Close the job's descriptors."""
        while self._shared_fds:
            os.close(self._shared_fds.pop())

        for each in self._ranks.values():
            each.stacks.close()
            if each.socket.fileno() >= 0:
                self._selector.unregister(each.socket.fileno())
                each.socket.close()

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _find(self) -> set[int]:
        """Return the job's processes: descendants of the zygote, orphans below us, and those with the mark."""
        found = find_leftovers([os.getpid()], mark=self._zygote.mark, spare=[self._zygote.pid])
        exiting = self._exiting_pids() if self._exiting else set()
        return found - exiting - find_leftovers(exiting, mark=None) if exiting else found

    def _exiting_pids(self) -> set[int]:
        """Return the stopped workers whose exit handlers may still run."""
        if time.monotonic() > self._exit_deadline_s:
            return set()

        return {each.pid for each in self._ranks.values() if each.reported and each.running and each.pid is not None}

    def _silent_workers(self, run: TracedRun) -> SilentWorkers:
        # brings the stored tables, half of the agent's imports: of use only where the agent looks for flight files
        from traceml.database.snapshots.silent_workers import SilentWorkers

        return SilentWorkers(run["run_id"], run["runs_dir"], self._send_snapshot)

    def _send_snapshot(self, worker: SilentWorker) -> None:
        self._channel.send(
            Snapshot(job=self.job, rank=worker.rank, pid=worker.pid, snapshot=worker.snapshot, traced=worker.job)
        )

    def _send_end(self, each: WorkerState) -> None:
        each.end_sent = True
        status = each.status or 0
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        self._channel.send(
            Exited(
                job=self.job,
                rank=each.rank,
                local_rank=each.local_rank,
                pid=each.pid,
                code=None if killed else os.WEXITSTATUS(status),
                signal=killed,
                tail=each.tail.lines(),
                crash=each.tail.crash_text() if killed in _CRASHES else "",
                oom=self._oom_watch.killed() if killed == signal.SIGKILL and not self._stopping else None,
            )
        )
        self._send_flight(each)

    def _send_flight(self, each: WorkerState) -> None:
        """Send the flight file of a dead traced worker, unless the launcher can read it itself."""
        if self._traced is None or each.pid is None:
            return

        from traceml.database.flight.flight_archive import pack_flight

        data = pack_flight(each.pid, self._traced["run_id"], runs_dir=self._traced["runs_dir"])
        if data is None:
            return

        stream = self._channel.open_stream(StreamOpened(kind="flight", job=self.job, rank=each.rank))
        each.streams.append(stream)
        stream.write(data)
        stream.end()
