"""Snapshots of threads other than the training thread that run the user's code: it may wait for one of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from traceml.database.snapshots import MAX_THREADS, FrameSnapshot, ThreadSnapshot
from traceml.inspection.thread_frames import thread_frames
from traceml.inspection.user_files import display_path
from traceml.recorder.user_code import UserCode, user_line

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["other_threads"]


def other_threads(training: int, user: UserCode) -> tuple[ThreadSnapshot, ...]:
    """Return the threads that run the user's code, those that the interpreter waits for at its end first.

    Once it waits, also those that run a library's.
    """
    frames = thread_frames()
    others = {ident: frame for ident, frame in frames.items() if ident not in (training, threading.get_ident())}
    found = sorted(_snapshots(others, user), key=lambda snapshot: (snapshot.is_daemon, snapshot.line is None))
    return tuple(found[:MAX_THREADS])


def _snapshots(frames: Mapping[int, FrameType], user: UserCode) -> Iterator[ThreadSnapshot]:
    known = {thread.ident: thread for thread in threading.enumerate()}
    has_ended = not threading.main_thread().is_alive()
    for ident, frame in frames.items():
        code, line = user_line(frame, user.contains)
        thread = known.get(ident)  # none of threads that a library has started in C, as those of torch.distributed.rpc
        if code is None:
            if has_ended and thread is not None and not thread.daemon:
                yield ThreadSnapshot(name=thread.name)

            continue

        innermost = FrameSnapshot(
            file=display_path(code.co_filename), line=line, function=code.co_qualname, is_user=True
        )
        if thread is None:
            yield ThreadSnapshot(line=innermost, is_daemon=True)
        else:
            yield ThreadSnapshot(name=thread.name, line=innermost, is_daemon=thread.daemon)
