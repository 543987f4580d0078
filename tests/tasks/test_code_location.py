"""The line that a thread is on."""

from __future__ import annotations

import threading

from tests.tasks.conftest import until
from traceml.tasks.code_location import location_of_thread


def linger(release: threading.Event) -> None:
    release.wait()


def test_a_line_is_that_of_the_users_code() -> None:
    """Not of the standard library that it waits in."""
    release = threading.Event()
    thread = threading.Thread(target=linger, args=(release,))
    thread.start()
    until(lambda: (line := location_of_thread(thread.ident or 0)) is not None and line.function == "linger")
    release.set()
    thread.join()
    assert location_of_thread(thread.ident or 0) is None
