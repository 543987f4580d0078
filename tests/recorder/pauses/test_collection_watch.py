"""Collections as the interpreter's callbacks tell them."""

from __future__ import annotations

import ctypes
import functools
import gc
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from traceml.database.schema import LINE_OTHER, OPEN_SLOTS, Phase, Slot
from traceml.fail_open import failures
from traceml.instrument.native.extension import extension
from traceml.recorder.pauses import collection_watch
from traceml.recorder.pauses.collection_watch import CollectionWatch
from traceml.recorder.user_code import UserCode


@pytest.fixture(autouse=True)
def _no_others() -> Iterator[None]:
    """No collections but those that a test asks for: while another thread collects, `gc.collect` does nothing."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def slots() -> list[int]:
    values = [0] * OPEN_SLOTS
    values[Slot.STEP_START], values[Slot.STEP] = 1, 7
    return values


@pytest.fixture
def watch(slots, monkeypatch) -> Iterator[CollectionWatch]:
    monkeypatch.setattr(collection_watch, "LONG_NS", 0)
    found = CollectionWatch(slots, lambda: False, UserCode().contains)
    found.start()
    yield found
    found.stop()


def full(watch: CollectionWatch):
    return [each for each in watch.drain_long() if each.generation == 2]


def test_a_call_is_reported_with_its_line(watch):
    """The line of this file that calls `gc.collect`, the open step and its phase."""
    gc.collect()
    (found,) = full(watch)

    assert (found.step, found.phase, found.together) == (7, LINE_OTHER, 1)
    assert found.code is test_a_call_is_reported_with_its_line.__code__
    assert found.library is None
    assert found.ns > 0


def library_code(path: str) -> dict[str, object]:
    namespace: dict[str, object] = {"__name__": "library"}
    exec(compile("import gc\n\ndef tidy():\n    gc.collect()\n", path, "exec"), namespace)
    return namespace


def test_a_call_of_a_library_is_reported_with_both_lines(watch):
    """The user's line that led to it, and the library's that calls `gc.collect`."""
    tidy = library_code("/x/site-packages/lib/loop.py")["tidy"]
    tidy()
    (found,) = full(watch)

    assert found.code is test_a_call_of_a_library_is_reported_with_both_lines.__code__
    assert (found.library, found.library_line) == (tidy.__code__, 4)


def test_a_call_of_a_library_without_code_of_the_user(slots, monkeypatch):
    """The library's line stands for it."""
    monkeypatch.setattr(collection_watch, "LONG_NS", 0)
    watch = CollectionWatch(slots, lambda: False, lambda frame: False)
    tidy = library_code("/x/site-packages/lib/loop.py")["tidy"]
    watch.start()
    tidy()
    watch.stop()
    found = [each for each in watch.drain_long() if each.generation == 2][-1]

    assert (found.code, found.line) == (found.library, found.library_line) == (tidy.__code__, 4)


def test_the_open_phase_is_reported(watch, slots):
    """A collection inside forward belongs to it."""
    slots[Phase.FORWARD] = 5
    gc.collect()

    assert full(watch)[0].phase == Phase.FORWARD


def make_objects() -> list[list[int]]:
    return [[each] for each in range(50_000)]


def test_those_of_the_interpreter_have_no_line(watch):
    """Making many objects collects the young ones; nobody called for it."""
    gc.enable()
    kept = make_objects()
    found = watch.drain_long()

    assert len(kept) == 50_000
    assert [each for each in found if each.generation == 0]
    assert all(each.code is None for each in found if each.generation == 0)


def test_gc_collect_is_put_back(slots):
    """After the end it is the interpreter's own again, and before it gives the same answers."""
    original = gc.collect
    watch = CollectionWatch(slots, lambda: False, UserCode().contains)
    watch.start()
    assert gc.collect is not original
    assert gc.collect(generation=1) >= 0
    with pytest.raises(ValueError, match="invalid generation"):
        gc.collect(9)

    watch.stop()
    assert gc.collect is original


