"""`start_logging` and `stop_logging`, as in Tracelet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from traceml import settings
from traceml.errors import SettingsError, UsageError
from traceml.recorder.current_recorder import current_recorder
from traceml.recorder.lifecycle import in_fixed_folder
from traceml.setting_sources import setting_name
from traceml.track.rank.announcement import PER_EXPERIMENT, choose_trackers
from traceml.track.rank.experiment import Experiment, names_of, open_experiments

__all__ = ["start_logging", "stop_logging"]

# Tracelet's switches for a framework, and the framework.
_SWITCHES = {"track_tensorboard": "tensorboard", "track_lightning": "lightning"}
# Tracelet's settings that are arguments of `start_logging`.
_ARGUMENTS = ("experiment_name", "api_key", "backend_url")
_SOURCE = "start_logging(config=...)"
_started: Experiment | None = None


def start_logging(
    exp_name: str | None = None,
    project: str | None = None,
    backend: str | Sequence[str] | None = None,
    api_key: str | None = None,
    backend_url: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Experiment:
    """Begin an experiment that lasts until `stop_logging`, the next `start_logging`, or the end of the process.

    Examples:
        >>> experiment = traceml.start_logging("baseline", backend="jsonl")
        >>> traceml.log_metric("loss", 0.5)
        >>> traceml.stop_logging()

    Args:
        exp_name: name of the experiment.
        project: the project at the trackers.
        backend: the tracker or trackers.
        api_key: refused: keys come from the environment or a file, never from a script.
        backend_url: the tracker's address, or the path that it writes to.
        config: settings by name, also by Tracelet's names. Parameters belong to `log_params`.

    Raises:
        SettingsError: an unknown setting, a bad value, or one that cannot change while this process is recorded.
        UsageError: a key was given, or an address without a tracker; the text says what to do.
    """
    global _started
    given, arguments, base = _split(config or {})
    names = names_of(given.pop("backend", None)) if backend is None else names_of(backend)
    addressed = choose_trackers(base, names, {}).backends
    _refuse_key(addressed, api_key if api_key is not None else arguments.get("api_key"))
    url = backend_url if backend_url is not None else arguments.get("backend_url")
    options = _address(addressed, str(url)) if url is not None else {}
    experiment = Experiment(
        exp_name or arguments.get("experiment_name"), project, names, options=options, settings=given
    )
    _stop_last()
    _started = experiment
    return experiment.start()


def stop_logging() -> None:
    """End every open experiment, the inner ones first.

    Examples:
        >>> traceml.stop_logging()
        >>> print(traceml.get_active_experiment())
        None
    """
    while open_experiments:
        open_experiments[-1].end()


def _stop_last() -> None:
    """End the experiment of the last `start_logging`, those inside it first."""
    while _started in open_experiments:
        open_experiments[-1].end()


def _split(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], settings.Config]:
    """Return the settings in a configuration, the arguments of `start_logging` in it, and the settings with it."""
    config = _by_name(config)
    arguments = {key: config[key] for key in _ARGUMENTS if config.get(key) is not None}
    given = {key: value for key, value in config.items() if key not in {*_ARGUMENTS, *_SWITCHES}}
    switches = {_SWITCHES[key]: bool(value) for key, value in config.items() if key in _SWITCHES}
    recorder = current_recorder()
    running = recorder.config if recorder is not None and recorder.enabled else None
    given = _changed_since(running) | given
    base = (running or settings.load()).over(**given)  # checks names and values
    if running is not None:
        _refuse_late(running, in_fixed_folder(base))

    if switches:
        kept = [name for name in base.frameworks if switches.get(name, True)]
        given["frameworks"] = [*kept, *(name for name, is_on in switches.items() if is_on and name not in kept)]

    return given, arguments, base


def _changed_since(running: settings.Config | None) -> dict[str, Any]:
    """Return what the environment and files say differently now: as in Tracelet, each start reads them again."""
    if running is None:
        return {}

    now = settings.load()
    return {
        name: getattr(now, name)
        for name in PER_EXPERIMENT
        if now.sources[name] != "default"
        and running.sources[name] != "argument"
        and getattr(now, name) != getattr(running, name)
    }


def _by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration by the settings' own names.

    Raises:
        SettingsError: neither Tracelet nor traceml knows a name, or two of them are of one setting.
    """
    known = {*settings.declarations(), *_SWITCHES, *_ARGUMENTS}
    spellings: dict[str, str] = {}
    for key in config:
        name = setting_name(key)
        if name not in known:
            near = get_close_matches(key, sorted(known), n=1)
            problem = "no such setting" + (f"; did you mean {near[0]!r}?" if near else "")
            allowed = f"{', '.join(sorted({*PER_EXPERIMENT, *_SWITCHES, *_ARGUMENTS}))}. Parameters go to log_params"
            raise SettingsError(str(key), problem, source=_SOURCE, allowed=allowed)

        if name in spellings:
            problem = f"sets the same as {spellings[name]!r}, which is set, too"
            raise SettingsError(key, problem, source=_SOURCE, allowed="one of the two")

        spellings[name] = key

    return {name: config[key] for name, key in spellings.items()}


def _refuse_late(running: settings.Config, wanted: settings.Config) -> None:
    """Refuse settings of the recorder itself that differ from those in force."""
    for name in settings.declarations().keys() - PER_EXPERIMENT:
        value = getattr(wanted, name)
        if value != getattr(running, name):
            problem = f"{value!r} comes too late: this process is recorded with {getattr(running, name)!r}"
            allowed = "the same value, or a call of traceml.shutdown() before"
            raise SettingsError(name, problem, source=_SOURCE, allowed=allowed)


def _refuse_key(names: Sequence[str], api_key: object) -> None:
    if api_key is None:
        return

    from traceml.track.plugins.plugin_registry import backend_metadata

    known = [metadata.key_variable for name in names if (metadata := backend_metadata(name)) is not None]
    variable = next(filter(None, known), "the tracker's own variable")
    raise UsageError(
        f"api_key: keys are not taken from scripts. Set {variable} in the environment, or name a file of mode 0600 "
        "by `api_key_file` under [tool.traceml.backends.<name>]"
    )


def _address(names: Sequence[str], url: str) -> dict[str, dict[str, Any]]:
    """Return the options that set a tracker's address."""
    from traceml.track.plugins.plugin_registry import known_backends

    addresses = {name: metadata.address_option for name, metadata in known_backends().items()}
    option = addresses.get(names[0]) if len(names) == 1 else None
    if option is None:
        able = ", ".join(name for name, address in addresses.items() if address)
        raise UsageError(f"backend_url goes with one backend of {able}, not with {', '.join(names) or 'none'}")

    return {names[0]: {option: url}}
