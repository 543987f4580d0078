"""`traceml.launch`: run a function on every worker of every host, and return what each returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from traceml.errors import ResultNotFoundError, UsageError

__all__ = ["DEFAULT_ENV_VARS", "LaunchResult", "Launcher", "launch", "matching"]

DEFAULT_ENV_VARS: tuple[str, ...] = (
    "PATH",
    "LD_LIBRARY_PATH",
    "LIBRARY_PATH",
    "PYTHON*",
    "VIRTUAL_ENV",
    "CUDA*",
    "TORCH*",
    "PYTORCH*",
    "NCCL*",
    "GLOO*",
    "OMP_*",
    "MKL_*",
    "HF_*",
    "TRACEML_*",
)
"""Variables (patterns of fnmatch) that workers of other hosts get from the launcher's environment."""

_BACKENDS = ("nccl", "gloo", "mpi", "ucc", "auto", None)


@dataclass(frozen=True)
class LaunchResult:
    """What the workers of a launch returned.

    Attributes:
        results: by hostname (as given to `launch`), then by local rank.
    """

    results: dict[str, list[Any]]

    def rank(self, i: int) -> Any:
        """Return what the worker with rank `i` returned.

        Raises:
            ResultNotFoundError: there is no such rank. It is an IndexError.
        """
        values = [value for host in self.results.values() for value in host]
        if not 0 <= i < len(values):
            raise ResultNotFoundError(f"rank {i}: this launch had the ranks 0 to {len(values) - 1}")

        return values[i]

    def index(self, hostname: str, local_rank: int) -> Any:
        """Return what one worker of a host returned.

        Raises:
            ResultNotFoundError: no such host, or no such local rank there. It is an IndexError and a KeyError.
        """
        host = self.results.get(hostname)
        if host is None:
            raise ResultNotFoundError(f"host {hostname!r}: this launch had the hosts {', '.join(self.results)}")

        if not 0 <= local_rank < len(host):
            raise ResultNotFoundError(
                f"local rank {local_rank} on {hostname}: this launch had the local ranks 0 to {len(host) - 1} there"
            )

        return host[local_rank]


@dataclass
class Launcher:
    """Runs functions on hosts; the options are those of `launch`. Works with `tyro.cli(traceml.Launcher)`."""

    hostnames: list[str] | Literal["auto", "slurm"] = "auto"
    """Names that ssh understands, or of this host. auto: the Slurm allocation, else this host."""
    workers_per_host: int | list[int] | Literal["auto", "slurm"] = "auto"
    """For all hosts, or for each. auto: one per GPU, else what Slurm's job asked for, else one per CPU core."""
    ssh_config_file: str | Path | None = None
    """What ssh reads instead of ~/.ssh/config."""
    backend: Literal["nccl", "gloo", "mpi", "ucc", "auto"] | None = "auto"
    """Of the process group. auto: nccl where each worker has a GPU, else gloo. None: no group."""
    timeout: int = 600
    """Seconds for start-up, and for the process group's collectives; never for the function."""
    default_env_vars: Sequence[str] = DEFAULT_ENV_VARS
    """Variables (patterns) that other hosts get from this environment."""
    extra_env_vars: Sequence[str] = ()
    """More of them."""
    env_file: str | Path | None = None
    """A bash script that each host sources before its workers start; what it exports counts."""
    keep_agents: bool = True
    """Leave an idle agent with torch imported on each host, for the next launch of this process."""
    trace: bool = False
    """Trace the job: live view, verdict, report."""
    python: str | None = None
    """The interpreter on the hosts; by default this one's path."""
    cpu_affinity: bool = True
    """Give each worker of a host its own share of the CPU cores."""

    def run(
        self,
        func: Callable[..., Any],
        func_args: Sequence[Any] | None = (),
        func_kwargs: Mapping[str, Any] | None = None,
        log_handlers: Any = "auto",
    ) -> LaunchResult:
        """Run a function on every worker of every host; see `launch`."""
        from traceml.launch.run import run_function

        self._check()
        if not callable(func):
            raise UsageError(f"func={func!r}: it is not callable")

        if not isinstance(func_args, tuple | list | None):
            raise UsageError(f"func_args is a {type(func_args).__name__}: give a tuple, for one argument (x,)")

        if not isinstance(func_kwargs, Mapping | None):
            raise UsageError(f"func_kwargs is a {type(func_kwargs).__name__}: give a dict of arguments by name")

        return run_function(self, func, func_args or (), func_kwargs or {}, log_handlers)

    def _check(self) -> None:
        """Complain about values that no host has to be asked about."""
        if self.backend not in _BACKENDS:
            names = ", ".join(map(repr, _BACKENDS))
            raise UsageError(f"backend={self.backend!r}: it is one of {names}")

        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float) or not self.timeout > 0:
            raise UsageError(f"timeout={self.timeout!r}: it is a number of seconds above 0")

        for name in ("default_env_vars", "extra_env_vars"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise UsageError(f"{name}={patterns!r}: give a list of names or patterns, such as ['WANDB_*']")


def launch(
    func: Callable[..., Any],
    func_args: Sequence[Any] | None = (),
    func_kwargs: Mapping[str, Any] | None = None,
    *,
    hostnames: list[str] | Literal["auto", "slurm"] = "auto",
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
) -> LaunchResult:
    """Run a function on every worker of every host, and return what each returned.

    Workers are processes with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, in one
    process group. When this returns or raises, all of them and what they started are gone.

    Args:
        func: what to run. It, its arguments and its results travel by cloudpickle: it may stand in the script itself,
            or be a lambda or a closure.
        func_args: its positional arguments.
        func_kwargs: its keyword arguments.
        hostnames: names that ssh understands, or of this host (`localhost`); `auto`: the Slurm allocation, else this
            host; `slurm`: the allocation.
        workers_per_host: for all hosts, or one number for each; `auto`: one per GPU of the host, else what the Slurm
            job asked for, else one per CPU core; `slurm`: the same, and there must be an allocation.
        ssh_config_file: what ssh reads instead of ~/.ssh/config.
        backend: of the process group; `auto`: nccl where each worker has a GPU, else gloo; None: no group.
        timeout: seconds for start-up, and for the group's collectives; never for the function.
        default_env_vars: patterns of variables that other hosts get from this environment; workers here inherit all.
        extra_env_vars: more of them.
        env_file: a script that bash sources on each host before its workers start; what it exports counts.
        log_handlers: `auto` prints what the first host's agent and first worker write, and writes files for all; or a
            list of logging handlers.
        keep_agents: leave an idle agent with torch imported on each host; it makes the next launch of this process
            fast, and ends with this process.
        trace: trace the job: live view, verdict, report.
        python: the interpreter on the hosts; by default this one's path.
        cpu_affinity: give each worker of a host its own share of the CPU cores.

    Raises:
        Exception: what a worker raised, with the worker's name as a note and its traceback as the cause.
        WorkerFailedError: a worker died: a signal, an exit code.
        AgentFailedError: a host cannot be reached or used, or was lost.
        LaunchTimeoutError: start-up took longer than `timeout`.
        PayloadError: the function, an argument or a result cannot be pickled.
        SlurmError: Slurm is asked for, and there is no allocation.
        UsageError: an argument has a value that cannot be.
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
    return launcher.run(func, func_args, func_kwargs, log_handlers)


def matching(environ: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """Return the variables whose names match one of the patterns, which are case-sensitive as names are."""
    return {name: value for name, value in environ.items() if any(fnmatchcase(name, each) for each in patterns)}
