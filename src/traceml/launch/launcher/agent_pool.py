"""Agents that stay after a launch, with torch imported, so that the next launch to their host starts at once."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Hashable

from traceml.launch.launcher.agent_connection import Link

__all__ = ["POOL", "Pool"]


class Pool:
    """Idle agents, each known by a key: its host, and how it was started.

    A link is in the pool or in a launch, never in both, so launches in several threads do not meet.
    """

    def __init__(self) -> None:
        self._links: dict[Hashable, Link] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Pool({list(self._links.values())})"

    def take(self, key: Hashable) -> Link | None:
        """Return an idle agent that was kept under `key`, as far as can be seen alive; the caller owns it then."""
        with self._lock:
            link = self._links.pop(key, None)

        if link is not None and not link.alive:
            link.close()
            return None

        return link

    def give(self, key: Hashable, link: Link) -> None:
        """Keep an agent that has nothing to do."""
        with self._lock:
            before, self._links[key] = self._links.get(key), link

        if before is not None:  # of a launch that ran at the same time
            before.close()

    def close(self) -> None:
        """End all agents."""
        with self._lock:
            links, self._links = list(self._links.values()), {}

        for link in links:
            link.hang_up()

        for link in links:
            link.close()

    def forget(self) -> None:
        """Know of no agents in a forked child: they belong to its parent."""
        self._lock = threading.Lock()
        self._links = {}


POOL = Pool()

atexit.register(POOL.close)
os.register_at_fork(after_in_child=POOL.forget)
