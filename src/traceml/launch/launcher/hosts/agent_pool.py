"""Idle agents kept after a launch, with torch imported, so that the next launch on their host starts at once."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Hashable

from traceml.launch.launcher.hosts.agent_connection import AgentConnection

__all__ = ["AGENT_POOL", "AgentPool"]


class AgentPool:
    """Idle agents by key: the host, and how the agent was started.

    A connection is in the pool or in a launch, never in both, so launches in several threads are independent.
    """

    def __init__(self) -> None:
        self._connections: dict[Hashable, AgentConnection] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"AgentPool({list(self._connections.values())})"

    def pop(self, key: Hashable) -> AgentConnection | None:
        """Return an idle agent kept under `key`, which the caller then owns; None if there is none alive."""
        with self._lock:
            connection = self._connections.pop(key, None)

        if connection is not None and not connection.alive:
            connection.close()
            return None

        return connection

    def put(self, key: Hashable, connection: AgentConnection) -> None:
        """Keep an idle agent."""
        with self._lock:
            before, self._connections[key] = self._connections.get(key), connection

        if before is not None:  # from a simultaneous launch
            before.close()

    def close(self) -> None:
        """End all agents."""
        with self._lock:
            connections, self._connections = list(self._connections.values()), {}

        for connection in connections:
            connection.close_now()

        for connection in connections:
            connection.close()

    def forget(self) -> None:
        """Forget all agents in a forked child: they belong to its parent."""
        self._lock = threading.Lock()
        self._connections = {}


AGENT_POOL = AgentPool()

atexit.register(AGENT_POOL.close)
os.register_at_fork(after_in_child=AGENT_POOL.forget)
