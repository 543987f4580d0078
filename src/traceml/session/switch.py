"""The environment variable `TRACEML`, which turns tracing on for scripts that do not call `init`."""

from __future__ import annotations

import logging
import os

__all__ = ["is_switched_on"]

_log = logging.getLogger("traceml")
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def is_switched_on() -> bool:
    """Return whether `TRACEML` turns tracing on; another value than yes or no is logged, and counts as no."""
    value = os.environ.get("TRACEML", "").strip()
    if value.lower() not in _ON + _OFF:
        _log.warning("TRACEML=%s has no effect: TRACEML=1 traces, TRACEML=0 does not", value[:100])

    return value.lower() in _ON
