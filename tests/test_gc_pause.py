"""The collector is off during a pause, and afterwards as it was before."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from traceml.gc_pause import GcPause


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Leave the collector on."""
    gc.enable()
    yield
    gc.enable()


def test_nothing_is_collected_in_a_pause() -> None:
    """The collector is on again afterwards, also after a failure."""
    with suppress(ValueError), GcPause():
        assert not gc.isenabled()
        raise ValueError

    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    """A program that runs without it is not surprised by it."""
    gc.disable()
    with GcPause():
        pass

    assert not gc.isenabled()


def test_the_last_pause_ends_it() -> None:
    """Threads in a pause do not wait for each other, whatever the order in which they leave."""
    pause, inside, leave = GcPause(), threading.Event(), threading.Event()

    def work() -> None:
        with pause:
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    with pause:
        thread.start()
        assert inside.wait(60)

    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_forked_child_has_no_pause() -> None:
    """Those of its parent's threads never end there, and one that began before the fork ends nothing."""
    pause = GcPause()
    with pause:
        pause.forget()
        assert gc.isenabled()

    with pause:
        assert not gc.isenabled()

    assert gc.isenabled()
