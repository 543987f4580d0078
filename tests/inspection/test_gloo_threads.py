"""Threads that are named as gloo's in a real process."""

from __future__ import annotations

import ctypes
import hashlib
import threading

from traceml.inspection.gloo_threads import await_gloo_threads

_SET_NAME = 15  # PR_SET_NAME


def test_a_thread_that_runs_is_awaited() -> None:
    """It computes without the GIL, so only the kernel knows."""
    is_named, done = threading.Event(), threading.Event()

    def work() -> None:
        ctypes.CDLL(None).prctl(_SET_NAME, b"pt_gloo_runloop")
        is_named.set()
        hashlib.sha256(bytes(100_000_000))
        done.set()
        end.wait()

    end = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    is_named.wait()
    await_gloo_threads(240)  # a busy machine may give it no core for long
    was_done = done.is_set()
    end.set()
    thread.join()

    assert was_done


def test_a_thread_that_never_rests_is_not_awaited_forever() -> None:
    """After the limit the group is destroyed, as it would be without us."""
    is_named, end = threading.Event(), threading.Event()

    def work() -> None:
        ctypes.CDLL(None).prctl(_SET_NAME, b"pt_gloo_runloop")
        is_named.set()
        while not end.is_set():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    is_named.wait()
    await_gloo_threads(0.05)
    still_runs = thread.is_alive()
    end.set()
    thread.join()

    assert still_runs
