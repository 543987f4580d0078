"""Threads of the worker that report the Python stacks of all others, in faulthandler's format.

They hold the GIL while they read the frames, so they are whole. Signal handlers and faulthandler's own thread do not:
where other threads run Python, they read frames that are changing, and the process may crash.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from datetime import timedelta
from types import FrameType

from traceml.clock import own_time as time
from traceml.inspection.thread_frames import running_line, stack_frames, thread_frames
from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import StacksRequest, StackThread, ThreadStacks
from traceml.process_ends import start_without_signals

__all__ = ["end_later", "serve_stacks"]

_MAX_FRAMES = 100
_GIL_TIMEOUT_S = 5.0  # after it another thread holds the GIL for good, and no frame changes


def serve_stacks(fd: int) -> None:
    """Start the thread that answers requests of the agent."""
    agent = FdSocket.from_fd(fd)
    thread = threading.Thread(target=_serve, args=(agent,), name="traceml-stacks", daemon=True)
    with contextlib.suppress(OSError):
        start_without_signals(thread)
        # Not from the thread: the user's function may hold the GIL before it has run.
        agent.send(StackThread(tid=thread.native_id or 0))


def end_later(timeout_s: float) -> None:
    """Write all stacks to stderr, and end the process with status 1, unless it ends by itself within this time."""
    faulthandler.dump_traceback_later(timeout_s + _GIL_TIMEOUT_S, exit=True)
    thread = threading.Thread(target=_end, args=(timeout_s,), name="traceml-timeout", daemon=True)
    with contextlib.suppress(OSError):
        start_without_signals(thread)


def _end(timeout_s: float) -> None:
    time.sleep(timeout_s)
    text = f"Timeout ({timedelta(seconds=timeout_s)})!\n{_stacks()}".encode()
    with contextlib.suppress(OSError), os.fdopen(2, "wb", closefd=False) as stderr:
        stderr.write(text)

    os._exit(1)


def _serve(agent: FdSocket) -> None:
    with contextlib.suppress(OSError, EOFError):  # the agent is gone
        while True:
            agent.receive(StacksRequest)
            agent.send(ThreadStacks(text=_stacks()))


def _stacks() -> str:
    """Return the stacks of all threads but this one, the main thread first."""
    frames = thread_frames()
    frames.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    threads = sorted(frames, key=lambda ident: ident != main)
    return "\n".join(f"Thread 0x{ident:016x} (most recent call first):\n{_lines(frames[ident])}" for ident in threads)


def _lines(frame: FrameType | None) -> str:
    return "".join(
        f'  File "{each.f_code.co_filename}", line {running_line(each)} in {each.f_code.co_name}\n'
        for each in stack_frames(frame, _MAX_FRAMES)
    )
