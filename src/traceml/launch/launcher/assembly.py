"""Assembly of a launch: hosts, call, logs, agents, and the run that it is traced as."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import site
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml import settings
from traceml.errors import AgentFailedError, UsageError
from traceml.inspection.loaded_modules import imports_main_again
from traceml.launch.launcher.hosts.agent_connection import AgentConnection
from traceml.launch.launcher.hosts.agent_pool import AGENT_POOL
from traceml.launch.launcher.hosts.hosts import HostSpec, resolve_hosts
from traceml.launch.launcher.job.job import JobSpec, LaunchJob
from traceml.launch.launcher.job.job_host import JobHost
from traceml.launch.launcher.launch_options import FunctionCall, LaunchOptions, LaunchResult, matching
from traceml.launch.launcher.logs.debug_log import debug_log
from traceml.launch.launcher.logs.log_handlers import new_log_folder
from traceml.launch.launcher.logs.log_router import LogRouter, check_handlers, make_handlers
from traceml.launch.shared import payload
from traceml.launch.shared.descriptor_limit import room_for
from traceml.launch.shared.payload import SerializedValue
from traceml.recorder.current_recorder import is_enabled
from traceml.trusted_files import fill_standard_descriptors

if TYPE_CHECKING:
    from traceml.launch.launcher.job.tracing import Tracing

__all__ = ["run_function", "run_script", "users_path"]

_HOST_FILES, _OTHER_FILES = 4, 200  # open files of the launcher: for each host, with some to spare, and for all else
_LONGEST_S = 1e9  # of a timeout: torch and faulthandler take no longer one, nor an infinite one


def run_function(options: LaunchOptions, call: FunctionCall) -> LaunchResult[Any]:
    """Run a function on every worker; see `traceml.launch`."""
    fill_standard_descriptors()
    _refuse_in_spawned()
    _pickle_main_by_value()
    log_handlers = check_handlers(call.log_handlers)
    specs = _host_specs(options)
    dumped = payload.dump_call(call.func, call.args, call.kwargs)  # before any agent is started
    if not options.trace or not settings.load().enabled:
        if is_enabled():
            from traceml.recorder.lifecycle import note_launch

            note_launch()

        return _run(options, specs, log_handlers, call=dumped)

    from traceml.launch.launcher.job.tracing import Tracing

    tracing = Tracing(getattr(call.func, "__name__", "launch").strip("<>"), program="traceml.launch")
    return _run(options, specs, log_handlers, call=dumped, tracing=tracing)


def run_script(options: LaunchOptions, script: Mapping[str, Any], *, tracing: Tracing | None = None) -> None:
    """Run a script (`path` or `module`, and `argv`) on every worker, as `traceml launch` does.

    Raises:
        The errors of `traceml.launch`; a script that ends with a status other than 0 is a WorkerFailedError.
    """
    _run(options, _host_specs(options), "auto", script=script, tracing=tracing)


def _host_specs(options: LaunchOptions) -> list[HostSpec]:
    return resolve_hosts(options.hostnames, options.workers_per_host, options.ssh_config_file, os.environ)


def _run(
    options: LaunchOptions,
    host_specs: Sequence[HostSpec],
    log_handlers: Any,
    *,
    call: SerializedValue | None = None,
    script: Mapping[str, Any] | None = None,
    tracing: Tracing | None = None,
) -> LaunchResult[Any]:
    spec = _job_spec(options, call, script)
    log_folder = functools.cache(lambda: new_log_folder(os.environ))  # reads the settings, once agents are started

    def make_logs(hosts: Mapping[str, int]) -> LogRouter:
        out, err = (None, None) if tracing is None else (tracing.output, tracing.errors)
        return LogRouter(make_handlers(log_handlers, hosts, log_folder, plain=script is not None, out=out, err=err))

    room = room_for(len(host_specs) * _HOST_FILES + _OTHER_FILES)
    with room, tracing or contextlib.nullcontext(), debug_log(log_folder):
        values = LaunchJob(_connect(options, host_specs), spec, make_logs=make_logs, tracing=tracing).run()

    return LaunchResult({host.name: results for host, results in zip(host_specs, values, strict=True)})


def _job_spec(options: LaunchOptions, call: SerializedValue | None, script: Mapping[str, Any] | None) -> JobSpec:
    return JobSpec(
        call=call,
        script=script,
        backend=options.backend,
        timeout_s=min(options.timeout, _LONGEST_S),
        environ=matching(os.environ, (*options.default_env_vars, *options.extra_env_vars)),
        env_file=None if options.env_file is None else str(Path(options.env_file).expanduser().absolute()),
        cwd=_working_directory(),
        sys_path=list(users_path(skip_first=script is not None)),
        main=_described_main(),
        cpu_affinity=options.cpu_affinity,
        keep_agents=options.keep_agents,
    )


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        text = "the working directory was deleted; workers work where the launcher does: change to another (os.chdir)"
        raise UsageError(text) from None


def users_path(*, skip_first: bool = False) -> Iterator[str]:
    """Yield the module search path without the interpreter's own folders: a host's interpreter has its own.

    Args:
        skip_first: leave out the first folder, which is that of the command that launches.
    """
    library = Path(os.__file__).parent
    archive = library.parent / f"{library.name.replace('.', '')}.zip"
    own = {*site.getsitepackages(), site.getusersitepackages(), str(archive)}
    for folder in sys.path[1:] if skip_first and not sys.flags.safe_path else sys.path:
        path = Path(folder).absolute()
        if str(path) not in own and not path.is_relative_to(library):
            yield str(path)


def _connect(options: LaunchOptions, host_specs: Sequence[HostSpec]) -> list[JobHost]:
    """Start an agent on each host, or take one that was kept; all at once."""
    hosts: list[JobHost] = []
    try:
        for spec in host_specs:
            hosts.append(_connect_host(options, spec))  # noqa: PERF401 - those before a failing one must be ended
    except BaseException as error:
        for host in hosts:
            host.connection.close()

        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno == errno.EMFILE:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            why = f"the limit of {limit:,} open files is reached: {len(host_specs):,} hosts need some three each"
            advice = "Start the job after `ulimit -n 65536`."
            raise AgentFailedError(host_specs[len(hosts)].name, why, advice=advice) from error

        raise

    return hosts


def _connect_host(options: LaunchOptions, spec: HostSpec) -> JobHost:
    python, config = options.python or sys.executable, options.ssh_config_file
    job_id = os.environ.get("SLURM_JOB_ID") if spec.transport == "srun" else None
    key = (spec.name, spec.transport, python, None if config is None else str(Path(config).absolute()), job_id)

    def start() -> AgentConnection:
        sent = matching(os.environ, (*options.default_env_vars, *options.extra_env_vars))
        return AgentConnection(spec, python, config, library_path=sent.get("LD_LIBRARY_PATH", ""))

    kept = AGENT_POOL.pop(key)
    if kept is not None:
        kept.spec = spec

    return JobHost(spec, key, start, kept or start(), warm=kept is not None)


def _described_main() -> dict[str, str | None]:
    """Return what workers need to stand in for our `__main__`: `name`, where it was run by `-m`, and `path`."""
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return {
        "name": None if spec is None else spec.name,
        "path": str(Path(path).absolute()) if isinstance(path, str) else None,
    }


def _pickle_main_by_value() -> None:
    """Make the script's functions travel by value also from a multiprocessing child, where it is `__mp_main__`."""
    main = sys.modules.get("__mp_main__")
    if main is not None and main.__name__ == "__mp_main__":
        import cloudpickle

        cloudpickle.register_pickle_by_value(main)


def _refuse_in_spawned() -> None:
    """Refuse a launch while a process that multiprocessing has spawned imports the script.

    Raises:
        UsageError: it does; each such process would launch all over again.
    """
    if imports_main_again():
        raise UsageError(
            "launch was called while a process that multiprocessing has spawned imports this script. "
            "Put the call under `if __name__ == '__main__':`"
        )
