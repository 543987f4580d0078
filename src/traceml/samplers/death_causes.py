"""Resources whose end kills a process: memory, shared memory, open files."""

from __future__ import annotations

from typing import Any

from traceml.samplers import cgroup
from traceml.samplers.limits import file_system, open_files
from traceml.samplers.procfs import read_text

__all__ = ["DeathCauses"]


class DeathCauses:
    """Tells what may have killed a child of this process.

    Args:
        counter: file in which the kernel counts processes that its out-of-memory killer ended; found if None.
    """

    def __init__(self, counter: str | None = None) -> None:
        self._counter = cgroup.memory_events() if counter is None else counter
        self._before = self._kills()

    def facts(self) -> dict[str, Any]:
        """Return what is known: `oom_kills` since the start, `shm_bytes`, `memory_limit_bytes`, `files_limit`."""
        kills, shared, files, memory = self._kills(), file_system("/dev/shm"), open_files(), _memory_limit()  # noqa: S108 - it is only measured
        known = {
            "oom_kills": None if kills is None or self._before is None else kills - self._before,
            "shm_bytes": shared[1] if shared else None,
            "memory_limit_bytes": memory,
            "files_limit": files[1] if files else None,
        }
        return {key: value for key, value in known.items() if value is not None}

    def _kills(self) -> int | None:
        for line in (read_text(self._counter) or "").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)

        return None


def _memory_limit() -> int | None:
    group = cgroup.limited_memory()
    if group is None:
        return None

    group.close()
    return group.limit_bytes
