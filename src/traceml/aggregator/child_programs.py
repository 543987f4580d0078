"""End of programs that the aggregator has started, with all that they have started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

__all__ = ["kill_group"]

_KILLED_S = 1.0  # a process that a file system holds ends later; a child that has left the group may hold the pipe


async def kill_group(process: asyncio.subprocess.Process) -> None:
    """Kill a process that leads a group of its own, with the others in it; wait at most a second for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KILLED_S):
            await process.communicate()
