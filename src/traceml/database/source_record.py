"""Record of what an aggregator has read for a rank that does not collect: code, environment and machine.

Process: the aggregator writes, readers read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import msgspec

__all__ = ["SOURCE", "SourceReading"]

SOURCE = "source"
"""Kind of the event in the run's store."""


class SourceReading(msgspec.Struct, frozen=True):
    """One reading, for one start of a job."""

    stream: int  # of rank 0, in the store
    facts: Mapping[str, Mapping[str, Any]] = {}  # by collector, masked
    # Why facts are missing: `elsewhere` (rank 0 is on another host), `ended` (the run, before they were read), `late`
    # (reading took too long) or `failed`; empty if collectors have read all that there is.
    unread: str = ""

    @classmethod
    def from_event(cls, data: Mapping[str, Any]) -> Self:
        """Return the reading of an event; what is not a map of facts is left out."""
        facts = data.get("facts")
        pairs = facts.items() if isinstance(facts, Mapping) else ()
        stream, unread = data.get("stream"), data.get("unread")
        return cls(
            stream if isinstance(stream, int) else -1,
            {name: each for name, each in pairs if isinstance(name, str) and isinstance(each, Mapping)},
            unread if isinstance(unread, str) else "",
        )

    def is_whole_for(self, stream: int) -> bool:
        """Return whether it has read all that there was about a stream's process."""
        return self.stream == stream and not self.unread

    def to_event(self) -> dict[str, Any]:
        """Return it as the data of an event."""
        return {"stream": self.stream, "facts": {name: dict(each) for name, each in self.facts.items()}} | (
            {"unread": self.unread} if self.unread else {}
        )