def test_an_evaluation_is_in_no_step(slots, monkeypatch):
    """Its time is not in any step."""
    monkeypatch.setattr(collection_watch, "LONG_NS", 0)
    watch = CollectionWatch(slots, lambda: True, UserCode().contains)
    watch.start()
    gc.collect()
    watch.stop()

    assert full(watch)[0].step == -1


def test_short_ones_are_summed(slots, monkeypatch):
    """Each is told once, in a number and a sum."""
    monkeypatch.setattr(collection_watch, "LONG_NS", 10**12)
    watch = CollectionWatch(slots, lambda: False, UserCode().contains)
    watch.start()
    gc.collect()
    gc.collect()
    watch.stop()
    count, ns = watch.drain_short()

    assert count >= 2
    assert ns > 0
    assert watch.drain_short() == (0, 0)
    assert watch.drain_long() == []


def test_an_error_ends_the_watch(slots, capfd):
    """It is counted. The interpreter would print it into the user's output at each collection."""
    before = failures().get("recorder", 0)

    def fails() -> bool:
        raise ValueError("closed")

    watch = CollectionWatch(slots, fails, UserCode().contains)
    collection_watch_ns = collection_watch.LONG_NS
    collection_watch.LONG_NS = 0
    try:
        watch.start()
        gc.collect()
    finally:
        collection_watch.LONG_NS = collection_watch_ns
        watch.stop()

    assert watch._callback not in gc.callbacks
    assert "closed" not in capfd.readouterr().err
    assert failures()["recorder"] == before + 1


class Stop(BaseException):
    """Raised by a signal's handler, as KeyboardInterrupt is."""


@pytest.fixture
def signal_in_collection(watch, monkeypatch) -> Callable[[], None]:
    """Return a function after which the next collection begins with a signal, whose handler raises `Stop`."""
    send = ctypes.PyDLL(None)["raise"]  # in C: Python would handle the signal before the watch's callback begins
    send.argtypes = [ctypes.c_int, ctypes.py_object, ctypes.py_object]
    callback = functools.partial(send, signal.SIGUSR1)

    def handle(number: int, frame: FrameType | None) -> None:
        gc.callbacks.remove(callback)
        raise Stop

    # Others' callbacks, as hypothesis has one, would begin before the watch's, and the handler raise in them.
    others = [each for each in gc.callbacks if each is not watch._callback]
    for other in others:
        gc.callbacks.remove(other)

    before = signal.signal(signal.SIGUSR1, handle)
    yield lambda: gc.callbacks.insert(0, callback)
    signal.signal(signal.SIGUSR1, before)
    gc.callbacks.extend(others)


@pytest.mark.skipif(not hasattr(extension(), "passing_on"), reason="needs the hooks in C")
def test_a_signal_during_a_collection_reaches_the_script(watch, signal_in_collection, monkeypatch):
    """Ctrl-C ends the script, with the traceback of its own line; the next collections are timed."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    signal_in_collection()
    with pytest.raises(Stop) as raised:
        gc.collect()

    assert unraisable == []
    assert "_called" not in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    gc.collect()
    assert len(full(watch)) == 1


@pytest.mark.skipif(not hasattr(extension(), "passing_on"), reason="needs the hooks in C")
@pytest.mark.parametrize(("error", "main"), [(ValueError, True), (Stop, False)])
def test_only_what_stops_the_main_thread_is_raised_again(error, main, monkeypatch):
    """An error of the callback, and what was raised in another thread, stay with the interpreter."""
    unraisable: list[type[BaseException] | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: unraisable.append(told.exc_type))

    def fails(when: str, info: dict[str, int]) -> None:
        raise error

    ident = threading.main_thread().ident
    assert ident is not None
    callback = extension().passing_on((fails, ident if main else ident + 1))
    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)

    assert unraisable == [error, error]
