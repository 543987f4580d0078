"""The states of a task."""

from __future__ import annotations

__all__ = ["CANCELLED", "COMPLETED", "FAILED", "FINAL", "QUEUED", "RUNNING", "TIMED_OUT"]

QUEUED = "queued"
RUNNING = "running"
COMPLETED = "completed"
FAILED = "failed"
CANCELLED = "cancelled"
TIMED_OUT = "timed_out"

FINAL = frozenset({COMPLETED, FAILED, CANCELLED, TIMED_OUT})
