"""Base of the backends that send a batch of values in one call."""

from __future__ import annotations

from traceml.track.plugins.interfaces import BackendInterface
from traceml.track.plugins.metric import Metric

__all__ = ["BatchBackend"]


class BatchBackend(BackendInterface):
    """Sends one value as a batch of one, and keeps the time of the end; subclasses have `log_metrics`."""

    _ended: float | None = None
    """Epoch seconds at which the training ended; None where they are not known."""

    def log_metric(self, name: str, value: float, step: int) -> None:
        """Send one value."""
        self.log_metrics([Metric(name, value, step)])

    def end_time(self, timestamp: float) -> None:
        """Keep the time for the run's end."""
        self._ended = timestamp
