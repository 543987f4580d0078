"""Public names for Dask: a Runtime for each worker of a cluster. They need the extra `dask`."""

from __future__ import annotations

from typing import Any

from traceml.installation import install_command
from traceml.tasks.runtime import Runtime, get_default_runtime, has_default_runtime, set_default_runtime

try:
    from distributed import WorkerPlugin, get_worker
except ImportError as error:
    raise ImportError(
        f"traceml.dask needs dask.distributed, which is not installed here. Install it: {install_command('dask')}"
    ) from error

__all__ = ["TraceMLDaskWorkerPlugin", "get_worker_runtime"]

_ATTRIBUTE = "traceml_runtime"


class TraceMLDaskWorkerPlugin(WorkerPlugin):  # type: ignore[misc]
    """Gives each worker its own Runtime, until the worker ends or the plugin is removed.

    Registering again replaces it, and shuts the old Runtime down. In a worker with its own process it is also
    `get_default_runtime()`.

    Examples:
        >>> client.register_plugin(TraceMLDaskWorkerPlugin(threads=8))

    Args:
        threads: workers of each Runtime for computation; 0: as many as the Dask worker has threads.
        io_threads: workers of each Runtime for I/O; 0: sized by the host.
    """

    name = "traceml-runtime"

    def __init__(self, threads: int = 0, io_threads: int = 0) -> None:
        with Runtime(threads, io_threads):  # raises for wrong sizes here, not on every worker
            self.threads, self.io_threads = threads, io_threads

    def setup(self, worker: Any) -> None:
        """Start the worker's Runtime."""
        runtime = Runtime(self.threads or worker.state.nthreads, self.io_threads)
        setattr(worker, _ATTRIBUTE, runtime)
        if worker.nanny is not None and not has_default_runtime():  # without a nanny, workers may share a process
            set_default_runtime(runtime)

    def teardown(self, worker: Any) -> None:
        """Shut the worker's Runtime down: cancel queued tasks, and do not wait for running ones."""
        runtime = getattr(worker, _ATTRIBUTE, None)
        if runtime is None:
            return

        delattr(worker, _ATTRIBUTE)
        runtime.shutdown(wait=False, cancel=True)
        if has_default_runtime() and get_default_runtime() is runtime:
            set_default_runtime(None)


def get_worker_runtime() -> Runtime:
    """Return the Runtime of the Dask worker that this task runs on.

    Examples:
        >>> def load(path):
        ...     return get_worker_runtime().submit(read, path, io=True).get()

    Raises:
        UsageError: this is not a Dask task, or the plugin is not registered.
    """
    from traceml.errors import UsageError

    try:
        worker = get_worker()
    except ValueError:
        raise UsageError("get_worker_runtime() was called outside of a Dask task; use traceml.Runtime there") from None

    runtime = getattr(worker, _ATTRIBUTE, None)
    if runtime is None:
        raise UsageError(
            f"the Dask worker {worker.address} has no Runtime: client.register_plugin(TraceMLDaskWorkerPlugin())"
        )

    assert isinstance(runtime, Runtime)
    return runtime
