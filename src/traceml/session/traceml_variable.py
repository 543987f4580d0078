"""The environment variable `TRACEML`, which turns tracing on for scripts that do not call `init`."""

from __future__ import annotations

import logging
import os

from traceml.coerce import BAD, coerce

__all__ = ["is_switched_on"]

_log = logging.getLogger("traceml")


def is_switched_on() -> bool:
    """Return whether `TRACEML` turns tracing on; another value than yes or no is logged, and counts as no."""
    value = os.environ.get("TRACEML", "").strip()
    flag = coerce(bool, value or "0", {})
    if flag is BAD:
        _log.warning("TRACEML=%s has no effect: TRACEML=1 traces, TRACEML=0 does not", value[:100])

    return flag is True
