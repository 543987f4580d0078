"""The zygote: the process that imports torch once and forks the workers of its host.

It computes nothing, has one thread and uses no GPU, so that forked workers can do all of that. If it or the agent dies,
the other one ends the processes of the job. `ps` shows it, and the workers, as `traceml-workers`.

Process: zygote, until it forks; each child continues in `worker_main`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import traceback
import weakref
from importlib.util import find_spec
from typing import Any, NoReturn

from traceml.blas_threads import one_blas_thread
from traceml.inspection.stack_signal import STACK_SIGNAL
from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import (
    ChildEnded,
    FailedToFork,
    Fork,
    Forked,
    ZygoteFailed,
    ZygoteReady,
    ZygoteSettings,
    ZygoteUp,
)
from traceml.launch.shared.process_cleanup import (
    become_subreaper,
    ended_children,
    find_leftovers,
    terminate_all,
)
from traceml.process_ends import die_with_parent, in_slurm_job

__all__ = ["main"]

# A worker's first imports: made here once, with shared memory.
_WARM = ("traceml.launch.worker.worker_main", "traceml.launch.shared.payload", "cloudpickle", "logging.handlers")
_WARM_TORCH = ("torch", "torch.distributed", "torch.nn.parallel", "torch.utils.data")


def main(fd: int) -> NoReturn:
    """Serve the agent at the other end of `fd`; in each forked child, become a worker."""
    agent = FdSocket.from_fd(fd)
    os.set_inheritable(fd, False)
    request = None
    try:
        received = agent.receive(ZygoteSettings)
        assert received is not None
        settings, _ = received
        die_with_parent(settings.parent)
        with contextlib.suppress(PermissionError):  # already its leader
            os.setsid()

        _prepare(agent, settings)
        die_with_parent(settings.parent, 0)  # from here on the closed socket shows the agent's end, and we clean up
        if os.getppid() == settings.parent:
            request = _serve(agent, settings.mark)
    except EOFError:
        pass

    if request is None:
        sys.stdout.flush()
        os._exit(0)

    from traceml.launch.worker import worker_main  # imported before the fork, by _prepare

    worker_main.main(*request)


def _prepare(agent: FdSocket, settings: ZygoteSettings) -> None:
    """Import the modules that workers share; report the result to the agent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(STACK_SIGNAL, signal.SIG_IGN)  # a worker without a handler must not die of it
    if in_slurm_job():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the workers, as for the agent

    agent.send(ZygoteUp())
    own_path = list(sys.path)
    sys.path[:0] = [folder for folder in settings.sys_path if folder not in own_path]
    gpus = None
    try:
        for name in _WARM:
            importlib.import_module(name)

        if settings.need_torch > 1 or (settings.need_torch and find_spec("torch") is not None):
            gpus = _import_torch()
    except BaseException as error:  # noqa: BLE001 - any failure is reported
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        text = f"{sys.executable}: {error}" if missing else traceback.format_exc()
        agent.send(ZygoteFailed(kind="no_torch" if missing else "import", text=text))
        os._exit(0)

    sys.path[:] = own_path  # each worker gets the path of its own launch
    become_subreaper()
    _drop_finalizers()
    gc.collect()
    gc.freeze()  # else a collection in a worker would write to, and so copy, each page
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    agent.send(ZygoteReady(gpus=gpus, cuda_visible_devices=visible))


def _import_torch() -> str:
    """Import torch without starting a thread; return which GPUs it was built for."""
    with one_blas_thread():
        for module in _WARM_TORCH:
            importlib.import_module(module)

    built_for = sys.modules["torch"].version
    return next((name for name in ("cuda", "hip") if getattr(built_for, name, None)), "")


def _drop_finalizers() -> None:
    """Keep finalizers of torch's objects from running at each worker's exit, where they take 30 ms or more."""
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def _serve(agent: FdSocket, mark: str) -> tuple[Fork, list[int]] | None:
    """Fork workers until the agent is gone; return the request in each worker, and None here at the end."""
    import selectors

    read_end, write_end = os.pipe()
    for each in (read_end, write_end):
        os.set_blocking(each, False)

    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(agent.fileno(), selectors.EVENT_READ)
        selector.register(read_end, selectors.EVENT_READ)
        while True:
            selector.select()
            with contextlib.suppress(BlockingIOError):
                os.read(read_end, 4096)

            try:
                for pid, status in ended_children():
                    agent.send(ChildEnded(pid=pid, status=status))

                while (request := agent.receive(Fork, wait=False)) is not None:
                    if _fork(agent, *request):
                        return _close_in_worker(selector, agent, (read_end, write_end), request)
            except (EOFError, OSError):
                terminate_all(lambda: find_leftovers([os.getpid()], mark=mark), grace_s=0)  # the agent is gone
                return None


def _fork(agent: FdSocket, request: Fork, fds: list[int]) -> bool:
    """Fork one worker; return True in it."""
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        agent.send(FailedToFork(rank=request.rank, text=f"fork: {error.strerror}"))
        pid = -1

    if pid == 0:
        os.setsid()
        die_with_parent(parent)
        return True

    for fd in fds:
        os.close(fd)

    if pid > 0:
        agent.send(Forked(rank=request.rank, pid=pid))

    return False


def _close_in_worker(
    selector: Any, agent: FdSocket, fds: tuple[int, int], request: tuple[Fork, list[int]]
) -> tuple[Fork, list[int]]:
    """Close the zygote's descriptors in a worker."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)

    selector.close()
    agent.close()
    for fd in fds:
        os.close(fd)

    return request


if __name__ == "__main__":
    main(int(sys.argv[1]))
