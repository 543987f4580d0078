"""Polling of data sources: one thread per source for all browsers, within a share of a CPU core."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Generic, Protocol, TypeVar

from traceml.fail_open import fail_open

__all__ = ["PollSource", "PollerRegistry", "SharedPoller"]

# A reload of the page, or a visit to the list and back, must not read a run again.
_LINGER_S = 20.0
_SHARE = 0.04  # of a CPU core per source; the training needs the rest
_LONGEST_S = 10.0

_log = logging.getLogger("traceml")

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class PollSource(Protocol[T_co]):
    """A data source that one thread reads repeatedly."""

    def read(self) -> T_co | None:
        """Return the state; None when nothing has changed since the last call."""

    def close(self) -> None:
        """Close open files."""


class SharedPoller(Generic[T]):
    """Reads a source while it has listeners, and passes each state to them; used from the event loop.

    Args:
        source: the source, read in the poller's thread alone.
        interval_s: least time between two reads; longer where reading takes long.
        on_idle: called in the event loop when there was no listener for a while and the thread has ended.
    """

    def __init__(self, source: PollSource[T], *, interval_s: float, on_idle: Callable[[], None]) -> None:
        self.latest: T | None = None
        self._source = source
        self._interval_s = interval_s
        self._on_idle = on_idle
        self.listeners: set[Callable[[T], object]] = set()
        self._left_s = time.monotonic()
        self._wake = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None

    def subscribe(self, listener: Callable[[T], object]) -> None:
        """Call `listener` in the event loop with each new state, and at once with the latest one."""
        self.listeners.add(listener)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="traceml-poller", daemon=True)
            self._thread.start()

        if self.latest is not None:
            listener(self.latest)

    def unsubscribe(self, listener: Callable[[T], object]) -> None:
        """Stop calling a listener."""
        self.listeners.discard(listener)
        self._left_s = time.monotonic()

    def refresh(self) -> None:
        """Read again now."""
        self._wake.set()

    def _run(self) -> None:
        try:
            while self.listeners or time.monotonic() - self._left_s < _LINGER_S:
                began_s = time.thread_time()
                self._read()
                spent_s = time.thread_time() - began_s
                self._wake.wait(min(max(self._interval_s, spent_s / _SHARE), _LONGEST_S))
                self._wake.clear()
        finally:
            self._source.close()
            self._call(self._on_idle)

    def _read(self) -> None:
        state: T | None = None
        with fail_open(_log, "display", f"the page could not read {self._source!r}"):
            state = self._source.read()

        if state is not None:
            self._call(self._publish, state)

    def _publish(self, state: T) -> None:
        self.latest = state
        for listener in tuple(self.listeners):
            listener(state)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # the loop is closed: the page process is ending


class PollerRegistry(Generic[T]):
    """The active pollers by key; used from the event loop.

    Args:
        open_source: opens the source of a key.
    """

    def __init__(self, open_source: Callable[[Hashable], PollSource[T]], *, interval_s: float = 1.0) -> None:
        self._open = open_source
        self._interval_s = interval_s
        self._pollers: dict[Hashable, SharedPoller[T]] = {}

    def subscribe(self, key: Hashable, listener: Callable[[T], object]) -> None:
        """Call `listener` in the event loop with each new state of a key, and at once with the latest one."""
        if key not in self._pollers:
            self._pollers[key] = SharedPoller(
                self._open(key), interval_s=self._interval_s, on_idle=partial(self._forget, key)
            )

        self._pollers[key].subscribe(listener)

    def unsubscribe(self, key: Hashable, listener: Callable[[T], object]) -> None:
        """Stop calling a listener."""
        if key in self._pollers:
            self._pollers[key].unsubscribe(listener)

    def refresh(self) -> None:
        """Read all again now."""
        for poller in self._pollers.values():
            poller.refresh()

    def _forget(self, key: Hashable) -> None:
        """Remove a poller whose thread has ended; listeners that came meanwhile get a new one."""
        for listener in self._pollers.pop(key).listeners:
            self.subscribe(key, listener)
