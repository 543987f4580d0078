"""A thread of the worker that reports the Python stacks of all others, in faulthandler's format."""

from __future__ import annotations

import contextlib
import threading
from types import FrameType

from traceml.inspection.thread_frames import running_line, stack_frames, thread_frames
from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import StacksRequest, StackThread, ThreadStacks
from traceml.process_ends import start_without_signals

__all__ = ["serve_stacks"]

_MAX_FRAMES = 100


def serve_stacks(fd: int) -> None:
    """Start the thread.

    It holds the GIL while it reads the frames, so they are whole. A signal handler does not: where other threads run
    Python, it reads frames that are changing, and the process may crash.
    """
    agent = FdSocket.from_fd(fd)
    thread = threading.Thread(target=_serve, args=(agent,), name="traceml-stacks", daemon=True)
    with contextlib.suppress(OSError):
        start_without_signals(thread)
        # Not from the thread: the user's function may hold the GIL before it has run.
        agent.send(StackThread(tid=thread.native_id or 0))


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
