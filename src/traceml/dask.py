"""Public names for Dask; they need dask.distributed, `pip install 'traceml[dask]'`."""

from __future__ import annotations

from traceml.tasks.dask_plugin import TraceMLDaskWorkerPlugin, get_worker_runtime

__all__ = ["TraceMLDaskWorkerPlugin", "get_worker_runtime"]
