"""One launch from its first connection to its last worker's end, as seen by the launcher.

Every host goes through: its agent answers (`hello`), its fork server stands (`prepared`), its workers run (`started`,
`ready`), have returned (`done`), may end (`release`), and nothing of them is left (`idle`). What goes wrong anywhere
ends all the others.
"""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from traceml.errors import AgentFailedError, LaunchTimeoutError, WorkerFailedError
from traceml.launch import payload
from traceml.launch.channel import Outgoing
from traceml.launch.failures import Failure, died, first_cause, note_stacks, raised
from traceml.launch.handlers import log_level
from traceml.launch.logs import Feed, LogRouter
from traceml.launch.loop import Loop
from traceml.launch.members import Member, Worker, meeting_address
from traceml.launch.payload import Parcel, Receiver

if TYPE_CHECKING:
    from traceml.launch.tracing import Tracing

__all__ = ["Job", "MakeLogs", "Task"]

MakeLogs = Callable[[Mapping[str, int]], LogRouter]

# After the first failure: how long other workers may take to fail too, which may explain it better.
_GRACE_S = 0.5
# How long other hosts that are bad too have to say so.
_BAD_HOSTS_S = 1.0
# How long agents may take to tell where workers are.
_STACKS_S = 2.0
_STOP_GRACE_S = 0.5  # between SIGTERM and SIGKILL
_STOP_S = 6.0
_FLIGHTS_S = 5.0
_RESULT_WINDOW_BYTES = 8 << 20
_PIECE_BYTES = 32 << 20  # of what is copied between two looks at the channels

