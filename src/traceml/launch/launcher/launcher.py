"""`traceml.launch` and `traceml.Launcher`: run a function on every worker of every host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from traceml.launch.launcher.launch_options import DEFAULT_ENV_VARS, LaunchOptions, LaunchResult, read_call

if TYPE_CHECKING:
    from traceml.launch.launcher.submission.submitted_job import SubmittedJob

__all__ = ["Launcher", "launch"]

T = TypeVar("T")


@dataclass
class Launcher(LaunchOptions):
    """Runs functions on hosts; the options are those of `launch`. Works with `tyro.cli(traceml.Launcher)`.

    Examples:
        >>> launcher = traceml.Launcher(hostnames=["node1", "node2"], workers_per_host=8)
        >>> losses = launcher.run(train, func_kwargs={"lr": 0.1}).results["node1"]
    """

    @overload
    def run(
        self,
        func: Callable[..., T],
        func_args: Sequence[Any] | None = (),
        func_kwargs: Mapping[str, Any] | None = None,
        log_handlers: Any = "auto",
    ) -> LaunchResult[T]: ...

    @overload
    def run(self, func: Callable[..., T], *args: Any, log_handlers: Any = "auto", **kwargs: Any) -> LaunchResult[T]: ...

    def run(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> LaunchResult[T]:
        """Run a function on every worker of every host; see `launch`.

        Two forms are accepted: `run(f, (a, b), {"key": 1})`, with the names `func_args` and `func_kwargs`, and
        `run(f, a, b, key=1)`. The first is meant when the first argument is a tuple, a list or None and nothing follows
        but a dict and `log_handlers`; so an only argument that is a list itself is given as `run(f, ([1, 2],))`.
        """
        from traceml.launch.launcher.assembly import run_function

        self.check()
        return run_function(self, read_call(func, args, kwargs))

    def submit(
        self,
        func: Callable[..., T],
        func_args: Sequence[Any] | None = (),
        func_kwargs: Mapping[str, Any] | None = None,
        *,
        log_handlers: Any = "auto",
        nodes: int = 1,
        time: int | str = 60,
        partition: str | None = None,
        gpus_per_node: int | None = None,
        cpus_per_node: int | None = None,
        mem: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        job_name: str | None = None,
        signal: str = "USR2@120",
        retries: int = 3,
        folder: str | Path | None = None,
        sbatch: Mapping[str, str | int | bool] | None = None,
    ) -> SubmittedJob[LaunchResult[T]]:
        """Submit a job to Slurm that does what `run` does, on the nodes that it gets.

        It needs submitit (extra `submit`), and a folder that all nodes can read. When Slurm ends the job at its time
        limit or for another job, it is queued again, and the function starts again: it resumes from its own checkpoint.
        All its starts are attempts of one run.

        Examples:
            >>> job = traceml.Launcher(trace=True).submit(train, nodes=2, time="12:00:00", gpus_per_node=8)
            >>> model = job.result().rank(0)

        Args:
            func: the function.
            func_args: its positional arguments.
            func_kwargs: its keyword arguments.
            log_handlers: as for `launch`.
            nodes: number of nodes.
            time: time limit: minutes, or a duration in Slurm's form (`1:30:00`, `1-12:00:00`).
            partition: partition; None: the cluster's default.
            gpus_per_node: GPUs of each node.
            cpus_per_node: CPU cores of each node.
            mem: memory of each node (`64G`).
            account: account to charge.
            qos: quality of service.
            job_name: name in the queue; None: the function's.
            signal: signal that every worker gets before the time limit, and how many seconds before; "" for none. A
                worker that does not handle SIGUSR1 or SIGUSR2 ignores it.
            retries: how often the job is queued again.
            folder: folder of the job's files; `%j` stands for the job's id. None: `slurm/%j` in the folder of logs.
            sbatch: further options of sbatch by name.

        Raises:
            TraceMLError: submitit is not installed.
            SlurmError: this host cannot submit, or Slurm refuses the job.
            UsageError: an argument has an invalid value.
        """
        from traceml.launch.launcher.submission.allocation_call import AllocationCall
        from traceml.launch.launcher.submission.submitting import SlurmOptions, submit

        self.check()
        own = {"func_args": func_args, "func_kwargs": func_kwargs, "log_handlers": log_handlers}
        slurm = SlurmOptions(
            nodes=nodes,
            time=time,
            partition=partition,
            gpus_per_node=gpus_per_node,
            cpus_per_node=cpus_per_node,
            mem=mem,
            account=account,
            qos=qos,
            job_name=job_name,
            signal=signal,
            retries=retries,
            folder=folder,
            sbatch=sbatch or {},
        )
        call = AllocationCall(options=self, call=read_call(func, (), own), retries=slurm.retries)
        return submit(call, slurm, getattr(func, "__name__", "launch").strip("<>"))


def launch(
    func: Callable[..., T],
    func_args: Sequence[Any] | None = (),
    func_kwargs: Mapping[str, Any] | None = None,
    *,
    hostnames: list[str] | Literal["auto", "slurm"] | Path = "auto",
    workers_per_host: int | list[int] | Literal["auto", "slurm"] = "auto",
    ssh_config_file: str | Path | None = None,
    backend: Literal["nccl", "gloo", "mpi", "ucc", "auto"] | None = "auto",
    timeout: int = 600,
    default_env_vars: Sequence[str] = DEFAULT_ENV_VARS,
    extra_env_vars: Sequence[str] = (),
    env_file: str | Path | None = None,
    log_handlers: Any = "auto",
    keep_agents: bool = True,
    trace: bool = False,
    python: str | None = None,
    cpu_affinity: bool = True,
) -> LaunchResult[T]:
    """Run a function on every worker of every host, and return the results.

    Workers are processes with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, in one
    process group. When this returns or raises, all of them and all processes that they started have ended.

    Examples:
        >>> model = traceml.launch(train, hostnames=["node1", "node2"], workers_per_host=8).rank(0)

    Args:
        func: the function. It, its arguments and its results are sent by cloudpickle: it may be defined in the script
            itself, or be a lambda or a closure.
        func_args: its positional arguments.
        func_kwargs: its keyword arguments.
        hostnames: host names for ssh (`node1:2222` with its port), or names of this host (`localhost`); the path of a
            hostfile; `auto`: the Slurm allocation, else this host; `slurm`: the allocation.
        workers_per_host: for all hosts, or one number for each; `auto`: the slots of a hostfile, else one per GPU of
            the host, else as requested from Slurm, else one per CPU core; `slurm`: the same, and there must be an
            allocation.
        ssh_config_file: configuration that ssh reads instead of ~/.ssh/config.
        backend: backend of the process group; `auto`: nccl where each worker has a GPU, else gloo; None: no group.
        timeout: seconds for start-up, and for the group's collectives; never for the function.
        default_env_vars: patterns of variables that workers of other hosts get from this environment; workers of
            this host inherit all.
        extra_env_vars: additional variables.
        env_file: a script that bash sources on each host before its workers start; they get its exported variables.
        log_handlers: `auto` prints the output of the first host's agent and first worker, and writes files for all;
            or a list of logging handlers.
        keep_agents: leave an idle agent with torch imported on each host; it makes the next launch of this process
            fast, and ends with this process.
        trace: trace the job: live view, verdict, report.
        python: the interpreter on the hosts; by default the path of this one.
        cpu_affinity: give each worker of a host its own share of the CPU cores.

    Raises:
        Exception: a worker's exception, with the worker's name as a note and its traceback as the cause.
        WorkerFailedError: a worker died: a signal, an exit code.
        AgentFailedError: a host cannot be reached or used, or was lost.
        LaunchTimeoutError: start-up took longer than `timeout`.
        PayloadError: the function, an argument or a result cannot be pickled.
        SlurmError: Slurm is requested, and there is no allocation.
        UsageError: an argument has an invalid value.
    """
    launcher = Launcher(
        hostnames=hostnames,
        workers_per_host=workers_per_host,
        ssh_config_file=ssh_config_file,
        backend=backend,
        timeout=timeout,
        default_env_vars=default_env_vars,
        extra_env_vars=extra_env_vars,
        env_file=env_file,
        keep_agents=keep_agents,
        trace=trace,
        python=python,
        cpu_affinity=cpu_affinity,
    )
    return launcher.run(func, func_args=func_args, func_kwargs=func_kwargs, log_handlers=log_handlers)
