"""One launched job, from the first agent's answer to the last worker's end.

Every host goes through these states: its agent answers (`AgentHello`), its zygote is ready (`Prepared`), its workers
run (`Started`, `GroupReady`), have returned (`Done`), may end (`Release`), and nothing of them is left (`Idle`). A
failure on one host ends the job on all.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from traceml.errors import AgentFailedError, LaunchTimeoutError, WorkerFailedError
from traceml.launch.launcher.hosts.agent_pool import AGENT_POOL
from traceml.launch.launcher.hosts.slurm import task_options
from traceml.launch.launcher.job.channel_loop import ChannelLoop
from traceml.launch.launcher.job.failures import first_cause, note_stacks, worker_hung
from traceml.launch.launcher.job.job_host import JobHost, Worker, rendezvous_address
from traceml.launch.launcher.job.job_state import JobState, MakeLogs
from traceml.launch.launcher.job.payload_sender import PayloadSender, shares_memory_with
from traceml.launch.launcher.logs.log_handlers import log_level
from traceml.launch.shared import payload
from traceml.launch.shared.launch_messages import (
    AskWorkers,
    CollectStacks,
    Prepare,
    Probe,
    Release,
    Reserve,
    Start,
    StopWorkers,
)
from traceml.launch.shared.payload import SerializedValue
from traceml.process_ends import BY_OTHERS, EndedBySignal, forget_interrupts, interrupts_held

if TYPE_CHECKING:
    from traceml.launch.launcher.job.tracing import Tracing

__all__ = ["JobSpec", "LaunchJob"]

# After the first failure: the time for other workers to fail too, which may explain it better.
_GRACE_S = 0.5
# Where all failures look like consequences of another: the additional time for that one to arrive.
_CAUSE_S = 1.0
# After the first unusable host: the time for others to report too.
_HOST_ERROR_GRACE_S = 1.0
_STACKS_S = 5.0  # longer than an agent waits for a busy worker
_SLOW_S = 15.0  # a step of the start-up that takes longer is reported, with what is late
_WAIT_LOG_S = 5.0  # interval of the debug log's lines on what is waited for
_STOP_GRACE_S = 0.5  # between SIGTERM and SIGKILL
# From a SIGTERM or SIGHUP of ours: the time that workers have to save. Slurm and Kubernetes send SIGKILL after 30 s;
# before it the report has to be written.
_SAVE_S = 25.0
_STOP_S = 6.0
_CLEANUP_S = 8.0  # for new connections to hosts whose agents were lost: a busy host needs more than four
_LOOPBACK = "127.0.0.1"
# After a failure: the time for threads and exit handlers of the workers that have raised or returned.
_EXIT_S = 10.0

_log = logging.getLogger("traceml.launch")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """Specification of a launched job: what all workers run, and how."""

    call: SerializedValue | None
    script: Mapping[str, Any] | None  # instead of a call, a script: `path` or `module`, and `argv`
    backend: str | None  # of the process group; `auto`: nccl where there are enough GPUs, else gloo; None: no group
    timeout_s: float  # for start-up, and for the group's collectives
    environ: Mapping[str, str]  # variables for workers of other hosts; workers of this host inherit all
    env_file: str | None  # a file that bash sources on each host
    cwd: str
    sys_path: Sequence[str]  # folders where workers look for modules
    main: Mapping[str, str | None]  # description of the launcher's `__main__`, see `assembly`
    cpu_affinity: bool  # whether workers are distributed over the cores
    keep_agents: bool  # whether agents may serve the next launch


class LaunchJob:
    """Runs a spec on hosts. Use once.

    Args:
        hosts: in the order of ranks; their agents were started.
        make_logs: makes the log router, given the number of workers of each host.
        tracing: the run that the job is traced as.
    """

    def __init__(
        self, hosts: Sequence[JobHost], spec: JobSpec, *, make_logs: MakeLogs, tracing: Tracing | None = None
    ) -> None:
        self._hosts, self._spec, self._tracing = list(hosts), spec, tracing
        self._id = secrets.token_hex(8)
        self._deadline_s = time.monotonic() + spec.timeout_s
        self._sender = PayloadSender(spec.call, self._id)
        self._state = JobState(
            self._hosts,
            self._id,
            make_logs=make_logs,
            prepare=self._prepare,
            tracing=tracing,
            is_script=spec.script is not None,
        )
        self._waiting_for, self._wait_logged_s = "", time.monotonic()
        self._late: Callable[[], list[str]] | None = None  # of a step of the start-up: what is late
        self._began_s = 0.0
        self._loop = ChannelLoop(
            on_message=self._state.on_message,
            on_stderr=self._state.on_stderr,
            on_lost=self._state.on_lost,
            on_tick=self._tick,
        )

    def run(self) -> list[list[Any]]:
        """Run to the end; return the workers' results, by host and local rank.

        When it returns or raises, no worker is left on any reachable host. Other agents end their workers themselves.

        Raises:
            AgentFailedError: a host cannot be used, or was lost.
            WorkerFailedError: a worker died.
            LaunchTimeoutError: the workers did not get started in time.
            PayloadError: a result cannot be loaded here.
            Exception: what a worker raised.
        """
        with ExitStack() as held:  # a second Ctrl-C must not cut short the end: the report would call the ranks lost
            try:
                with self._loop:
                    self._run_steps(held)
            except BaseException as error:
                self._finish(error)
                raise

            self._finish(None)

        return [[self._load(worker) for worker in host.workers] for host in self._hosts]

    # --- the steps -----------------------------------------------------------------------------------------------

    def _run_steps(self, held: ExitStack) -> None:
        """Run all steps; end the job on all hosts if one fails. Afterwards interrupts are held."""
        try:
            self._gather()
            self._start()
            self._watch()
            self._release()
        except BaseException as error:
            held.enter_context(interrupts_held())
            self._abort(error)
            raise

        held.enter_context(interrupts_held())

    def _gather(self) -> None:
        """Wait until every host's agent has answered and its zygote is ready."""
        self._begin("agents", lambda: [host.late_text for host in self._late_hosts()])
        for host in self._hosts:
            self._loop.add(host)
            if host.connection.hello:
                self._prepare(host)

        hosts, errors = self._hosts, self._state.host_errors
        done = self._loop.run_until(lambda: errors or all(map(self._is_prepared, hosts)), self._left_s())
        if errors:
            self._loop.run_until(
                lambda: all(h.lost or h.hello for h in hosts), min(_HOST_ERROR_GRACE_S, self._left_s())
            )
            self._raise_host_errors()

        if not done:
            late = self._late_hosts()
            prepares = all(host.hello for host in late)
            doing = "preparing the hosts (env_file, import of torch)" if prepares else "connecting to the hosts"
            error = LaunchTimeoutError(self._spec.timeout_s, doing, [f"host {host.name}" for host in late])
            for host in late:
                error.add_note(host.late_text)

            raise error

    def _start(self) -> None:
        """Start the workers, and wait until they are in one process group."""
        self._state.assign_ranks(self._loop.selector)
        workers = self._state.workers
        first, backend = self._hosts[0], self._choose_backend()
        first.connection.channel.send(Reserve(job=self._id, address=rendezvous_address(self._hosts)))
        doing = "finding a port for the workers to meet at"
        self._await(lambda: self._state.rendezvous, doing, lambda: [f"host {first.name}"])
        assert self._state.rendezvous is not None
        address, port = self._state.rendezvous
        if backend is not None and address != _LOOPBACK:
            self._check_paths(address, port)

        for host in self._hosts:
            payload_id = self._sender.send(host)
            host.connection.channel.send(
                Start(
                    job=self._id,
                    payload=payload_id,
                    shares_memory=shares_memory_with(host),
                    script=None if self._spec.script is None else dict(self._spec.script),
                    ranks=[worker.rank for worker in host.workers],
                    world_size=len(workers),
                    group_rank=self._hosts.index(host),
                    master_addr=address,
                    master_port=port,
                    backend=backend,
                    timeout_s=self._spec.timeout_s,
                    env={} if self._tracing is None else self._tracing.environ(host.name),
                    trace=None if self._tracing is None else self._tracing.traced_run(host.name),
                    cpu_affinity=self._spec.cpu_affinity,
                    log_level=log_level(os.environ),
                )
            )
            host.started = True

        self._sender.fill(self._loop.run_once)
        doing = "starting the workers" + (f" and their process group ({backend})" if backend else "")
        self._await(lambda: all(w.ready for w in workers), doing, lambda: [str(w) for w in workers if not w.ready])

    def _check_paths(self, address: str, port: int) -> None:
        """Have every other host connect to where the ranks meet: workers would try until the timeout."""
        others, state = self._hosts[1:], self._state
        for host in others:
            host.connection.channel.send(Probe(job=self._id, address=address, port=port))

        def late() -> list[str]:
            return [f"host {host.name}" for host in others if host.name not in state.probed]

        self._await(lambda: not late(), f"connecting from the other hosts to {address}:{port}", late)
        if state.host_errors:
            self._raise_host_errors()

    def _watch(self) -> None:
        """Wait for the results, without a time limit."""
        self._begin("results")
        state = self._state
        self._loop.run_until(lambda: state.failures or all(worker.done for worker in state.workers))
        self._raise_failures()

    def _release(self) -> None:
        """Let the workers end. Until now they were held, as others may have needed them."""
        self._begin("the end of the workers")
        for host in self._hosts:
            host.connection.channel.send(Release(job=self._id))

        self._state.stopping = self._state.released = True  # failures from here on do not affect the results
        if not self._loop.run_until(lambda: all(h.idle or h.lost for h in self._hosts), self._spec.timeout_s):
            _log.warning(
                "workers on %s did not end within %g s after they had returned, and were killed",
                ", ".join(h.name for h in self._hosts if not h.idle),
                self._spec.timeout_s,
            )
            self._stop(exit_s=0)

    # --- failures ----------------------------------------------------------------------------------------------------

    def _raise_host_errors(self) -> None:
        first, *others = self._state.host_errors
        for other in others:
            first.add_note(str(other))

        raise first

    def _raise_failures(self) -> None:
        state = self._state
        if not state.failures:
            return

        def all_reported() -> bool:
            failed = {failure.rank for failure in state.failures}
            return all(w.done or w.ended or w.host.lost or w.rank in failed for w in state.workers)

        self._loop.run_until(all_reported, _GRACE_S)
        if all(failure.secondary for failure in state.failures):  # then the cause may still arrive
            self._loop.run_until(lambda: not all(failure.secondary for failure in state.failures), _CAUSE_S)

        raise first_cause(state.failures)

    def _await(self, condition: Callable[[], object], doing: str, late: Callable[[], list[str]]) -> None:
        """Wait for a step of the start-up.

        Raises:
            LaunchTimeoutError: it takes too long; `late` names the hosts or workers that are missing.
        """
        self._begin(doing, late)
        done = self._loop.run_until(lambda: self._state.failures or condition(), self._left_s())
        self._raise_failures()
        if not done:
            raise LaunchTimeoutError(self._spec.timeout_s, doing, late())

    def _abort(self, error: BaseException) -> None:
        """End everything; add the workers' stacks to an error that does not explain itself."""
        state = self._state
        state.stopping = not isinstance(error, Exception)  # by Ctrl-C or a signal: what ends from here on is no failure
        explained = any(failure.explains(error) for failure in state.failures)
        failed = {failure.rank for failure in state.failures}
        running = [w for w in state.workers if w.pid is not None and not (w.done or w.ended or w.rank in failed)]
        if running and not explained:
            self._collect_stacks(running)
            timed_out = [f.rank for f in state.failures if f.secondary and f.rank is not None]
            note_stacks(error, running, state.stacks, timed_out)

        if isinstance(error, EndedBySignal) and error.number in BY_OTHERS:
            self._ask(error.at_s + _SAVE_S - time.time())

        self._stop()

    def _collect_stacks(self, running: Sequence[Worker]) -> None:
        asked = {worker.host.name: worker.host for worker in running if not worker.host.lost}
        for host in asked.values():
            host.connection.channel.send(CollectStacks(job=self._id))

        self._loop.run_until(
            lambda: all(h.lost or h.name in self._state.stacks_received for h in asked.values()), _STACKS_S
        )

    def _ask(self, limit_s: float) -> None:
        """Have the workers end by themselves, until the limit or Ctrl-C, which is held back and pending."""
        self._state.stopping = True
        asked = [host for host in self._hosts if host.started and not (host.lost or host.idle)]
        for host in asked:
            host.connection.channel.send(AskWorkers(job=self._id))

        self._loop.run_until(
            lambda: all(h.idle or h.lost for h in asked) or signal.SIGINT in signal.sigpending(), limit_s
        )

    def _stop(self, exit_s: float = _EXIT_S) -> None:
        self._state.stopping = True
        for host in self._hosts:
            if host.lost or host.idle:
                continue

            if host.started:
                host.connection.channel.send(StopWorkers(job=self._id, grace_s=_STOP_GRACE_S, exit_s=exit_s))
            elif self._is_prepared(host):
                host.idle = True
            else:  # preparing: that ends with its agent
                self._loop.remove(host)
                host.lost = True
                host.connection.close(wait_s=0.2)

        if not self._loop.run_until(lambda: all(h.idle or h.lost for h in self._hosts), exit_s + _STOP_S):
            names = ", ".join(h.name for h in self._hosts if not (h.idle or h.lost))
            _log.warning("%s did not confirm within %g s that the workers there have ended", names, exit_s + _STOP_S)

    def _release_agents(self) -> None:
        """Keep idle agents for the next launch, and end the others."""
        self._sender.close()
        for host in self._hosts:
            while not host.lost and (data := host.connection.read_errors()):
                self._state.on_stderr(host, data)

            if host.idle and not host.lost and self._spec.keep_agents:
                AGENT_POOL.put(host.key, host.connection)
            else:
                host.connection.close_now()

        cleaned_s = time.monotonic() + _CLEANUP_S
        for host in self._hosts:
            if host.connection.channel.closed:
                host.connection.close()

            host.connection.await_cleanup(cleaned_s - time.monotonic())

        self._state.close()

    def _finish(self, error: BaseException | None) -> None:
        """Release the agents, and report the end of the job, which `error` has ended."""
        self._release_agents()
        if isinstance(error, KeyboardInterrupt):  # one that comes from here on leaves values to `traceml sync`
            forget_interrupts()

        self._end_tracing(error)

    def _end_tracing(self, error: BaseException | None) -> None:
        if self._tracing is None:
            return

        status = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, WorkerFailedError):
            status = 128 + error.signal if error.signal else error.exit_code or 1

        ended_by = None
        if isinstance(error, EndedBySignal):
            status = 128 + error.number
            if error.number in BY_OTHERS:
                ended_by = {"signal": error.number, "time": error.at_s, "from_terminal": error.from_terminal}

        self._tracing.finish(status, ended_by)

    def _prepare(self, host: JobHost) -> None:
        assert host.hello is not None
        theirs = host.hello.python
        if self._spec.call is not None and theirs.split(".")[:2] != platform.python_version().split(".")[:2]:
            ours = platform.python_version()
            reason = f"its Python is {theirs}, ours {ours}: a function's code needs the same minor version"
            advice = "Give the path of a matching one with `python=`; a script (`traceml launch`) may use any."
            self._state.host_errors.append(AgentFailedError(host.name, reason, advice=advice))
            return

        local, environ = host.spec.transport == "local", dict(self._spec.environ)
        if local:
            environ = {**os.environ, **environ}
        elif host.spec.transport == "srun":
            environ = {**task_options(os.environ), **environ}

        if self._tracing is not None:
            self._tracing.add_host(
                host.name,
                host.connection.channel,
                self._loop.selector,
                job=self._id,
                hostname=host.hello.hostname or host.name,
                local=local,
            )

        host.connection.channel.send(
            Prepare(
                job=self._id,
                env=environ,
                is_whole=local,
                env_file=self._spec.env_file,
                cwd=self._spec.cwd,
                sys_path=list(self._spec.sys_path),
                main=dict(self._spec.main),
                need_torch=self._need_torch(),
            )
        )

    def _tick(self) -> None:
        if self._tracing is not None:
            self._tracing.tick()
            if not (self._state.stopping or self._state.failures) and self._tracing.must_end:
                self._state.failures += [worker_hung(each) for each in self._state.workers if not each.ended][:1]

        now_s = time.monotonic()
        if self._late is not None and now_s - self._began_s >= _SLOW_S and not self._state.stopping:
            late, self._late = "; ".join(self._late()), None
            _log.warning("the launch has waited %g s for %s", _SLOW_S, late)

        if now_s - self._wait_logged_s >= _WAIT_LOG_S:
            self._wait_logged_s = now_s
            phases = ", ".join(f"{host.name} ({host.activity})" for host in self._hosts)
            _log.debug("waiting for %s: %s", self._waiting_for, phases)

    def _begin(self, waiting_for: str, late: Callable[[], list[str]] | None = None) -> None:
        self._waiting_for, self._late, self._began_s = waiting_for, late, time.monotonic()

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def _late_hosts(self) -> list[JobHost]:
        """Return the hosts that have not answered; once all have, those that are not prepared."""
        return [h for h in self._hosts if not h.hello] or [h for h in self._hosts if not self._is_prepared(h)]

    def _is_prepared(self, host: JobHost) -> bool:
        return host.prepared is not None and (self._tracing is None or self._tracing.is_ready(host.name))

    def _choose_backend(self) -> str | None:
        if self._spec.backend != "auto":
            return self._spec.backend

        gpus = [0 if host.prepared is None else host.prepared.gpus for host in self._hosts]
        enough = all(n >= len(host.workers) for n, host in zip(gpus, self._hosts, strict=True))
        return "nccl" if enough else "gloo"

    def _need_torch(self) -> int:
        """Return 2 if hosts must have torch, 1 to import it where it is installed, 0 not to import it."""
        if self._spec.backend is not None:
            return 2

        # a script is usually a training that makes its own group; a caller that has imported torch will use it there
        return 1 if self._spec.script is not None or "torch" in sys.modules else 0

    def _load(self, worker: Worker) -> Any:
        if worker.result is None:
            return None

        try:
            return payload.load(worker.result.memory(), what=f"the result of {worker}")
        finally:
            worker.result = None
