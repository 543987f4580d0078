"""Keeps a fork from happening while another thread of ours is inside code that a fork must not cut in two.

A forked child has only the thread that forked. A lock that another thread held at that moment stays locked in the child
forever: those of OpenSSL (`hmac`, `hashlib`, TLS), of the resolver (`getaddrinfo`), of modules being imported. A
loader worker that then computes an HMAC, as `multiprocessing` does to pass a descriptor, waits forever, and the
training with it. So threads of ours work inside the gate, and a fork waits until they are outside.

What a fork calls before it comes in the reverse order of registration. That of `logging` takes its lock, and must come
after ours, or a thread inside would wait for the lock, and the fork for the thread.
"""

from __future__ import annotations

import logging  # noqa: F401 - registers its own function for forks
import os
import threading
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager

__all__ = ["ForkGate", "fork_gate"]

_TIMEOUT_S = 2.0
_BRIEF_S = 0.01  # once a thread stayed inside for longer: not every fork pays for it


class ForkGate(ContextDecorator):
    """Context manager of a thread's work, or of a function. Several threads may be inside; one may enter again."""

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}
        self._start()

    def _start(self) -> None:
        self._changed = threading.Condition()
        self._timeout_s = _TIMEOUT_S

    def __enter__(self) -> None:
        """Let no other thread fork from now on."""
        self._enter(1)

    def __exit__(self, *_: object) -> None:
        self._leave(1)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Allow forks while the calling thread waits: for the network, for a process, for another thread."""
        depth = self._inside.get(threading.get_ident(), 0)
        self._leave(depth)
        try:
            yield
        finally:
            self._enter(depth)

    def hold(self) -> None:
        """Wait, before a fork, until no other thread is inside; give up after 2 s, and be brief from then on."""
        self._changed.acquire()
        mine = {threading.get_ident()}
        are_outside = self._changed.wait_for(lambda: self._inside.keys() <= mine, self._timeout_s)
        self._timeout_s = _TIMEOUT_S if are_outside else _BRIEF_S

    def release(self) -> None:
        """Allow threads in again, in the parent after a fork."""
        self._changed.release()

    def reset(self) -> None:
        """Reset in a forked child, which has no other thread."""
        mine = threading.get_ident()
        self._inside = {mine: self._inside[mine]} if mine in self._inside else {}
        self._start()

    def _enter(self, times: int) -> None:
        mine = threading.get_ident()
        if times:
            with self._changed:
                self._inside[mine] = self._inside.get(mine, 0) + times

    def _leave(self, times: int) -> None:
        mine = threading.get_ident()
        if times:
            with self._changed:
                self._inside[mine] -= times
                if not self._inside[mine]:
                    del self._inside[mine]

                self._changed.notify_all()


fork_gate = ForkGate()
"""The one of this process."""
os.register_at_fork(before=fork_gate.hold, after_in_parent=fork_gate.release, after_in_child=fork_gate.reset)
