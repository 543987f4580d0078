"""The kernel's numbers of threads, also in a forked process."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from traceml.inspection.thread_frames import thread_number

FORKED = """
import os, sys, threading
from traceml.inspection.thread_frames import thread_number

def fork():
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    os._exit(thread_number(threading.get_ident()) != threading.get_native_id())

if sys.argv[1:]:
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()

fork()
"""


def test_each_thread_has_its_number() -> None:
    """One that is not known has none."""
    known: list[tuple[int, int]] = []
    thread = threading.Thread(
        target=lambda: known.append((thread_number(threading.get_ident()), threading.get_native_id()))
    )
    thread.start()
    thread.join()

    assert known[0][0] == known[0][1]
    assert thread_number(threading.get_ident()) == threading.get_native_id()
    assert thread_number(-1) == 0


@pytest.mark.process
def test_a_forked_process_has_a_thread_of_its_own() -> None:
    """Python keeps the number of the thread that forked, whether or not it was the main one."""
    for arguments in ([], ["thread"]):
        assert subprocess.run([sys.executable, "-c", FORKED, *arguments], check=False).returncode == 0
