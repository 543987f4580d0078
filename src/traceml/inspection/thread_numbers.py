"""The kernel's numbers of this process's threads.

After a fork, Python's object of the main thread has the number of the thread that forked: another process's.
"""

from __future__ import annotations

import os
import threading

__all__ = ["number_of", "thread_number"]


def thread_number(ident: int) -> int:
    """Return the kernel's number of a thread by Python's; 0 if it is not known."""
    return next((number_of(thread) for thread in threading.enumerate() if thread.ident == ident), 0)


def number_of(thread: threading.Thread) -> int:
    """Return the kernel's number of a thread; 0 if it is not known."""
    return os.getpid() if thread is threading.main_thread() else thread.native_id or 0