_log = logging.getLogger("traceml.launch")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all workers do.

    Attributes:
        parcel: the function and its arguments.
        script: instead of these, a script: `path` or `module`, and `argv`.
        backend: of the process group; `auto`: nccl where there are GPUs enough, else gloo; None: no group.
        timeout_s: for start-up, and for the group's collectives.
        environ: variables for workers of other hosts; those here inherit all.
        env_file: a file that bash sources on each host.
        cwd: where workers work.
        sys_path: where they look for modules.
        cpu_affinity: whether they are spread over the cores.
        keep_agents: whether agents may serve the next launch.
    """

    parcel: Parcel | None = None
    script: Mapping[str, Any] | None = None
    backend: str | None = "auto"
    timeout_s: float = 600
    environ: Mapping[str, str] = field(default_factory=dict)
    env_file: str | None = None
    cwd: str = "."
    sys_path: Sequence[str] = ()
    cpu_affinity: bool = True
    keep_agents: bool = True


class Job:
    """Runs a task on hosts. Use once.

    Args:
        members: the hosts, in the order of ranks; their agents are on their way.
        task: what to run.
        make_logs: given the number of workers of each host, makes what takes their words.
        tracing: the run that the job is traced as.
    """

    def __init__(
        self, members: Sequence[Member], task: Task, *, make_logs: MakeLogs, tracing: Tracing | None = None
    ) -> None:
        self._members, self._task, self._make_logs, self._tracing = list(members), task, make_logs, tracing
        self._logs: LogRouter | None = None
        self._agents_words: dict[str, Feed] = {}
        self._early_words: list[tuple[Member, bytes]] = []
        self._id = secrets.token_hex(8)
        self._deadline_s = time.monotonic() + task.timeout_s
        self._workers: list[Worker] = []
        self._bad: list[AgentFailedError] = []
        self._failures: list[Failure] = []
        self._meeting: tuple[str, int] | None = None
        self._shared: Receiver | None = None
        self._sharing: Outgoing | None = None
        self._stacks: dict[int, dict[str, Any]] = {}
        self._told_stacks: set[str] = set()
        self._stopping = self._released = False
        self._loop = Loop(message=self._message, said=self._said, lost=self._lost, tick=self._tick)

    def run(self) -> list[list[Any]]:
        """Run to the end; return what each worker returned, by host and local rank.

        When it returns or raises, no worker is left on any host that can be reached, and the others end theirs.

        Raises:
            AgentFailedError: a host cannot be used, or was lost.
            WorkerFailedError: a worker died.
            LaunchTimeoutError: the workers did not get started in time.
            PayloadError: a result cannot be loaded here.
            Exception: what a worker raised.
        """
        try:
            with self._loop:
                try:
                    self._gather()
                    self._start()
                    self._watch()
                    self._release()
                except BaseException as error:
                    self._abort(error)
                    raise
        except BaseException as error:
            self._leave()
            self._end_tracing(error)
            raise

        self._leave()
        self._end_tracing(None)
        return [[self._load(worker) for worker in member.workers] for member in self._members]

    # --- the steps -----------------------------------------------------------------------------------------------

    def _gather(self) -> None:
        """Wait until every host's agent and fork server stand."""
        for member in self._members:
            self._loop.add(member)
            if member.link.hello:
                self._prepare(member)

        done = self._loop.until(lambda: self._bad or all(self._is_prepared(m) for m in self._members), self._left_s())
        if self._bad:
            self._loop.until(
                lambda: all(m.lost or m.hello for m in self._members), min(_BAD_HOSTS_S, max(0, self._left_s()))
            )
            self._raise_bad()

        if not done:
            late = [f"host {m.name}" for m in self._members if not m.hello]
            doing = "connecting to the hosts" if late else "preparing the hosts (env_file, import of torch)"
            late = late or [f"host {m.name}" for m in self._members if not self._is_prepared(m)]
            raise LaunchTimeoutError(self._task.timeout_s, doing, late)

    def _start(self) -> None:
        """Start the workers, and wait until they have found each other."""
        self._appoint()
        first, backend = self._members[0], self._choose_backend()
        first.link.channel.send("reserve", job=self._id, address=meeting_address(self._members))
        self._await(lambda: self._meeting, "finding a port for the workers to meet at", [f"host {first.name}"])
        assert self._meeting is not None
        address, port = self._meeting
        for member in self._members:
            channel = member.link.channel
            stream = None if self._task.parcel is None else self._send_parcel(member, self._task.parcel)
            channel.send(
                "start",
                job=self._id,
                payload=None if stream is None else stream.id,
                near=_is_near(member),
                script=None if self._task.script is None else dict(self._task.script),
                workers=[{"rank": worker.rank, "local_rank": worker.local_rank} for worker in member.workers],
                world_size=len(self._workers),
                local_world_size=len(member.workers),
                group_rank=self._members.index(member),
                master_addr=address,
                master_port=port,
                backend=backend,
                timeout_s=self._task.timeout_s,
                env={} if self._tracing is None else self._tracing.environ(member.name),
                trace=None if self._tracing is None else self._tracing.about(member.name),
                cpu_affinity=self._task.cpu_affinity,
                log_level=log_level(os.environ),
            )
            member.started = True

        self._hand_over()
        doing = "starting the workers" + (f" and their process group ({backend})" if backend else "")
        self._await(lambda: all(w.ready for w in self._workers), doing, None)

    def _send_parcel(self, member: Member, parcel: Parcel) -> Outgoing:
        """Send the function and its arguments; a large one to an agent of this host as a file in memory."""
        channel, about = member.link.channel, {"kind": "payload", "job": self._id, "size": parcel.size_bytes}
        if parcel.size_bytes >= payload.LARGE_BYTES and _is_near(member):
            self._shared = Receiver(parcel.size_bytes, shared=True)
            self._sharing = channel.open_stream(**about, path=self._shared.path)
            return self._sharing

        stream = channel.open_stream(**about)
        for chunk in parcel.chunks():
            stream.write(chunk)

        stream.end()
        return stream

    def _hand_over(self) -> None:
        """Fill the file that this host's agent was promised, while its workers start and others get theirs."""
        if self._shared is None or self._sharing is None or self._task.parcel is None:
            return

        for chunk in self._task.parcel.chunks():
            for start in range(0, len(chunk), _PIECE_BYTES):
                self._shared.feed(chunk[start : start + _PIECE_BYTES])
                self._loop.breathe()

        self._sharing.end()

    def _watch(self) -> None:
        """Wait for the results, however long that takes."""
        self._loop.until(lambda: self._failures or all(worker.done for worker in self._workers))
        self._raise_failures()

    def _release(self) -> None:
        """Let the workers end, and see them gone; they were held, as others may still have needed them."""
        for member in self._members:
            member.link.channel.send("release", job=self._id)

        self._stopping = self._released = True  # what fails now has no bearing on the results
        if not self._loop.until(lambda: all(m.idle or m.lost for m in self._members), self._task.timeout_s):
            _log.warning(
                "workers on %s did not end within %g s after they had returned, and were killed",
                ", ".join(m.name for m in self._members if not m.idle),
                self._task.timeout_s,
            )
            self._stop()

    # --- ends that nobody wished for ---------------------------------------------------------------------------------

    def _raise_bad(self) -> None:
        first, *others = self._bad
        for other in others:
            first.add_note(str(other))

        raise first

    def _raise_failures(self) -> None:
        if not self._failures:
            return

        self._loop.until(lambda: all(w.ended or w.member.lost for w in self._workers if not w.done), _GRACE_S)
        raise first_cause(self._failures)

    def _await(self, condition: Any, doing: str, absent: list[str] | None) -> None:
        """Wait for something of the start-up.

        Raises:
            LaunchTimeoutError: it takes too long; `absent` is who was waited for, None: the workers that are not ready.
        """
        done = self._loop.until(lambda: self._failures or condition(), self._left_s())
        self._raise_failures()
        if not done:
            late = absent or [str(worker) for worker in self._workers if not worker.ready]
            raise LaunchTimeoutError(self._task.timeout_s, doing, late)

    def _abort(self, error: BaseException) -> None:
        """End everything; where nothing explains the end, say what the workers were doing."""
        explained = any(failure.error is error and not failure.collateral for failure in self._failures)
        failed = {failure.rank for failure in self._failures}
        running = [w for w in self._workers if w.pid is not None and not (w.done or w.ended or w.rank in failed)]
        if running and not explained:
            self._collect_stacks(running)
            note_stacks(
                error, running, self._stacks, [f.rank for f in self._failures if f.collateral and f.rank is not None]
            )

        self._stop()

    def _collect_stacks(self, running: Sequence[Worker]) -> None:
        asked = {worker.member.name: worker.member for worker in running if not worker.member.lost}
        for member in asked.values():
            member.link.channel.send("stacks", job=self._id)

        self._loop.until(lambda: all(m.lost or m.name in self._told_stacks for m in asked.values()), _STACKS_S)

    def _stop(self) -> None:
        self._stopping = True
        for member in self._members:
            if member.lost or member.idle:
                continue

            if member.started:
                member.link.channel.send("stop", job=self._id, grace_s=_STOP_GRACE_S)
            elif self._is_prepared(member):
                member.idle = True
            else:  # in the midst of something that ends with it
                self._loop.remove(member)
                member.lost = True
                member.link.close(wait_s=0.2)

        if not self._loop.until(lambda: all(m.idle or m.lost for m in self._members), _STOP_S):
            names = ", ".join(m.name for m in self._members if not (m.idle or m.lost))
            _log.warning("%s did not confirm within %g s that the workers there have ended", names, _STOP_S)

    def _leave(self) -> None:
        """Keep the agents that have nothing to do, and end the others."""
        if self._shared is not None:
            self._shared.close()

        from traceml.launch.pool import POOL

        for member in self._members:
            while not member.lost and (data := member.link.read_errors()):
                self._said(member, data)

            if member.idle and not member.lost and self._task.keep_agents:
                POOL.give(member.key, member.link)
            else:
                member.link.hang_up()

        for member in self._members:
            if member.link.channel.closed:
                member.link.close()

        if self._logs is not None:
            for feed in self._agents_words.values():
                feed.end()

            self._logs.close()

    def _end_tracing(self, error: BaseException | None) -> None:
        if self._tracing is None:
            return

        status = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, WorkerFailedError):
            status = 128 + error.signal if error.signal else error.exit_code or 1

        self._tracing.finish(status)

    # --- what agents say ---------------------------------------------------------------------------------------------

    def _message(self, member: Member, message: dict[str, Any]) -> None:
        name = message["t"]
        if name != "hello" and message.get("job", self._id) != self._id:
            return  # of a job before this one

        handler = _HANDLERS.get(name)
        if handler is not None:
            handler(self, member, message)

    def _on_hello(self, member: Member, message: dict[str, Any]) -> None:
        member.link.hello = message
        self._prepare(member)

    def _prepare(self, member: Member) -> None:
        local = member.place.transport == "local"
        if self._tracing is not None:
            self._tracing.joined(
                member.name,
                member.link.channel,
                self._loop.selector,
                job=self._id,
                hostname=str(member.hello.get("hostname") or member.name),
                local=local,
            )

        member.link.channel.send(
            "prepare",
            job=self._id,
            env={**os.environ, **self._task.environ} if local else dict(self._task.environ),
            env_file=self._task.env_file,
            cwd=self._task.cwd,
            sys_path=list(self._task.sys_path),
            workers=member.size,
            threads=None,
            # a script is a training, as a rule, and makes its group itself
            need_torch=2 if self._task.backend is not None else 1 if self._task.script is not None else 0,
        )

    def _on_prepared(self, member: Member, message: dict[str, Any]) -> None:
        member.prepared = message
        if error := message.get("error"):
            self._bad.append(_unprepared(member, error))

    def _on_reserved(self, member: Member, message: dict[str, Any]) -> None:
        if message.get("error"):
            reason = f"no port for the workers to meet at ({message['error']})"
            self._failures.append(Failure(AgentFailedError(member.name, reason)))
            return

        self._meeting = str(message["address"]), int(message["port"])

    def _on_started(self, _member: Member, message: dict[str, Any]) -> None:
        self._workers[message["rank"]].pid = message["pid"]

    def _on_group_ready(self, _member: Member, message: dict[str, Any]) -> None:
        self._workers[message["rank"]].ready = True

    def _on_stream(self, member: Member, message: dict[str, Any]) -> None:
        kind, channel = message.get("kind"), member.link.channel
        if kind == "log":
            self._take_log(member, message)
        elif kind in {"result", "error"}:
            self._receive(member, self._workers[message["rank"]], message)
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
            worker = self._workers[message["rank"]]
            worker.done = worker.ready = True

    def _on_raised(self, _member: Member, message: dict[str, Any]) -> None:
        worker = self._workers[message["rank"]]
        if self._tracing is not None:
            self._tracing.raised(worker.rank)

        self._failures.append(raised(worker, message, worker.result))

    def _on_exited(self, member: Member, message: dict[str, Any]) -> None:
        worker = self._workers[message["rank"]]
        worker.ended = True
        if self._tracing is not None:
            self._tracing.exited(member.name, message, stopped=self._stopping and not worker.done)

        if worker.done:
            if message.get("signal") and self._released:
                _log.warning("%s had returned, and was then ended by signal %s", worker, message["signal"])

            return

        if not self._stopping and not any(f.rank == worker.rank for f in self._failures):
            self._failures.append(died(worker, message))

    def _on_stacks(self, member: Member, message: dict[str, Any]) -> None:
        self._stacks |= {int(rank): told for rank, told in message["ranks"].items()}
        self._told_stacks.add(member.name)

    def _on_idle(self, member: Member, _message: dict[str, Any]) -> None:
        member.idle = True

    def _on_tunnelled(self, member: Member, message: dict[str, Any]) -> None:
        if self._tracing is not None:
            self._tracing.tunnelled(member.name, message)

    def _said(self, member: Member, data: bytes) -> None:
        if self._logs is None:
            self._early_words.append((member, data))
            return

        feed = self._agents_words.get(member.name)
        if feed is None:
            feed = self._agents_words[member.name] = self._logs.open(member.name, None, "err")

        feed.feed(data)

    def _lost(self, member: Member, error: AgentFailedError) -> None:
        if self._tracing is not None:
            ranks = {worker.rank: worker.pid for worker in member.workers if not worker.ended}
            self._tracing.host_lost(member.name, ranks, error.reason)

        if not self._workers:
            self._bad.append(error)
        elif all(worker.done for worker in self._workers):
            _log.warning("%s", error)
        elif not self._stopping:
            self._failures.append(Failure(error))

    def _tick(self) -> None:
        if self._tracing is not None:
            self._tracing.tick()

    # --- small things ------------------------------------------------------------------------------------------------

    def _left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def _is_prepared(self, member: Member) -> bool:
        return member.prepared is not None and (self._tracing is None or self._tracing.ready(member.name))

    def _appoint(self) -> None:
        """Give out the ranks, host after host, in the order in which the user named them; and open the logs."""
        for member in self._members:
            for local_rank in range(member.size):
                worker = Worker(len(self._workers), local_rank, member)
                member.workers.append(worker)
                self._workers.append(worker)

        self._logs = self._make_logs({member.name: member.size for member in self._members})
        self._loop.selector.register(self._logs.fd, selectors.EVENT_READ, lambda _: self._settle())
        for member, data in self._early_words:
            self._said(member, data)

    def _settle(self) -> None:
        assert self._logs is not None
        self._logs.settle()

    def _choose_backend(self) -> str | None:
        if self._task.backend != "auto":
            return self._task.backend

        gpus = [int((member.prepared or {}).get("gpus") or 0) for member in self._members]
        enough = all(n >= len(member.workers) for n, member in zip(gpus, self._members, strict=True))
        return "nccl" if enough else "gloo"

    def _load(self, worker: Worker) -> Any:
        if worker.result is None:
            return None

        try:
            return payload.load(worker.result.memory(), what=f"the result of {worker}")
        finally:
            worker.result = None


_HANDLERS = {name.removeprefix("_on_"): handler for name, handler in vars(Job).items() if name.startswith("_on_")}


def _is_near(member: Member) -> bool:
    """Return whether a host's agent and we can open each other's files in memory."""
    return (
        member.place.transport == "local"
        and bool(member.hello.get("near"))
        and payload.can_reach(int(member.hello["pid"]))
    )


def _unprepared(member: Member, error: Mapping[str, Any]) -> AgentFailedError:
    """Return the error for a host whose fork server cannot be had."""
    python = member.hello.get("executable") or member.hello.get("python")
    what, advice = {
        "no_torch": (
            "torch is not installed there",
            f"Install it for {python}, or pass backend=None for functions that need no process group.",
        ),
        "env_file": ("env_file cannot be sourced there", "It must exist on each host, and be a script for bash."),
        "cwd": (
            "the working directory does not exist there",
            "Workers work where the launcher does: share that folder.",
        ),
        "import": ("torch cannot be imported there", ""),
        "died": ("the process that imports torch died there", ""),
    }.get(str(error.get("kind")), ("it cannot be prepared", ""))
    return AgentFailedError(member.name, what, advice=advice, words=str(error.get("text") or "").splitlines())
