"""A collector whose process runs as long as the training, so that it can be disturbed."""

from __future__ import annotations

from typing import Any

from traceml import CollectorInterface, Metric


class Endless(CollectorInterface):
    """Reads nothing every half second."""

    interval = 0.5

    def collect(self) -> list[Metric | dict[str, Any]]:
        """Return no value."""
        return []
