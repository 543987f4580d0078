"""torchrun, with failures reported as they happen.

`python -m traceml.supervise.elastic [torchrun options] SCRIPT …` does what `torchrun` does. It also writes one JSON
line per failed process, an `ExitReport`, to the descriptor in TRACEML_FAILURES_FD, in every attempt, and one after each
rendezvous of several nodes (`node_run`). It exits with the status of the rank that failed first: its exit code, or
128 + n for signal n. torchrun itself always exits with 1.

Process: torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from traceml.helper_programs import exit_process, importing
from traceml.process_ends import ignore_slurm_warnings, shell_status

__all__ = ["first_failure", "main", "terminate_remaining_workers"]

_CLOSING = (-signal.SIGTERM, -signal.SIGKILL)  # by which torchrun ends workers
_KILLED_S = 5.0
_RUNNING = "_traceml_running"  # attribute of torchrun's processes


def main(argv: Sequence[str]) -> int:
    """Run torchrun with `argv`; return the status of the first rank that failed, or 0."""
    with importing():  # torch: a tenth of a second less
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import determine_local_world_size, parse_args, run

    ignore_slurm_warnings()
    _name_methods_by_their_frames()
    fd_text = os.environ.pop("TRACEML_FAILURES_FD", None)
    report = _reporter(fd_text)
    reported, agents = _watch_agent(report)
    if (mode := os.environ.pop("TRACEML_NODE_RUN", None)) is not None and fd_text is not None:
        _agree_on_run(int(fd_text), shows_token=mode == "token")

    options = parse_args(list(argv))
    try:
        determine_local_world_size(options.nproc_per_node)
    except ValueError as error:  # `gpu` without one: a line instead of torch's traceback
        print(f"torchrun: --nproc-per-node {options.nproc_per_node}: {error}", file=sys.stderr)  # noqa: T201 - as below
        return 2

    try:
        run(options)
    except ValueError as error:
        if agents:
            raise

        # another option: `--tee 9`, an unknown --rdzv-backend
        print(f"torchrun: {error}", file=sys.stderr)  # noqa: T201 - as below
        return 2
    except ChildFailedError as error:
        if not reported:
            report(error.failures.items())

        # torchrun's own report of the failure
        print(error, file=sys.stderr)  # noqa: T201 - this module is a program
        return shell_status(first_failure(error.failures.values()).exitcode)
    except SignalException as error:
        for agent in agents:
            terminate_remaining_workers(agent)
            report(_ended(agent, bool), _running_at_close(getattr(agent, "_pcontext", None)))

        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 130

    return 0


def first_failure(failures: Iterable[Any]) -> Any:
    """Return the failure of the rank that failed first.

    torchrun records times in whole seconds. Of ranks that failed within one, those with an exception (exit code 1) may
    have failed because another one was gone, and torchrun ends the others by SIGTERM.
    """
    known = sorted(failures, key=lambda failure: failure.timestamp)
    together = [each for each in known if each.timestamp - known[0].timestamp <= 1]
    return min(together, key=lambda failure: failure.exitcode in (1, -signal.SIGTERM))


def _name_methods_by_their_frames() -> None:
    """Spare torchrun 0.15 s of processor time: its rendezvous reads the sources of all frames to name a method.

    The function is private to torch: where it is missing, nothing is spared.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    if hasattr(dynamic_rendezvous, "get_method_name"):
        dynamic_rendezvous.get_method_name = _method_name


def _method_name(depth: int = 2) -> str:
    """Return the name of the function so many frames above this one."""
    try:
        return sys._getframe(depth).f_code.co_name
    except ValueError:  # there are fewer
        return "no_method_name"


def _reporter(fd_text: str | None) -> Any:
    """Return a function that writes (rank, ProcessFailure) pairs to the descriptor, or does nothing without one.

    It also takes the local ranks that ran until torchrun ended them.
    """
    if fd_text is None:
        return lambda _failures, _running=(): None

    fd = int(fd_text)
    os.set_inheritable(fd, False)

    def report(failures: Iterable[tuple[int, Any]], running: Collection[int] = ()) -> None:
        from traceml.transport.exit_report import ExitReport, write_line  # the script of `traceml run` waits for it

        for rank, failure in failures:
            ended = ExitReport(
                rank=rank,
                local_rank=failure.local_rank,
                pid=failure.pid,
                exitcode=failure.exitcode,
                time=failure.timestamp,
                stopped=failure.local_rank in running and failure.exitcode in _CLOSING,
            )
            write_line(fd, ended.to_message())

    return report


