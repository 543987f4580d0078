"""The recorder that a logging call uses: the running one, or one that only logs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from threading import get_ident
from typing import Any

from traceml import settings
from traceml.errors import TraceMLError
from traceml.fail_open import warn_once
from traceml.inspection.loaded_modules import imports_main_again
from traceml.recorder import lifecycle
from traceml.recorder.current_recorder import state
from traceml.recorder.identity import spawned_from
from traceml.recorder.recorder import Recorder
from traceml.recorder.run_notices import announce

__all__ = ["recorder_for_logging"]

_log = logging.getLogger("traceml")


def recorder_for_logging(*, again: bool = False, arguments: Mapping[str, Any] | None = None) -> Recorder | None:
    """Return the running recorder; before any `init`, start one that only logs. None while nothing is recorded.

    In a forked child of a recorded process it belongs to the same run.

    Args:
        again: start one also after a `shutdown`, because an experiment begins.
        arguments: settings of a recorder that is started.

    Raises:
        SettingsError: the settings are wrong and `again` is set; else that is a warning.
    """
    if state.starter is not None:  # what is logged meanwhile would be lost
        lifecycle.await_start()

    recorder = state.recorder
    if recorder is not None and state.starter == get_ident():  # in a signal handler: its tables are there, or not yet
        return recorder if recorder.flight is not None else None

    if recorder is not None and (recorder.enabled or not (again and recorder.is_over)):
        if recorder.is_over:
            _warn_of_end(has_run=recorder.identity is not None)

        return recorder if recorder.enabled else None

    if imports_main_again() or sys.is_finalizing():
        return None

    _log.debug("a logging call starts a recorder without tracing")
    try:
        known = recorder or state.parent
        given = dict(arguments or {})
        if known is not None:
            config = known.config.over(**given)
            if recorder is not None:  # an argument of `init` named the run that is over
                config = config.replaced(run_name=settings.load().run_name)
        else:
            spawned = spawned_from()  # of a recorded process
            config = settings.load(**{"local": True, **(spawned.settings if spawned is not None else {}), **given})

        recorder = lifecycle.start(config, wait=False, tracing=False, on_stored=announce)
    except TraceMLError as error:
        if again:
            raise

        _log.warning("nothing is recorded: %s", error)
        state.recorder = Recorder(settings.Config(enabled=False))
        return None

    return recorder if recorder.enabled else None


def _warn_of_end(*, has_run: bool) -> None:
    """Log once that a value is lost: a script may log in an `atexit` function, of which ours may come first."""
    why = "the run has ended, by traceml.shutdown() or with the script"
    warn_once(
        "end of logging",
        "what is logged from now on is not recorded: %s. A new Experiment begins another run",
        why if has_run else "tracing could not be started, the error of traceml.init() says why",
    )
