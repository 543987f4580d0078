"""One logged value, as plugins and the parts of tracking exchange it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from traceml.clock import own_time as time

__all__ = ["Metric"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One value under a name at a step.

    Examples:
        >>> traceml.Metric("loss", 0.5, step=1).value
        0.5

    Args:
        name: any text.
        value: the number; given to `Orchestrator.route_metric` it may be anything that `log_metric` takes.
        step: the training step; None means the current one, else a counter per name.
        timestamp: epoch seconds of the call.
        rank: the rank that logged it.
        kind: source of the value: a number of `MetricKind`, 0 for the user.
    """

    name: str
    value: Any
    step: int | None = None
    timestamp: float = field(default_factory=time.time)
    rank: int = 0
    kind: int = 0
