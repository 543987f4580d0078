"""Start of a traced training: the recorder, and tracking where the settings ask for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.fail_open import fail_open
from traceml.recorder import lifecycle
from traceml.recorder.current import current_recorder

if TYPE_CHECKING:
    from typing import Unpack

    from traceml.recorder.recorder import Recorder
    from traceml.session.init_arguments import InitArguments
    from traceml.settings import Config

__all__ = ["init", "start", "start_for_script"]

_log = logging.getLogger("traceml")


def init(**arguments: Unpack[InitArguments]) -> Recorder:
    """Start tracing in this process: connect to the aggregator and start the recorder's thread.

    A second call returns the running recorder, whatever its arguments; `enabled=False` stops it.

    Example:
        traceml.init(local=True, run_name="baseline")

    Args:
        arguments: settings by name, over those of environment and files; `python -m traceml.settings` describes all.
            The most used: `local=True` starts an aggregator where none answers, `on_missing="warn"` trains on without
            one, `runs_dir`, `run_name`, `project`, `backend=["mlflow"]` for trackers, `enabled=False`.

    Returns:
        The recorder; a disabled one when tracing is turned off.

    Raises:
        SettingsError: an unknown setting or a bad value.
        AggregatorUnavailableError: no aggregator answered within `connect_timeout`; with `on_missing="warn"` a warning.
        AggregatorRefusedError: it answered and refused; with `on_missing="warn"` a warning.
    """
    from traceml import settings

    config = settings.load(**arguments)
    running = current_recorder()
    if config.enabled and running is not None and running.enabled and running.tracing:
        return running

    if not config.enabled:
        lifecycle.shutdown()

    return start(config)


def start(config: Config, *, wait: bool = True) -> Recorder:
    """Start a recorder with loaded settings, and tracking with it; see `init`.

    Args:
        config: the settings.
        wait: connect now; else the recorder's thread connects when it can.
    """
    if config.enabled and (config.backend or config.collectors):  # most jobs do without it
        with fail_open(_log, "track", "tracking could not be started"):
            from traceml.track.rank.capturing import follow_recorder

            follow_recorder()

    recorder = lifecycle.start(config, wait=wait)
    recorder.viewer = _show_run
    if recorder.enabled and config.frameworks and not (config.backend or config.collectors):
        with fail_open(_log, "track", "values that frameworks log are not captured"):
            from traceml.track.rank.framework_watch import watch_frameworks

            watch_frameworks(recorder)

    with fail_open(_log, "session", "child processes train untraced"):
        from traceml.session.children import watch_children

        watch_children(_start_in_child)

    return recorder


def start_for_script() -> None:
    """Start tracing for a script that does not call `init`; a failure is logged, and the script runs untraced."""
    with fail_open(_log, "session", "the script runs without tracing"):
        from traceml import settings

        config = settings.load(on_missing="warn")
        if config.enabled:
            start(config, wait=False)


def _start_in_child() -> None:
    """Start tracing in a child process that trains, with the settings of its parent."""
    from traceml import settings
    from traceml.recorder.identity import settings_of_parent

    config = settings.load(**{"on_missing": "warn", **settings_of_parent()})
    if config.enabled:
        start(config, wait=False)


def _show_run(run_dir: Path) -> None:
    from traceml.display.notebook import load_run

    load_run(run_dir).show()
