"""Numbers of the current run, for other loggers: `wandb.log(traceml.summary())`."""

from __future__ import annotations

import logging

from traceml.fail_open import fail_open
from traceml.recorder.current_recorder import current_recorder

__all__ = ["summary"]

_log = logging.getLogger("traceml")
_STORED_S = 2.0


def summary() -> dict[str, float]:
    """Return numbers of this process's run so far, of all its ranks: `traceml/step_ms`, `traceml/share/forward`, ….

    It waits until the rows so far are stored, and reads the store, which takes tens of milliseconds: call it on one
    rank, once per epoch or at the end.

    Examples:
        >>> wandb.log(traceml.summary())

    Returns:
        The numbers by the names that trackers get; empty if nothing is recorded, or on another host.
    """
    recorder = current_recorder()
    run_dir = recorder.run_dir if recorder is not None else None
    with fail_open(_log, "session", "the run cannot be summarized"):
        if recorder is None or run_dir is None or not run_dir.is_dir():
            return {}

        from traceml.runs.run import load_run

        if recorder.enabled:
            recorder.wait_until_stored(_STORED_S)

        return load_run(run_dir).summary()

    return {}
