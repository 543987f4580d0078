"""One launch from its first connection to its last worker's end, as seen by the launcher.

Every host goes through: its agent answers (`hello`), its fork server stands (`prepared`), its workers run (`started`,
`ready`), have returned (`done`), may end (`release`), and nothing of them is left (`idle`). What goes wrong anywhere
ends all the others.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from traceml.errors import AgentFailedError, LaunchTimeoutError, WorkerFailedError
from traceml.launch.launcher.agent_pool import POOL
from traceml.launch.launcher.failures import first_cause, note_stacks
from traceml.launch.launcher.host_loop import Loop
from traceml.launch.launcher.job_host import Member, Worker, meeting_address
from traceml.launch.launcher.job_spec import Task
from traceml.launch.launcher.job_state import Ledger, MakeLogs
from traceml.launch.launcher.log_handlers import log_level
from traceml.launch.launcher.payload_sender import Delivery, is_near
from traceml.launch.wire import payload

if TYPE_CHECKING:
    from traceml.launch.launcher.tracing import Tracing

__all__ = ["Job"]

# After the first failure: how long other workers may take to fail too, which may explain it better.
_GRACE_S = 0.5
# Where all that failed did so because of another: how much longer to wait for that one's news.
_CAUSE_S = 1.0
# How long other hosts that are bad too have to say so.
_BAD_HOSTS_S = 1.0
# How long agents may take to tell where workers are.
_STACKS_S = 2.0
_STOP_GRACE_S = 0.5  # between SIGTERM and SIGKILL
_STOP_S = 6.0

_log = logging.getLogger("traceml.launch")


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
        self._members, self._task, self._tracing = list(members), task, tracing
        self._id = secrets.token_hex(8)
        self._deadline_s = time.monotonic() + task.timeout_s
        self._delivery = Delivery(task.parcel, self._id)
        self._ledger = Ledger(self._members, self._id, make_logs=make_logs, prepare=self._prepare, tracing=tracing)
        self._loop = Loop(message=self._ledger.message, said=self._ledger.said, lost=self._ledger.lost, tick=self._tick)

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

        members, bad = self._members, self._ledger.bad
        done = self._loop.until(lambda: bad or all(map(self._is_prepared, members)), self._left_s())
        if bad:
            self._loop.until(lambda: all(m.lost or m.hello for m in members), min(_BAD_HOSTS_S, self._left_s()))
            self._raise_bad()

        if not done:
            late = [f"host {m.name}" for m in members if not m.hello]
            doing = "connecting to the hosts" if late else "preparing the hosts (env_file, import of torch)"
            late = late or [f"host {m.name}" for m in members if not self._is_prepared(m)]
            raise LaunchTimeoutError(self._task.timeout_s, doing, late)

    def _start(self) -> None:
        """Start the workers, and wait until they have found each other."""
        self._ledger.appoint(self._loop.selector)
        workers = self._ledger.workers
        first, backend = self._members[0], self._choose_backend()
        first.link.channel.send("reserve", job=self._id, address=meeting_address(self._members))
        self._await(lambda: self._ledger.meeting, "finding a port for the workers to meet at", [f"host {first.name}"])
        assert self._ledger.meeting is not None
        address, port = self._ledger.meeting
        for member in self._members:
            payload_id = self._delivery.send(member)
            member.link.channel.send(
                "start",
                job=self._id,
                payload=payload_id,
                near=is_near(member),
                script=None if self._task.script is None else dict(self._task.script),
                workers=[{"rank": worker.rank, "local_rank": worker.local_rank} for worker in member.workers],
                world_size=len(workers),
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

        self._delivery.fill(self._loop.breathe)
        doing = "starting the workers" + (f" and their process group ({backend})" if backend else "")
        self._await(lambda: all(w.ready for w in workers), doing, None)

    def _watch(self) -> None:
        """Wait for the results, however long that takes."""
        ledger = self._ledger
        self._loop.until(lambda: ledger.failures or all(worker.done for worker in ledger.workers))
        self._raise_failures()

    def _release(self) -> None:
        """Let the workers end, and see them gone; they were held, as others may still have needed them."""
        for member in self._members:
            member.link.channel.send("release", job=self._id)

        self._ledger.stopping = self._ledger.released = True  # what fails now has no bearing on the results
        if not self._loop.until(lambda: all(m.idle or m.lost for m in self._members), self._task.timeout_s):
            _log.warning(
                "workers on %s did not end within %g s after they had returned, and were killed",
                ", ".join(m.name for m in self._members if not m.idle),
                self._task.timeout_s,
            )
            self._stop()

    # --- ends that nobody wished for ---------------------------------------------------------------------------------

    def _raise_bad(self) -> None:
        first, *others = self._ledger.bad
        for other in others:
            first.add_note(str(other))

        raise first

    def _raise_failures(self) -> None:
        ledger = self._ledger
        if not ledger.failures:
            return

        def all_told() -> bool:
            failed = {failure.rank for failure in ledger.failures}
            return all(w.done or w.ended or w.member.lost or w.rank in failed for w in ledger.workers)

        self._loop.until(all_told, _GRACE_S)
        if all(failure.collateral for failure in ledger.failures):  # then there is a cause, perhaps on its way
            self._loop.until(lambda: not all(failure.collateral for failure in ledger.failures), _CAUSE_S)

        raise first_cause(ledger.failures)

    def _await(self, condition: Callable[[], object], doing: str, absent: list[str] | None) -> None:
        """Wait for something of the start-up.

        Raises:
            LaunchTimeoutError: it takes too long; `absent` is who was waited for, None: the workers that are not ready.
        """
        done = self._loop.until(lambda: self._ledger.failures or condition(), self._left_s())
        self._raise_failures()
        if not done:
            late = absent or [str(worker) for worker in self._ledger.workers if not worker.ready]
            raise LaunchTimeoutError(self._task.timeout_s, doing, late)

    def _abort(self, error: BaseException) -> None:
        """End everything; where nothing explains the end, say what the workers were doing."""
        ledger = self._ledger
        explained = any(failure.explains(error) for failure in ledger.failures)
        failed = {failure.rank for failure in ledger.failures}
        running = [w for w in ledger.workers if w.pid is not None and not (w.done or w.ended or w.rank in failed)]
        if running and not explained:
            self._collect_stacks(running)
            given_up = [f.rank for f in ledger.failures if f.collateral and f.rank is not None]
            note_stacks(error, running, ledger.stacks, given_up)

        self._stop()

    def _collect_stacks(self, running: Sequence[Worker]) -> None:
        asked = {worker.member.name: worker.member for worker in running if not worker.member.lost}
        for member in asked.values():
            member.link.channel.send("stacks", job=self._id)

        self._loop.until(lambda: all(m.lost or m.name in self._ledger.told_stacks for m in asked.values()), _STACKS_S)

    def _stop(self) -> None:
        self._ledger.stopping = True
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
        self._delivery.close()
        for member in self._members:
            while not member.lost and (data := member.link.read_errors()):
                self._ledger.said(member, data)

            if member.idle and not member.lost and self._task.keep_agents:
                POOL.give(member.key, member.link)
            else:
                member.link.hang_up()

        for member in self._members:
            if member.link.channel.closed:
                member.link.close()

        self._ledger.close()

    def _end_tracing(self, error: BaseException | None) -> None:
        if self._tracing is None:
            return

        status = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, WorkerFailedError):
            status = 128 + error.signal if error.signal else error.exit_code or 1

        self._tracing.finish(status)

    def _prepare(self, member: Member) -> None:
        theirs = str(member.hello.get("python"))
        if self._task.parcel is not None and theirs.split(".")[:2] != platform.python_version().split(".")[:2]:
            reason = f"its Python is {theirs}, ours {platform.python_version()}: a function's code is of one version"
            advice = "Name one of the same minor version there by `python=`; a script (`traceml launch`) may use any."
            self._ledger.bad.append(AgentFailedError(member.name, reason, advice=advice))
            return

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
            main=dict(self._task.main),
            workers=member.size,
            threads=None,
            need_torch=self._need_torch(),
        )

    def _tick(self) -> None:
        if self._tracing is not None:
            self._tracing.tick()

    # --- small things ------------------------------------------------------------------------------------------------

    def _left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def _is_prepared(self, member: Member) -> bool:
        return member.prepared is not None and (self._tracing is None or self._tracing.ready(member.name))

    def _choose_backend(self) -> str | None:
        if self._task.backend != "auto":
            return self._task.backend

        gpus = [int((member.prepared or {}).get("gpus") or 0) for member in self._members]
        enough = all(n >= len(member.workers) for n, member in zip(gpus, self._members, strict=True))
        return "nccl" if enough else "gloo"

    def _need_torch(self) -> int:
        """Return 2 where it is an error if torch is not there, 1 if it shall be imported where it is there, else 0."""
        if self._task.backend is not None:
            return 2

        # a script is a training, as a rule, and makes its group itself; who has imported torch here will use it there
        return 1 if self._task.script is not None or "torch" in sys.modules else 0

    def _load(self, worker: Worker) -> Any:
        if worker.result is None:
            return None

        try:
            return payload.load(worker.result.memory(), what=f"the result of {worker}")
        finally:
            worker.result = None
