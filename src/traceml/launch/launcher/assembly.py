"""A launch put together: hosts, payload, logs, agents, and the run that it may be traced as."""

from __future__ import annotations

import contextlib
import os
import site
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml import settings
from traceml.errors import UsageError
from traceml.launch.launcher import main_script
from traceml.launch.launcher.agent_connection import AgentConnection
from traceml.launch.launcher.agent_pool import AGENT_POOL
from traceml.launch.launcher.hosts import HostSpec, resolve_hosts
from traceml.launch.launcher.job import LaunchJob
from traceml.launch.launcher.job_host import JobHost
from traceml.launch.launcher.job_spec import JobSpec
from traceml.launch.launcher.launch_options import LaunchOptions, LaunchResult, matching
from traceml.launch.launcher.log_router import LogRouter, check_handlers, make_handlers
from traceml.launch.wire import payload
from traceml.launch.wire.payload import SerializedValue

if TYPE_CHECKING:
    from traceml.launch.launcher.tracing import Tracing

__all__ = ["run_function", "run_script"]


def run_function(
    options: LaunchOptions,
    func: Callable[..., Any],
    func_args: Sequence[Any],
    func_kwargs: Mapping[str, Any],
    log_handlers: Any,
) -> LaunchResult:
    """Run a function on every worker; see `traceml.launch`."""
    main_script.refuse_in_spawned()
    main_script.pickle_by_value()
    log_handlers = check_handlers(log_handlers)
    specs = _specs(options)
    call = payload.dump_call(func, func_args, func_kwargs)  # before any agent is started
    if not options.trace or not settings.load().enabled:
        return _run(options, specs, log_handlers, call=call)

    from traceml.launch.launcher.tracing import Tracing

    tracing = Tracing(getattr(func, "__name__", "launch").strip("<>"), program="traceml.launch")
    return _run(options, specs, log_handlers, call=call, tracing=tracing)


def run_script(
    options: LaunchOptions, script: Mapping[str, Any], log_handlers: Any = "auto", *, tracing: Tracing | None = None
) -> None:
    """Run a script (`path` or `module`, and `argv`) on every worker, as `traceml launch` does.

    Raises:
        The errors of `traceml.launch`; a script that ends with a status other than 0 is a WorkerFailedError.
    """
    _run(options, _specs(options), log_handlers, script=script, tracing=tracing)


def _specs(options: LaunchOptions) -> list[HostSpec]:
    return resolve_hosts(options.hostnames, options.workers_per_host, options.ssh_config_file, os.environ)


def _run(
    options: LaunchOptions,
    specs: Sequence[HostSpec],
    log_handlers: Any,
    *,
    call: SerializedValue | None = None,
    script: Mapping[str, Any] | None = None,
    tracing: Tracing | None = None,
) -> LaunchResult:
    spec = JobSpec(
        call=call,
        script=script,
        backend=options.backend,
        timeout_s=options.timeout,
        environ=matching(os.environ, (*options.default_env_vars, *options.extra_env_vars)),
        env_file=None if options.env_file is None else str(Path(options.env_file).expanduser().absolute()),
        cwd=_working_directory(),
        sys_path=list(_users_path(behind_us=script is not None)),
        main=main_script.describe(),
        cpu_affinity=options.cpu_affinity,
        keep_agents=options.keep_agents,
    )

    def make_logs(hosts: Mapping[str, int]) -> LogRouter:
        out, err = (None, None) if tracing is None else (tracing.output, tracing.errors)
        return LogRouter(make_handlers(log_handlers, hosts, plain=script is not None, out=out, err=err))

    with tracing or contextlib.nullcontext():
        if tracing is not None:
            tracing.start()

        values = LaunchJob(_connect(options, specs), spec, make_logs=make_logs, tracing=tracing).run()

    return LaunchResult({spec.name: host for spec, host in zip(specs, values, strict=True)})


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        text = "the working directory was deleted; workers work where the launcher does: change to another (os.chdir)"
        raise UsageError(text) from None


def _users_path(*, behind_us: bool) -> Iterator[str]:
    """Yield where modules are looked for, but for the interpreter's own folders: a host's interpreter has its own.

    Args:
        behind_us: leave out the first folder, which is that of the command that launches.
    """
    library = Path(os.__file__).parent
    archive = library.parent / f"{library.name.replace('.', '')}.zip"
    own = {*site.getsitepackages(), site.getusersitepackages(), str(archive)}
    for folder in sys.path[1:] if behind_us and not sys.flags.safe_path else sys.path:
        path = Path(folder).absolute()
        if str(path) not in own and not path.is_relative_to(library):
            yield str(path)


def _connect(options: LaunchOptions, specs: Sequence[HostSpec]) -> list[JobHost]:
    """Start an agent on each host, or take one that was kept; all at once."""
    hosts: list[JobHost] = []
    try:
        for spec in specs:
            hosts.append(_host(options, spec))  # noqa: PERF401 - those before a failing one must be ended
    except BaseException:
        for host in hosts:
            host.connection.close()

        raise

    return hosts


def _host(options: LaunchOptions, spec: HostSpec) -> JobHost:
    python, config = options.python or sys.executable, options.ssh_config_file
    job_id = os.environ.get("SLURM_JOB_ID") if spec.transport == "srun" else None
    key = (spec.name, spec.transport, python, None if config is None else str(Path(config).absolute()), job_id)

    def start() -> AgentConnection:
        return AgentConnection(spec, python, config)

    kept = AGENT_POOL.take(key)
    if kept is not None:
        kept.spec = spec
    return JobHost(spec, key, start, kept or start(), warm=kept is not None)
