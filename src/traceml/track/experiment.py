"""What users call to log: the functions of the package, and `Experiment`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traceml.recorder.logger import Logger

__all__ = ["log_metric", "log_metrics", "log_params", "log_text"]

_root = Logger()
_active = _root


def log_metric(name: str, value: Any, step: int | None = None) -> None:
    """Log one value.

    Args:
        name: any text.
        value: a number, or what holds one: a tensor, a numpy scalar, a bool. Anything else is kept as a text.
        step: the step; by default the current training step, else a counter per name.
    """
    _active.metric(name, value, step)


def log_metrics(metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Log several values at one step.

    Args:
        metrics: name -> value; see `log_metric`.
        step: their step.
    """
    logger = _active
    for name, value in metrics.items():
        logger.metric(name, value, step)


def log_params(params: Mapping[str, Any]) -> None:
    """Log parameters: what was chosen for this run.

    Args:
        params: name -> value; maps may be nested.
    """
    _active.row("params", params=dict(params))


def log_text(name: str, text: str, step: int | None = None) -> None:
    """Log a text.

    Args:
        name: what to call it.
        text: the text.
        step: its step; by default as for `log_metric`.
    """
    _active.row("text", step=_active.next_step(name, step), name=name, text=str(text))
