"""A Runtime per Dask worker: in this process, in separate processes, and under a separate scheduler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.dask_programs import dask_programs
from tests.eventually import eventually
from tests.tasks.conftest import threads_of_ours
from traceml import UsageError
from traceml.dask import TraceMLDaskWorkerPlugin, get_worker_runtime

if TYPE_CHECKING:
    from distributed import Client

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:ResourceWarning")


def use(value: int) -> tuple[int, int, int]:
    """Run tasks in a task; return the result, the Runtime's size, and the process."""
    rt = get_worker_runtime()
    handles = [rt.submit(pow, value, 2), rt.submit(pow, value, 3, io=True)]
    rt.wait_all(raise_on_error=True)
    return sum(handle.get() for handle in handles), rt.threads, os.getpid()


def identity(_: Any) -> tuple[int, bool]:
    from traceml import get_default_runtime

    rt = get_worker_runtime()
    return id(rt), rt is get_default_runtime()


@contextmanager
def cluster(**options: Any) -> Iterator[Client]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(dashboard_address=":0", silence_logs=50, **options) as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


def test_workers_in_one_process_have_a_runtime_each() -> None:
    """Registering again replaces them and ends their threads; unregistering leaves none."""
    with cluster(n_workers=2, threads_per_worker=1, processes=False) as client:
        client.register_plugin(TraceMLDaskWorkerPlugin(threads=3))
        workers = list(client.scheduler_info()["workers"])
        seen = [client.submit(identity, i, workers=[address]).result() for i, address in enumerate(workers)]
        assert len({one for one, _ in seen}) == 2
        assert client.submit(use, 2).result()[:2] == (12, 3)

        client.register_plugin(TraceMLDaskWorkerPlugin(threads=2, io_threads=1))
        plugins = client.run(lambda dask_worker: [name for name in dask_worker.plugins if "traceml" in name])
        assert set(map(tuple, plugins.values())) == {("traceml-runtime",)}
        assert client.submit(use, 3).result()[:2] == (36, 2)

        client.unregister_worker_plugin("traceml-runtime")
        eventually(lambda: not threads_of_ours())
        with pytest.raises(UsageError, match=r"has no Runtime: client\.register_plugin"):
            client.submit(use, 4).result()


def test_a_closed_cluster_leaves_no_thread() -> None:
    with cluster(n_workers=1, threads_per_worker=2, processes=False) as client:
        client.register_plugin(TraceMLDaskWorkerPlugin())
        assert client.submit(use, 1).result()[1] == 2  # as many as the worker has threads

    eventually(lambda: not threads_of_ours())


def test_workers_in_processes_have_a_runtime_each() -> None:
    """The worker's Runtime is also the default one, and a restarted worker has a new one."""
    with cluster(n_workers=1, threads_per_worker=1, processes=True) as client:
        client.register_plugin(TraceMLDaskWorkerPlugin(threads=2))
        *found, pid = client.submit(use, 2).result()
        assert (found, pid != os.getpid()) == ([12, 2], True)
        assert client.submit(identity, 0).result()[1]

        client.restart()
        *found, fresh = client.submit(use, 5).result()
        assert (found, fresh not in (pid, os.getpid())) == ([150, 2], True)


@pytest.mark.process
def test_a_remote_scheduler_takes_the_plugin(tmp_path: Path) -> None:
    """Scheduler and worker are started from the command line."""
    from distributed import Client

    with dask_programs(tmp_path) as address, Client(address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=100)
        client.register_plugin(TraceMLDaskWorkerPlugin(threads=2))
        assert client.submit(use, 2).result(timeout=100)[:2] == (12, 2)


def test_outside_of_a_dask_task_there_is_no_worker() -> None:
    with pytest.raises(UsageError, match="outside of a Dask task"):
        get_worker_runtime()


def test_wrong_sizes_raise_on_the_client() -> None:
    with pytest.raises(UsageError, match="threads=-1"):
        TraceMLDaskWorkerPlugin(threads=-1)


@pytest.mark.process
def test_without_distributed_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['distributed'] = None; import traceml.dask"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "ImportError: traceml.dask needs dask.distributed" in done.stderr
    assert "pip install 'traceml-torch[dask]'" in done.stderr
