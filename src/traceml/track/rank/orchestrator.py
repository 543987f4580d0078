"""Facade of tracking in the rank: appends a logged value as a row; other processes deliver it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from traceml.database.schema import MetricKind
from traceml.errors import ArgumentTypeError
from traceml.recorder.current_recorder import current_recorder
from traceml.recorder.lifecycle import shutdown
from traceml.track.plugins.metric import Metric
from traceml.track.rank import media
from traceml.track.rank.active_experiment import loggers
from traceml.track.rank.logged_values import params_of
from traceml.track.rank.logging_recorder import recorder_for_logging

__all__ = ["Orchestrator"]

_INT64 = 2**63


class Orchestrator:
    """Logs values of frameworks, collectors and users' own code for the active experiment.

    Examples:
        >>> orchestrator = traceml.Orchestrator()
        >>> orchestrator.route_metric(traceml.Metric("loss", 0.5, step=1))
        >>> orchestrator.health()["state"]
        'running'

    Attributes:
        numbers_only: whether captures leave out images and histograms.
    """

    def __init__(self) -> None:
        self.numbers_only = False

    def __repr__(self) -> str:
        return f"Orchestrator({self.health()['state']})"

    def route_metric(self, metric: Metric) -> None:
        """Append a value with its timestamp; the rank is this process's.

        Args:
            metric: name, value, step, timestamp and kind; a step of None means the training step, else a counter.

        Raises:
            ArgumentTypeError: it is no `Metric`, or its kind or timestamp is no number.
        """
        try:
            given = (metric.name, metric.value, metric.step, int(metric.kind), _ns(metric.timestamp))
        except (AttributeError, TypeError, ValueError) as error:
            kind = type(metric).__name__
            raise ArgumentTypeError(
                f"route_metric() takes a traceml.Metric, not {kind} {metric!r:.100}: {error}"
            ) from None

        if metric.kind == MetricKind.COLLECTOR:
            # No user asked for it: it alone must not start an experiment of the run.
            loggers.when_decided(lambda logger: logger.metric(*given))
        else:
            loggers.active.metric(*given)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Append parameters."""
        loggers.active.row("params", params=params_of(params))

    def log_text(self, name: str, text: str, step: int | None = None, timestamp: float | None = None) -> None:
        """Append a text; `timestamp` in epoch seconds."""
        media.text(loggers.active, name, text, step, _ns(timestamp))

    def log_image(self, name: str, image: Any, step: int | None = None, timestamp: float | None = None) -> None:
        """Append an image, anything that `traceml.log_image` takes; `timestamp` in epoch seconds."""
        media.image(loggers.active, name, image, step, _ns(timestamp))

    def log_histogram(
        self,
        name: str,
        counts: Sequence[float],
        edges: Sequence[float],
        step: int | None = None,
        timestamp: float | None = None,
    ) -> None:
        """Append a histogram; `timestamp` in epoch seconds."""
        t_ns, logger = _ns(timestamp), loggers.active
        logger.row(
            "histogram", step=logger.next_step(name, step), t_ns=t_ns, name=name, counts=list(counts), edges=list(edges)
        )

    def log_collected(self, name: str, facts: Mapping[str, Any]) -> None:
        """Append facts that a collector read.

        Args:
            facts: what it read, already masked.
        """
        loggers.when_decided(lambda logger: logger.row("collected", name=name, facts=dict(facts)))

    def start(self) -> None:
        """Start the recorder, as the first `log_*` call does; also after a `stop`."""
        recorder_for_logging(again=True)

    def stop(self) -> None:
        """Send what is left and stop the recorder; see `traceml.shutdown`."""
        shutdown()

    def health(self) -> dict[str, Any]:
        """Return `state`, `connected`, rows appended, stored, pending here and lost, and errors."""
        recorder = current_recorder()
        if recorder is None:
            counts = dict.fromkeys(("appended", "stored", "pending", "lost", "errors"), 0)
            return {"state": "idle", "connected": False, **counts}

        statistics = recorder.statistics()
        pending = statistics.rows_appended - statistics.rows_acked
        return {
            "state": statistics.state, "connected": statistics.connected, "appended": statistics.rows_appended,
            "stored": statistics.rows_acked, "pending": max(pending, 0), "lost": statistics.rows_lost,
            "errors": statistics.errors,
        }  # fmt: skip


def _ns(timestamp: float | None) -> int:
    if timestamp is None:
        return 0

    try:
        whole = int(timestamp)  # multiplying the float by 1e9 is not exact
        ns = whole * 1_000_000_000 + round((timestamp - whole) * 1e9)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentTypeError(f"a timestamp is in epoch seconds, not {timestamp!r:.100}: {error}") from None

    if abs(ns) >= _INT64:
        raise ArgumentTypeError(
            f"a timestamp is in epoch seconds, not {timestamp!r:.100}: it does not fit into 64 bits"
        )

    return ns
