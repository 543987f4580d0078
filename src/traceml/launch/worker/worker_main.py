"""The process of one worker, from the fork by the zygote to its end."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import io
import os
import random  # noqa: TID251 - to seed it
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from traceml.blas_threads import set_blas_threads
from traceml.inspection import stack_signal
from traceml.inspection.gloo_threads import await_gloo_threads
from traceml.launch.shared import log_records, payload
from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import (
    Fork,
    M,
    Message,
    WorkerDone,
    WorkerMayEnd,
    WorkerPayload,
    WorkerRaised,
    WorkerReady,
)
from traceml.launch.shared.payload_buffer import map_private
from traceml.launch.worker import main_module
from traceml.launch.worker.finalization import end_process, exit_status, flush_stream
from traceml.launch.worker.stack_thread import end_later, serve_stacks

__all__ = ["main"]

_LEAVE_TIMEOUT_S = 5.0
_MAX_NOTES = 16
_MAX_TEXT_CHARACTERS = 512 * 1024  # of an exception's text, which is sent in one message
# Variables of a task of Slurm: the agent is the only one of its step. Libraries that ask Slurm first, and then for RANK
# (Lightning, timm), would take each worker for rank 0 of 1.
_SLURM_TASK = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NODEID",
)  # fmt: skip
_NO_RESULT = (
    "traceml: the function has closed the connection to its launcher, as os.closerange does: what it returns or raises "
    "cannot be sent. Close only descriptors that it has opened itself, or call os.closerange in a process it starts."
)


class _Stopped(BaseException):
    """The agent has closed the connection or stopped the worker."""


class _Disconnected(BaseException):
    """The function or script has closed the connection to the agent, as `os.closerange` does, or is a forked child.

    Attributes:
        raised: whether an exception could not be sent.
    """

    raised = False


def main(request: Fork, fds: list[int]) -> NoReturn:
    """Run the function or script of one rank, report the result, and end when the agent releases the worker.

    Args:
        fds: its descriptors: agent's socket, stdout, stderr, log records, socket and file for stacks, and on rank 0 the
            listener.
    """
    socket_fd, out, err, records_fd, stacks, stacks_file, *listener = fds
    agent = FdSocket.from_fd(socket_fd)
    # A child that returns from the function, as one of os.fork() may, is no rank, and nobody would release it.
    os.register_at_fork(after_in_child=agent.close)
    status, inherited, own_pid = 1, dict(sys.modules), os.getpid()
    try:
        _set_up_process(request, out, err, stacks_file)
        serve_stacks(stacks)
        if request.script:  # as under `python`: the script configures logging itself
            os.close(records_fd)
        else:
            os.set_inheritable(records_fd, False)
            log_records.install(records_fd, request.log_level)

        if request.is_traced and not request.script:
            from traceml.session.startup import start_for_script

            start_for_script()  # before the process group, whose creation is traced

        status = _work(agent, request, listener[0] if listener else None)
    except _Stopped:
        status = 1
    except _Disconnected as lost:
        status = int(lost.raised) if os.getpid() != own_pid else _end_disconnected(request)
    except BaseException:  # noqa: BLE001 - our own error: make it visible
        traceback.print_exc()

    if status:  # nobody else limits the end of a worker that failed
        end_later(request.timeout_s)

    end_process(status, inherited)


def _work(agent: FdSocket, request: Fork, listener: int | None) -> int:
    """Join the group, run, report, and wait to be released; return the exit status."""
    store = None
    try:
        if request.backend is not None:
            store = _join(request, listener)
        elif listener is not None:
            os.close(listener)

        _send(agent, WorkerReady())
        result = _run_script(request.script) if request.script else _run_function(agent, request)
    except SystemExit as leaving:
        status = exit_status(leaving)
        _note_end(request, leaving, status)
        if status:
            return status

        result = None
    except _Stopped:
        raise
    except BaseException as error:  # noqa: BLE001 - the user's error is sent
        if request.script and isinstance(error, KeyboardInterrupt):  # it is shown already
            return -signal.SIGINT

        _note_end(request, error, 1)
        _report_error(agent, error)
        _await_release(agent)
        return 1

    _note_return(request)
    if not _report_result(agent, result):
        return 1

    if _await_release(agent) and store is not None:
        _leave_group(store, request)

    return 0


def _end_disconnected(request: Fork) -> int:
    """Return the exit status of a worker that cannot report; that of a script is its report."""
    if request.script:
        return 0

    print(_NO_RESULT, file=sys.stderr)  # noqa: T201 - the launcher shows it with the failure
    return 1


def _note_end(request: Fork, error: BaseException | None, status: int) -> None:
    """Report the end of the user's function to the recorder; a script has done so itself."""
    if request.is_traced and not request.script:
        from traceml.recorder.lifecycle import note_exit

        note_exit(error, status)


