"""A collector whose process runs as long as the training, so that it can be disturbed."""

from __future__ import annotations

from typing import Any

from traceml import CollectorInterface, Metric


class Endless(CollectorInterface):
    """Reads a constant every half second."""

    interval = 0.5

    def collect(self) -> list[Metric | dict[str, Any]]:
        """Return one value."""
        return [Metric(name="constant", value=1.0)]
