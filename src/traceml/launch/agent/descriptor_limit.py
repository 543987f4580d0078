"""Limit of open files: the agent has eleven per worker while it starts them, a thousand for 92 workers."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

__all__ = ["raise_descriptor_limit", "soft_limit"]


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
