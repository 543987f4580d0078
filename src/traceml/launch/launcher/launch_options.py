"""The options of a launch, the call that it runs, and its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from traceml.errors import ResultNotFoundError, UsageError

__all__ = ["DEFAULT_ENV_VARS", "FunctionCall", "LaunchOptions", "LaunchResult", "matching", "read_call"]

DEFAULT_ENV_VARS: tuple[str, ...] = (
    "PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "PYTHON*", "VIRTUAL_ENV", "CUDA*", "TORCH*", "PYTORCH*", "NCCL*",
    "GLOO*", "OMP_*", "MKL_*", "HF_*", "TRACEML_*",
)  # fmt: skip
"""Variables (fnmatch patterns) that workers of other hosts get from the launcher's environment."""

T = TypeVar("T")
"""Result of the function on one worker."""

_BACKENDS = ("nccl", "gloo", "mpi", "ucc", "auto", None)
_OWN = ("func_args", "func_kwargs", "log_handlers")  # arguments of `run` in the order of positions


@dataclass(frozen=True)
class LaunchResult(Generic[T]):
    """Results of the workers of a launch; `LaunchResult[float]` where the function returns a float.

    Examples:
        >>> result = traceml.LaunchResult({"node1": [0.5, 0.4], "node2": [0.3, 0.2]})
        >>> result.rank(2), result.index("node1", 1)
        (0.3, 0.4)

    Attributes:
        results: by hostname (as given to `launch`), then by local rank.
    """

    results: dict[str, list[T]]

    def rank(self, i: int) -> T:
        """Return the result of rank `i`.

        Raises:
            ResultNotFoundError: there is no such rank. It is an IndexError.
        """
        values = [value for host in self.results.values() for value in host]
        if not 0 <= i < len(values):
            raise ResultNotFoundError(f"rank {i}: this launch had the ranks 0 to {len(values) - 1}")

        return values[i]

    def index(self, hostname: str, local_rank: int) -> T:
        """Return the result of one worker of a host.

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
class LaunchOptions:
    """Options of a launch, see `launch`."""

    hostnames: list[str] | Literal["auto", "slurm"] | Path = "auto"
    """Host names for ssh (host:port), or of this host; or a hostfile. auto: the Slurm allocation, else this host."""
    workers_per_host: int | list[int] | Literal["auto", "slurm"] = "auto"
    """For all hosts, or for each. auto: a hostfile's slots, else one per GPU, else Slurm's tasks, else one per core."""
    ssh_config_file: str | Path | None = None
    """Configuration that ssh reads instead of ~/.ssh/config."""
    backend: Literal["nccl", "gloo", "mpi", "ucc", "auto"] | None = "auto"
    """Backend of the process group. auto: nccl where each worker has a GPU, else gloo. None: no group."""
    timeout: int = 600
    """Seconds for start-up, and for the process group's collectives; never for the function."""
    default_env_vars: Sequence[str] = DEFAULT_ENV_VARS
    """Variables (patterns) that workers of other hosts get from this environment."""
    extra_env_vars: Sequence[str] = ()
    """Additional ones."""
    env_file: str | Path | None = None
    """A bash script that each host sources before its workers start; they get its exported variables."""
    keep_agents: bool = True
    """Leave an idle agent with torch imported on each host, for the next launch of this process."""
    trace: bool = False
    """Trace the job: live view, verdict, report."""
    python: str | None = None
    """The interpreter on the hosts; by default the path of this one."""
    cpu_affinity: bool = True
    """Give each worker of a host its own share of the CPU cores."""

    def check(self) -> None:
        """Check the values that need no host to be checked.

        Raises:
            UsageError: one of them is not allowed.
        """
        if self.backend not in _BACKENDS:
            names = ", ".join(map(repr, _BACKENDS))
            raise UsageError(f"backend must be one of {names}, got {self.backend!r}")

        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float) or not self.timeout > 0:
            raise UsageError(f"timeout must be a number of seconds greater than 0, got {self.timeout!r}")

        for name in ("default_env_vars", "extra_env_vars"):
            patterns = getattr(self, name)
            is_list = isinstance(patterns, Iterable) and not isinstance(patterns, str)
            if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
                raise UsageError(f"{name}={patterns!r}: give a list of names or patterns, such as ['WANDB_*']")


def matching(environ: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """Return the variables whose names match one of the case-sensitive patterns."""
    return {name: value for name, value in environ.items() if any(fnmatchcase(name, each) for each in patterns)}


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function with its arguments, and the handlers of the workers' output."""

    func: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    log_handlers: Any = "auto"


def read_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> FunctionCall:
    """Return the call that `run(func, *args, **kwargs)` means.

    Args:
        args: `func_args, func_kwargs, log_handlers`, or the function's own arguments.
        kwargs: the same by name; `log_handlers` is ours in both forms.

    Raises:
        UsageError: the function cannot be called, or its arguments have a wrong type.
    """
    if not callable(func):
        raise UsageError(f"func={func!r}: it is not callable")

    if inspect.iscoroutinefunction(func):
        raise UsageError(
            f"func={func!r} is a coroutine function: a call of it returns a coroutine, which no process can send back. "
            "Launch a function that runs it by asyncio.run"
        )

    if not _is_own_form(args, kwargs):
        own = {name: value for name, value in kwargs.items() if name != "log_handlers"}
        return FunctionCall(func, args, own, kwargs.get("log_handlers", "auto"))

    given = {**dict(zip(_OWN, args, strict=False)), **kwargs}
    func_args, func_kwargs = given.get("func_args"), given.get("func_kwargs")
    if not isinstance(func_args, tuple | list | None):
        raise UsageError(f"func_args is a {type(func_args).__name__}: give a tuple, for one argument (x,)")

    if not isinstance(func_kwargs, Mapping | None):
        raise UsageError(f"func_kwargs is a {type(func_kwargs).__name__}: give a dict of arguments by name")

    return FunctionCall(func, func_args or (), func_kwargs or {}, given.get("log_handlers", "auto"))


def _is_own_form(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the arguments are `func_args`, `func_kwargs` and `log_handlers`, not the function's own."""
    positions = _OWN[: len(args)]
    if len(args) > len(_OWN) or set(kwargs) - set(_OWN) or set(kwargs) & set(positions):
        return False

    types = (tuple | list | None, Mapping | None, object)
    return all(isinstance(value, kind) for value, kind in zip(args, types, strict=False))
