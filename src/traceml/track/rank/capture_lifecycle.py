"""Start and stop of automatic capture, together with the recorder of this process; and warnings about its trackers.

Delivery runs in other processes, so the script would not show its errors. Each tracker is reported once: some time
after the start, when a wrong address or key has shown, or at the end.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.errors import PluginError
from traceml.fail_open import fail_open
from traceml.recorder.current_recorder import current_recorder, on_start
from traceml.track.rank.active_experiment import loggers
from traceml.track.rank.announcement import PER_EXPERIMENT, check_backends, storable_trackers
from traceml.track.tracker_state import FAILING_PHASES, DeliveryPhase, states_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from traceml.recorder.recorder import Recorder
    from traceml.settings import Config
    from traceml.track.rank.auto_capture import AutoCapture

__all__ = ["adopt_settings", "follow_recorder", "pause", "start", "warn_of_trackers"]

_log = logging.getLogger("traceml")
_ANNOUNCE_AFTER_S = 10.0
_WARN_AFTER_S = 20.0
_TEXT_CHARS = 200  # of a tracker's error
_OF_AGGREGATOR = frozenset({"local_only", "mask"})  # it goes by these, too, for its alerts
_capture: AutoCapture | None = None
_capturing_recorder: Recorder | None = None


def follow_recorder() -> None:
    """Let tracking start with each recorder whose settings name trackers or collectors, from now on."""
    on_start(_start_tracking)


def adopt_settings(recorder: Recorder, arguments: Mapping[str, Any]) -> set[str]:
    """Take the settings of tracking from an `init` after the recorder's start, as under `traceml run`.

    Once something is logged, or an experiment has begun, it is too late for that.

    Returns:
        The settings that are in force for all of the run now.
    """
    given = {name: value for name, value in arguments.items() if name in PER_EXPERIMENT and name != "run_name"}
    if not given or loggers.has_announced:
        return set()

    recorder.config = recorder.config.over(**given)
    follow_recorder()
    _start_tracking(recorder)
    return given.keys() - _OF_AGGREGATOR


def _start_tracking(recorder: Recorder) -> None:
    if recorder.is_child or not (recorder.config.backend or recorder.config.collectors):
        return

    with fail_open(_log, "track", "tracking could not be started"):
        _check_backends(recorder.config)
        start()
        recorder.before_stop(loggers.announce_run)
        recorder.after(_ANNOUNCE_AFTER_S, loggers.announce_run)


def _check_backends(config: Config) -> None:
    try:
        check_backends(config.backend, config.backend_options, source=config.sources.get("backend", ""))
    except PluginError as error:
        _log.warning("%s", error)  # a setting may be meant for another script

    storable_trackers(config)  # warns


def start(config: Config | None = None, *, collect: bool = True, numbers_only: bool = False) -> None:
    """Start capturing for the current recorder, or continue with it.

    Args:
        config: the settings in force; by default the recorder's.
        collect: start the collectors too.
        numbers_only: leave out images and histograms, which only a tracker shows.
    """
    global _capture, _capturing_recorder
    recorder = current_recorder()
    if recorder is None or not recorder.enabled or recorder.is_child:
        return

    config = config or recorder.config
    if recorder is _capturing_recorder:
        if _capture is not None:
            _capture.start(config, collect=collect, numbers_only=numbers_only)

        return

    from traceml.track.rank.auto_capture import AutoCapture  # it imports the registry of plugins
    from traceml.track.rank.orchestrator import Orchestrator

    own = recorder.rank_identity
    _capturing_recorder = recorder
    if own.rank == 0:
        warned: set[str] = set()

        def warn() -> None:
            warn_of_trackers(recorder.run_dir, warned)

        recorder.after(_WARN_AFTER_S, warn)
        recorder.before_stop(warn)

    _capture = AutoCapture(config, Orchestrator(), rank=own.rank, local_rank=own.local_rank)
    recorder.before_stop(_stop)
    _capture.start(config, collect=collect, numbers_only=numbers_only)


def pause() -> None:
    """Capture as before the experiment: what the settings say, without a tracker numbers, without tracing nothing."""
    recorder = current_recorder()
    if recorder is None or recorder is not _capturing_recorder or _capture is None:
        return

    if recorder.config.backend or recorder.tracing:
        _capture.start(recorder.config, collect=False, numbers_only=not recorder.config.backend)
    else:
        _capture.unpatch()


def _stop() -> None:
    global _capture
    stopping, _capture = _capture, None
    if stopping is not None:
        stopping.stop()


def warn_of_trackers(run_dir: Path | None, warned: set[str]) -> None:
    """Warn about each tracker that fails now.

    Args:
        run_dir: the run's folder; when it is on another host, nothing is known here.
        warned: those that were reported, extended here.
    """
    for state in states_of(run_dir) if run_dir is not None else ():
        if state.phase not in FAILING_PHASES or not state.error or state.backend in warned:
            continue

        warned.add(state.backend)
        error = state.error if len(state.error) <= _TEXT_CHARS else f"{state.error[:_TEXT_CHARS]}..."
        is_broken = state.phase is DeliveryPhase.BROKEN
        next_try = "once that is fixed, " if is_broken else "it is tried again, and "
        _log.warning(
            "%s%s does not accept what is logged (%s). The rows are kept in %s: %s`traceml sync` delivers them.",
            state.backend, f" at {state.target}" if state.target else "", error, run_dir, next_try,
        )  # fmt: skip
