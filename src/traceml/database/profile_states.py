"""States of a profile of some steps, as ranks answer them and `traceml profile` reads them."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["MAX_PROFILE_STEPS", "ProfileState"]

MAX_PROFILE_STEPS = 1000
"""Most steps of one profile."""


class ProfileState(StrEnum):
    """State of the profile of one rank."""

    NONE = "none"
    """There was none on this rank."""
    WAITING = "waiting"
    """Its first step has not begun."""
    OPEN = "open"
    """The profiler warms up or records."""
    SAVING = "saving"
    """Its trace is being written."""
    RECORDED = "recorded"
    """All steps are recorded; of a rank's answer: its trace can be fetched."""
    FAILED = "failed"
    """There will be no trace; `why` says why."""
    LOST = "lost"
    """The rank does not answer, or has ended; only the client knows of it."""
