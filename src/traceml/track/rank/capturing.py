"""Begins and ends what is captured without a call, with the recorder of this process."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from traceml.errors import PluginError
from traceml.recorder.current import current_recorder
from traceml.track.rank.active_experiment import loggers
from traceml.track.rank.announcement import check_backends
from traceml.track.rank.autocapture import AutoCapture
from traceml.track.rank.orchestrator import Orchestrator
from traceml.track.rank.tracker_warnings import TrackerWarnings

if TYPE_CHECKING:
    from traceml.recorder.recorder import Recorder

__all__ = ["begin", "rest", "start"]

_log = logging.getLogger("traceml")
_TELL_AFTER_S = 20.0
_capturing: AutoCapture | None = None
_of: Recorder | None = None


def begin(recorder: Recorder) -> None:
    """Begin with a recorder whose settings name trackers or collectors."""
    try:
        check_backends(recorder.config.backend, recorder.config.backend_options)
    except PluginError as error:
        _log.warning("%s", error)  # a setting may be meant for another script

    start()
    recorder.before_stop(loggers.announce_run)
    recorder.after(10.0, loggers.announce_run)


def start(*, collect: bool = True) -> None:
    """Begin capturing for the recorder that runs, or go on with it.

    Args:
        collect: start the collectors too.
    """
    global _capturing, _of
    recorder = current_recorder()
    if recorder is None or not recorder.enabled or recorder.is_child:
        return

    if recorder is _of:
        if _capturing is not None:
            _capturing.start(collect=collect)

        return

    own = recorder.rank_identity
    _of = recorder
    if own.rank == 0:
        troubles = TrackerWarnings()
        tell = partial(_tell, recorder, troubles)
        recorder.after(_TELL_AFTER_S, tell)
        recorder.before_stop(tell)

    _capturing = AutoCapture(recorder.config, Orchestrator(), rank=own.rank, local_rank=own.local_rank)
    recorder.before_stop(_stop)
    _capturing.start(collect=collect)


def rest() -> None:
    """Leave the frameworks alone until the next `start`: nothing is tracked any more, unless the settings say so."""
    recorder = current_recorder()
    if _capturing is not None and recorder is _of and recorder is not None and not recorder.config.backend:
        _capturing.unpatch()


def _tell(recorder: Recorder, troubles: TrackerWarnings) -> None:
    if recorder.run_dir is not None:
        troubles.tell(recorder.run_dir)


def _stop() -> None:
    global _capturing
    capturing, _capturing = _capturing, None
    if capturing is not None:
        capturing.stop()
