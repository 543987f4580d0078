"""Resources that a process can die of when they run out: memory and shared memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from traceml.inspection.control_groups import cgroup_paths, count_kills, oom_counter
from traceml.samplers import cgroup
from traceml.samplers.limits import file_system

__all__ = ["DeathCauses"]


class DeathCauses:
    """Tells what may have killed a child of this process.

    Args:
        counter: file in which the kernel counts processes that its out-of-memory killer ended; found if None.
    """

    def __init__(self, counter: str | None = None) -> None:
        self._counter = oom_counter(cgroup_paths()) if counter is None else Path(counter)
        self._before = count_kills(self._counter)

    def facts(self) -> dict[str, Any]:
        """Return what is known: `oom_kills` since the start, `shm_bytes`, `memory_limit_bytes`."""
        shared = file_system("/dev/shm")  # noqa: S108 - it is only measured
        kills, memory = count_kills(self._counter), _memory_limit()
        known = {
            "oom_kills": None if kills is None or self._before is None else kills - self._before,
            "shm_bytes": shared[1] if shared else None,
            "memory_limit_bytes": memory,
        }
        return {key: value for key, value in known.items() if value is not None}


def _memory_limit() -> int | None:
    group = cgroup.limited_memory()
    if group is None:
        return None

    group.close()
    return group.limit_bytes
