"""The signal that ends a sleep."""

from __future__ import annotations

import threading

from traceml.recorder.recorder_thread import WakeSignal

_LONG_S = 60.0  # the test ends at once unless it fails


def test_a_signal_ends_the_sleep() -> None:
    """Also one that was given before the sleep, or twice."""
    signal = WakeSignal()
    signal.set()
    signal.set()

    assert signal.wait(_LONG_S)
    assert signal.wait(_LONG_S), "it stays set until it is cleared"


def test_a_cleared_signal_lets_sleep() -> None:
    """A sleep without a signal ends by its time."""
    signal = WakeSignal()
    signal.set()
    signal.clear()

    assert not signal.wait(0.0)
    assert not signal.wait(0.01)


def test_another_thread_wakes_it_again_and_again() -> None:
    """Each signal is seen, however it falls together with a `clear`."""
    signal, asked, answered = WakeSignal(), threading.Semaphore(0), threading.Semaphore(0)
    ended: list[bool] = []

    def sleeper() -> None:
        while not ended:
            signal.wait(_LONG_S)
            signal.clear()
            if asked.acquire(blocking=False):
                answered.release()

    thread = threading.Thread(target=sleeper)
    thread.start()
    for _ in range(500):
        asked.release()
        signal.set()
        assert answered.acquire(timeout=_LONG_S)

    ended.append(True)
    signal.set()
    thread.join(_LONG_S)
    assert not thread.is_alive()