def _watch_agent(report: Any) -> tuple[list[bool], list[Any]]:
    """Make torchrun's agent report the failures of each attempt, also of those that it restarts, and ends without one.

    So it does with workers that it ends as other nodes have joined or left. `_monitor_workers` and `_stop_workers` are
    private to torch: where one is missing, the failures of the last attempt are reported at the end.

    Returns:
        A list that is empty until something was reported, and one that will hold the agent.
    """
    from torch.distributed.launcher import api

    reported: list[bool] = []
    agents: list[Any] = []
    known: set[int] = set()  # pids of workers whose ends were reported
    agent: Any = getattr(api, "LocalElasticAgent", None)
    original, original_stop = getattr(agent, "_monitor_workers", None), getattr(agent, "_stop_workers", None)
    if original is None or original_stop is None:
        return reported, agents

    def report_new(ends: Iterable[tuple[int, Any]], running: Collection[int] = ()) -> None:
        new = [(rank, end) for rank, end in ends if end.pid not in known]
        known.update(end.pid for _, end in new)
        report(new, running)

    def monitor(self: Any, *args: Any, **kwargs: Any) -> Any:
        agents[:] = [self]
        running = _running_at_close(getattr(self, "_pcontext", None))
        result = original(self, *args, **kwargs)
        if failures := getattr(result, "failures", None):
            report_new(failures.items(), running)
            reported.append(True)

        # One that left by os._exit(0) says no bye, and counts as lost until its code is known.
        report_new(_ended(self, lambda code: code == 0))
        return result

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        running = _running_at_close(getattr(self, "_pcontext", None))
        result = original_stop(self, *args, **kwargs)
        report_new(_ended(self, lambda code: code is not None), running)
        return result

    agent._monitor_workers, agent._stop_workers = monitor, stop
    return reported, agents


def _agree_on_run(fd: int, *, shows_token: bool) -> None:
    """Make torchrun's agent agree with those of the other nodes on one run, before it starts the workers.

    The methods are private to torch: where one is missing, each node has a run of its own.
    """
    import msgspec
    from torch.distributed.launcher import api

    from traceml.supervise.node_run import NodeRun, NodeRunReport
    from traceml.transport.exit_report import write_line

    def tell(report: NodeRunReport) -> None:
        write_line(fd, {"node_run": msgspec.to_builtins(report)})

    agent = getattr(api, "LocalElasticAgent", None)
    rendezvous, assign = getattr(agent, "_rendezvous", None), getattr(agent, "_assign_worker_ranks", None)
    if agent is None or rendezvous is None or assign is None:
        tell(NodeRunReport())
        return

    run = NodeRun(os.environ, tell, shows_token=shows_token)

    def rendezvous_and_agree(self: Any, group: Any) -> None:
        rendezvous(self, group)
        run.agree(group.store, group.group_rank, group.group_world_size, group.master_addr)

    def claim_and_assign(self: Any, store: Any, *args: Any) -> Any:
        run.claim(store)
        return assign(self, store, *args)

    agent._rendezvous, agent._assign_worker_ranks = rendezvous_and_agree, claim_and_assign


def _running_at_close(context: Any) -> set[int]:
    """Return a set that torchrun's end of an attempt fills with the local ranks that still run: it ends these.

    It has a list of failures, in which they look like a rank that somebody killed. Where the attributes that are read
    here are missing, the set stays empty.
    """
    if not hasattr(context, "close") or not hasattr(context, "subprocess_handlers"):
        return set()
    if (known := vars(context).get(_RUNNING)) is not None:
        return known  # type: ignore[no-any-return]

    running: set[int] = set()
    original = context.close

    def close(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(AttributeError):
            running.update(rank for rank, each in context.subprocess_handlers.items() if each.proc.poll() is None)

        return original(*args, **kwargs)

    setattr(context, _RUNNING, running)
    context.close = close
    return running


def terminate_remaining_workers(agent: Any) -> None:
    """End the workers that are left when further signals have interrupted torchrun, which waits 30 s for each to end.

    One that is stopped, or in a call of C that handles no signal, would outlive the job.
    """
    for handler in getattr(getattr(agent, "_pcontext", None), "subprocess_handlers", {}).values():
        if handler.proc.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(handler.proc.pid, signal.SIGKILL)

            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel
                handler.proc.wait(_KILLED_S)


def _ended(agent: Any, has_code: Callable[[int | None], bool]) -> list[tuple[int, Any]]:
    """Return the ends of workers that torchrun does not report itself, as without a failure, or after a signal to it.

    It reads attributes that are private to torch: where they are missing, the ranks' own reports are used.
    """
    found = []
    handlers = getattr(getattr(agent, "_pcontext", None), "subprocess_handlers", {})
    workers = getattr(getattr(agent, "_worker_group", None), "workers", [])
    ranks = {worker.local_rank: worker.global_rank for worker in workers}
    for local_rank, handler in handlers.items():
        if has_code(handler.proc.returncode) and local_rank in ranks:
            end = SimpleNamespace(
                local_rank=local_rank, pid=handler.proc.pid, exitcode=handler.proc.returncode, timestamp=None
            )
            found.append((ranks[local_rank], end))

    return found


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
