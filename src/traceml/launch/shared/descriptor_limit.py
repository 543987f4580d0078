"""Limit of open files.

The agent has eleven per worker while it starts them, a thousand for 92 workers; the launcher has three per host.

Process: the agent and the launcher.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

__all__ = ["raise_descriptor_limit", "room_for", "soft_limit"]


def raise_descriptor_limit() -> int:
    """Raise the soft limit of this process to its hard limit; return the soft limit that it had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    return soft


@contextlib.contextmanager
def soft_limit(soft: int) -> Iterator[None]:
    """Set the soft limit for what is started inside the block; descriptors that are open stay open."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


@contextlib.contextmanager
def room_for(count: int) -> Iterator[None]:
    """Raise the soft limit to the hard one inside the block, if this many descriptors need that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = soft == resource.RLIM_INFINITY or soft >= count
    with contextlib.nullcontext() if is_enough else soft_limit(hard):
        yield
