"""Start of a traced training: the recorder, and tracking where the settings ask for it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.fail_open import fail_open
from traceml.fork_gate import fork_gate
from traceml.recorder import lifecycle
from traceml.recorder.current_recorder import current_recorder
from traceml.session.traceml_variable import is_switched_on

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Unpack

    from traceml.recorder.recorder import Recorder
    from traceml.session.init_arguments import InitArguments
    from traceml.settings import Config

__all__ = ["init", "load_forgiving", "start", "start_for_script", "start_held", "start_in_child"]

_log = logging.getLogger("traceml")

# Defaults with which one word suffices, and a missing aggregator does not end a training.
_FORGIVING: dict[str, Any] = {"local": True, "on_missing": "warn"}
# Settings of connecting itself: they have done their work when a rank is connected.
_FOR_CONNECTING = frozenset(("enabled", "token", "tls", "local", "on_missing", "connect_timeout"))


@fork_gate
def init(**arguments: Unpack[InitArguments]) -> Recorder:
    """Start tracing in this process: connect to the aggregator and start the recorder's thread.

    A second call, or one after a `log_*` call, keeps the running recorder, and warns of settings that come too late;
    `enabled=False` stops it. Settings of tracking count until something is logged, as under `traceml run`.
    Under `TRACEML=1` the arguments add to the settings, if it is called before the first optimizer is made.

    Examples:
        >>> traceml.init(local=True, run_name="baseline")

    Args:
        arguments: settings by name, over those of environment and files; `python -m traceml.settings` describes all.
            The most used: `local=True` starts an aggregator where none answers, `on_missing="warn"` trains on without
            one, `runs_dir`, `run_name`, `project`, `backend=["mlflow"]` for trackers, `quiet=True` prints neither the
            run's folder nor the verdict, `enabled=False`.

    Returns:
        The recorder; a disabled one when tracing is turned off.

    Raises:
        SettingsError: an unknown setting or a bad value.
        AggregatorUnavailableError: no aggregator answered within `connect_timeout`; with `on_missing="warn"` a warning.
        AggregatorRefusedError: it answered and refused; with `on_missing="warn"` a warning.
    """
    from traceml import settings

    config = load_forgiving(arguments) if is_switched_on() else settings.load(**arguments)
    running = current_recorder()
    if config.enabled and running is not None and running.enabled and not (running.is_deferred or running.is_child):
        _continue_with(running, config)
        if running.tracing:
            return running

    if not config.enabled or (running is not None and running.is_deferred):
        lifecycle.shutdown()

    return start(config)


def load_forgiving(arguments: Mapping[str, Any]) -> Config:
    """Load settings that start an aggregator where none runs, and train on without one, unless set otherwise.

    Raises:
        SettingsError: an unknown setting or a bad value.
    """
    from traceml import settings

    sources = settings.load(**arguments).sources
    unset = {name: value for name, value in _FORGIVING.items() if sources[name] == "default"}
    return settings.load(**unset | dict(arguments))


@fork_gate
def start(config: Config, *, wait: bool = True, defer_connect: bool = False) -> Recorder:
    """Start a recorder with loaded settings, and tracking with it; see `init`.

    Args:
        wait: connect now; else the recorder's thread connects when it can.
        defer_connect: connect only when this process trains or logs.
    """
    from traceml.recorder.run_notices import announce

    if config.enabled and (config.backend or config.collectors):  # most jobs do without it
        with fail_open(_log, "track", "tracking could not be started"):
            from traceml.track.rank.capture_lifecycle import follow_recorder

            follow_recorder()

    recorder = lifecycle.start(config, wait=wait, defer_connect=defer_connect, on_stored=announce)
    recorder.viewer = _show_run
    if not recorder.enabled:
        return recorder

    if config.frameworks and not (config.backend or config.collectors):
        with fail_open(_log, "track", "values that frameworks log are not captured"):
            from traceml.track.rank.capture_without_trackers import watch_frameworks

            watch_frameworks(recorder)

    with fail_open(_log, "session", "child processes train untraced"):
        from traceml.session.children import watch_children

        watch_children(start_in_child)

    if "ray" in sys.modules:
        with fail_open(_log, "session", "a worker that Ray ends counts as lost"):
            from traceml.session.task_workers import watch_ray_worker

            watch_ray_worker()

    return recorder


def start_for_script() -> None:
    """Start tracing for a script that does not call `init`; a failure is logged, and the script runs untraced."""
    with fail_open(_log, "session", "the script runs without tracing"):
        from traceml import settings
        from traceml.inspection.script_time import note_script

        note_script()
        config = settings.load(on_missing="warn")
        if config.enabled:
            start(config, wait=False)


def start_held() -> None:
    """Start a recorder that connects when this process trains: see `traceml.session.autostart`."""
    from traceml.session.children import at_training_setup

    config = load_forgiving({})
    if config.enabled:
        at_training_setup(_release)
        start(config, wait=False, defer_connect=True)


def _release() -> None:
    recorder = current_recorder()
    if recorder is not None:
        recorder.release()


def start_in_child() -> None:
    """Start tracing in a child process that trains, with the settings of its parent."""
    from traceml import settings
    from traceml.recorder.identity import settings_of_parent

    given = settings_of_parent()
    config = load_forgiving(given) if is_switched_on() else settings.load(**{"on_missing": "warn", **given})
    if config.enabled:
        start(config, wait=False)


def _continue_with(recorder: Recorder, wanted: Config) -> None:
    """Take the arguments that a running recorder still can, and warn of the others."""
    wanted, running = lifecycle.in_fixed_folder(wanted), recorder.config
    names = [name for name in wanted.sources if wanted.sources[name] == "argument" and name not in _FOR_CONNECTING]
    changed = {name: value for name in names if (value := getattr(wanted, name)) != getattr(running, name)}
    if not changed:
        return

    from traceml.track.rank.capture_lifecycle import adopt_settings

    adopted = adopt_settings(recorder, changed)
    ignored = [name for name in changed if name not in adopted]
    if ignored:
        ways = [f"set {', '.join(f'TRACEML_{name.upper()}' for name in ignored)}"]
        if not running.supervised:  # else a later recording of this process is of the same run
            ways.append("end this run by traceml.shutdown() first")

        _log.warning(
            "init(%s) was called too late: this process is recorded with other settings already. Call it before the "
            "training is set up and anything is logged, or %s.",
            ", ".join(ignored),
            ", or ".join(ways),
        )


def _show_run(run_dir: Path) -> None:
    from traceml.display.notebook import load_run

    load_run(run_dir).show()