def _note_return(request: Fork) -> None:
    """Tell the recorder that the function or script has ended well: the process waits for the other ranks."""
    if request.is_traced:
        from traceml.recorder.lifecycle import note_return

        note_return(is_script=bool(request.script))


# --- set-up of the process -------------------------------------------------------------------------------------------


def _set_up_process(request: Fork, out: int, err: int, stacks_file: int) -> None:
    """Set up streams, signals, variables, cores and random numbers, as in a new process."""
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)

    streams = {"stdin": open(0, encoding="utf-8", closefd=False)}  # noqa: SIM115
    streams |= {"stdout": _stream(1, "surrogateescape"), "stderr": _stream(2, "backslashreplace")}
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)

    _line_buffer_c()
    os.set_inheritable(stacks_file, False)
    # From Python 3.14 on the C stack would follow, and the shown last lines of a worker be that alone.
    faulthandler.enable(2, **({"c_stack": False} if sys.version_info >= (3, 14) else {}))
    stack_signal.register(stacks_file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in request.unset:
        os.environ.pop(name, None)

    os.environ.update(request.env)
    _drop_slurm_task()
    if request.interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", request.interface)

    os.chdir(request.cwd)
    if "PWD" in os.environ:
        os.environ["PWD"] = request.cwd

    sys.path[:0] = [folder for folder in request.sys_path if folder not in sys.path]
    _set_cores(request)
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()  # a fork inherits the parent's state; torch has a fixed seed in a new process too

    threading.current_thread().name = "MainThread"
    sys.argv = [""]


def _drop_slurm_task() -> None:
    for name in _SLURM_TASK:
        os.environ.pop(name, None)

    if "SLURM_JOB_NUM_NODES" in os.environ:  # in a step, the other one is 1
        os.environ["SLURM_NNODES"] = os.environ["SLURM_JOB_NUM_NODES"]


def _stream(fd: int, errors: str) -> io.TextIOWrapper:
    raw = open(fd, "wb", closefd=False)  # noqa: SIM115 - lives as long as the process
    return io.TextIOWrapper(raw, encoding="utf-8", errors=errors, line_buffering=True)


def _line_buffer_c() -> None:
    """Make `printf` in C code flush each line, as on a terminal."""
    import ctypes

    with contextlib.suppress(OSError, ValueError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 1, 0)


def _set_cores(request: Fork) -> None:
    """Restrict the process to its share of the cores, with as many threads."""
    if request.cores:
        os.sched_setaffinity(0, request.cores)

    threads, wanted = request.threads, os.environ.get("OMP_NUM_THREADS", "")
    set_blas_threads(int(wanted) if wanted.isdigit() else threads or len(os.sched_getaffinity(0)))
    if threads is None or wanted:
        return

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


# --- the process group -----------------------------------------------------------------------------------------------


def _join(request: Fork, listener: int | None) -> Any:
    """Create the default process group on a store whose port rank 0's agent has bound; return the store."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    env = request.env
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    timeout = timedelta(seconds=request.timeout_s)
    store = dist.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        world,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,  # a group that the function makes after this one meets at the same port
        master_listen_fd=listener,
        use_libuv=_takes_listener_with_libuv(torch.__version__),
    )
    dist.init_process_group(
        backend=request.backend, store=dist.PrefixStore("0", store), rank=rank, world_size=world, timeout=timeout
    )
    return store


def _takes_listener_with_libuv(version: str) -> bool:
    """Return whether the usual store of a torch, that with libuv, can take a port which is bound already.

    Args:
        version: of torch. Up to 2.7 the store refuses that, and only its older form can be used
            (https://github.com/pytorch/pytorch/pull/150215).
    """
    return tuple(int(part) for part in version.split(".")[:2]) >= (2, 8)


def _leave_group(store: Any, request: Fork) -> None:
    """Leave the group; rank 0, which holds the store, leaves last."""
    from datetime import timedelta

    import torch.distributed as dist

    env = request.env
    rank, others = int(env["RANK"]), int(env["WORLD_SIZE"]) - 1
    with contextlib.suppress(Exception):  # the job is done; errors of the clean-up do not matter
        if dist.is_initialized():
            await_gloo_threads()
            dist.destroy_process_group()

        if rank and store.add("left", 1) == others:
            store.set("all left", "1")
        elif not rank and others:
            store.wait(["all left"], timedelta(seconds=_LEAVE_TIMEOUT_S))


# --- function or script ----------------------------------------------------------------------------------------------


def _run_function(agent: FdSocket, request: Fork) -> Any:
    """Wait for the payload, and call its function."""
    _, fds = _receive(agent, WorkerPayload)
    memory = map_private(fds[0])
    os.close(fds[0])
    register = partial(main_module.register, main_module.install(request.main))
    func, args, kwargs = payload.load(memory, what="the function and its arguments", on_made=register)
    del memory
    return func(*args, **kwargs)


def _run_script(script: Mapping[str, Any]) -> Any:
    """Run a script or module as `python` would; it ends by SystemExit."""
    argv = list(script["argv"])
    words = ["-m", script["module"], *argv] if script.get("module") else [script["path"], *argv]
    from traceml.session.script import main as run

    run(words)


# --- messages to the agent -------------------------------------------------------------------------------------------


def _receive(agent: FdSocket, kind: type[M]) -> tuple[M, list[int]]:
    """Wait for this message; return it with its descriptors."""
    try:
        received = agent.receive(WorkerPayload, WorkerMayEnd)
    except EOFError:
        raise _Stopped from None
    except OSError as error:
        raise _connection_lost(error) from None

    assert received is not None
    message, fds = received
    if not isinstance(message, kind):
        raise _Stopped

    return message, fds


def _send(agent: FdSocket, message: Message, fds: Sequence[int] = ()) -> None:
    try:
        agent.send(message, fds)
    except OSError as error:
        raise _connection_lost(error) from None


def _connection_lost(error: OSError) -> BaseException:
    if error.errno == errno.EBADF:
        return _Disconnected()

    return _Stopped() if isinstance(error, ConnectionError) else error


def _await_release(agent: FdSocket) -> bool:
    """Wait until all ranks have reported, as a peer may still be connecting to us; return whether all have returned."""
    for name in ("stdout", "stderr"):
        with contextlib.suppress(Exception):  # of the user's own stream; shown at the end of the process
            flush_stream(name)

    return not _receive(agent, WorkerMayEnd)[0].failed


def _report_result(agent: FdSocket, result: Any) -> bool:
    """Send the function's result; report one that cannot be pickled as an error."""
    try:
        memory = _in_memory(payload.dump(result, what="the result").chunks())
    except BaseException as error:  # noqa: BLE001 - pickling runs the user's code
        _report_error(agent, error, trace=False)  # the traceback would show our pickling only
        _await_release(agent)
        return False

    _send(agent, WorkerDone(), [memory])
    os.close(memory)
    return True


def _report_error(agent: FdSocket, error: BaseException, *, trace: bool = True) -> None:
    """Send an exception: its text, and the object if it can be pickled."""
    kind = type(error)
    fds = []
    with contextlib.suppress(Exception):  # then the text is used
        serialized = payload.dump_exception(error)
        if serialized is not None:
            fds.append(_in_memory(serialized.chunks()))

    try:
        message = str(error)
    except Exception as inner:  # noqa: BLE001 - the user's __str__
        message = f"<its text is unavailable: {inner!r}>"

    raised = WorkerRaised(
        type=f"{kind.__module__}.{kind.__qualname__}",
        message=_shortened(message),
        traceback=_shortened(_traceback(error)) if trace else "",
        notes=[_shortened(str(note)) for note in getattr(error, "__notes__", ())][:_MAX_NOTES],
        bases=[f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__],
    )
    try:
        _send(agent, raised, fds)
    except _Disconnected as lost:
        print(raised.traceback or raised.message, file=sys.stderr)  # noqa: T201 - the launcher shows it
        lost.raised = True
        raise

    for fd in fds:
        os.close(fd)


def _traceback(error: BaseException) -> str:
    """Return an exception as Python prints it, without the frames that called the user's function."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next

    return "".join(traceback.format_exception(type(error), error, trace or error.__traceback__))


def _shortened(text: str) -> str:
    left_out = len(text) - _MAX_TEXT_CHARACTERS
    if left_out <= 0:
        return text

    half = _MAX_TEXT_CHARACTERS // 2
    return f"{text[:half]}\n[… {left_out} characters …]\n{text[-half:]}"


def _in_memory(chunks: Any) -> int:
    """Write chunks to a new memory file; return its descriptor."""
    memory = os.memfd_create("traceml-result")
    with open(memory, "wb", closefd=False) as file:
        file.writelines(chunks)

    return memory
