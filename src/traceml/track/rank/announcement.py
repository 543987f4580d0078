"""Announcement of an experiment to delivery: its trackers, their options, and the settings in force.

It has no secrets, but for values that the class of a backend uses which a script defines.

Functions import the registry of plugins when they need it: a script that only logs values does not pay its 13 ms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from traceml import settings
from traceml.errors import PluginError, UsageError
from traceml.fail_open import warn_once
from traceml.inspection.user_files import working_folder
from traceml.installation import install_command, unsupported
from traceml.privacy import secrets_only
from traceml.track.rank.tracker_places import place_options, projects_in
from traceml.track.wandb_sweep import variables
from traceml.trusted_files import cache_home

if TYPE_CHECKING:
    from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = [
    "PER_EXPERIMENT",
    "ChosenTrackers",
    "announcement",
    "check_backend",
    "check_backends",
    "check_options",
    "choose_trackers",
    "refuse_secrets",
    "storable_trackers",
]

PER_EXPERIMENT = frozenset({
    "backend", "backend_options", "backoff_factor", "collectors", "exclude", "frameworks", "include", "local_only",
    "mask", "max_backoff", "max_retries", "metrics_interval", "project", "run_name", "track_env", "track_git",
    "track_system",
})  # fmt: skip
"""Settings that may differ from experiment to experiment; the others are taken when recording starts."""


def announcement(
    config: settings.Config,
    backends: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    project: str | None = None,
) -> dict[str, Any]:
    """Return the part of an experiment's row about its trackers and the settings in force.

    Args:
        project: the one that the experiment names, over that of the settings.

    Raises:
        UsageError: an option holds a secret.
    """
    from traceml.track.filters import delivery_settings
    from traceml.track.plugins.plugin_registry import sent_backends
    from traceml.track.plugins.plugin_signature import sign

    refuse_secrets(options)
    is_named = project is not None or config.sources.get("project", "default") != "default"
    row: dict[str, Any] = {
        "project": project or config.project,
        "projects": {} if is_named else projects_in({*backends, *_fallbacks(options, backends)}),
        "backends": list(backends),
        "options": _with_environment(_with_places(options, backends), backends),
        **delivery_settings(config),
        "registered": sent_backends({*backends, *_fallbacks(options, backends)}),
        "sys_path": [entry or working_folder() for entry in sys.path],
        "folder": working_folder(),
        "environ": variables(),
        "source": sys.argv[0] if sys.argv else "",
        "user": _user() if config.track_env else "",
    }
    signature = sign(row)
    if not signature:
        _warn_of_unsigned(row["registered"])

    return row | {"signature": signature}


def _warn_of_unsigned(registered: Mapping[str, str]) -> None:
    from traceml.track.plugins.plugin_registry import is_sent

    for name in (name for name, path in registered.items() if is_sent(path)):
        warn_once(
            f"unsigned {name}",
            "nothing is delivered to %s: its class is defined in the script, and no key that proves whose it is can be "
            "kept in %s. Set XDG_CACHE_HOME to a folder of yours, or move the class into a module", name, cache_home(),
        )  # fmt: skip


def _user() -> str:
    """Return the login name, as trackers' own clients send it; empty if the system knows none."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


@dataclass(frozen=True, slots=True)
class ChosenTrackers:
    """Trackers of an experiment."""

    backends: tuple[str, ...]
    options: dict[str, dict[str, Any]]
    where: str = ""  # where values go, in words, if nobody named a tracker; else empty

    def say(self) -> None:
        """Log once where values go, if nobody named a tracker."""
        if self.where:
            warn_once(
                "no backend",
                'no backend was named: values go %s. Name one by Experiment(backend="…") or TRACEML_BACKEND; '
                "backend=[] means no tracker.", self.where,
            )  # fmt: skip


def choose_trackers(
    config: settings.Config, named: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]]
) -> ChosenTrackers:
    """Return the trackers of an experiment and their options.

    Without a name these are the trackers of the settings, else MLflow where its library is installed. Its address is
    then an option, so that delivery uses it whatever its own environment says.

    Args:
        named: the trackers that the experiment names; none where empty, the default where None.
        options: the experiment's own options, over those of the settings.
    """
    configured = config.backend_options
    merged = {name: {**configured.get(name, {}), **options.get(name, {})} for name in {*configured, *options}}
    if named is not None or config.backend:
        return ChosenTrackers(tuple(config.backend if named is None else named), merged)
    if find_spec("mlflow") is None:
        return ChosenTrackers((), merged, "to the run's store alone")

    mlflow = merged.setdefault("mlflow", {})
    uri = str(mlflow.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or "local")
    if secrets_only().mask_text(uri) == uri:  # else only the environment may hold it
        mlflow["tracking_uri"] = uri

    return ChosenTrackers(("mlflow",), merged, _place_of(uri))


def _place_of(uri: str) -> str:
    """Return the words for an MLflow tracking URI, without credentials."""
    if uri == "local":
        return "to MLflow (installed), in the file mlflow.db next to the runs"

    kind = "server" if uri.startswith(("http:", "https:", "databricks")) else "store"
    return f"to the MLflow {kind} {secrets_only().mask_text(uri)}"


def check_backends(backends: Sequence[str], options: Mapping[str, Mapping[str, Any]], *, source: str = "") -> None:
    """Report wrong names, wrong options and missing libraries before the training starts.

    A missing library is only a warning: it may be installed where the aggregator runs. So are options under a name
    that no tracker has.

    Args:
        options: their options by name; also of trackers that are not used here.
        source: where the names were set, for the text about a wrong one that is passed over.

    Raises:
        PluginError: there is no such backend, or an option is wrong; the text lists what exists.
    """
    for backend in sorted(options.keys() - {*backends}):
        _warn_of_unknown(backend)

    for backend in backends:
        metadata = check_backend(backend, options.get(backend, {}), source=source)
        if metadata is not None and metadata.missing():
            warn_once(
                f"missing {backend}",
                "%s is not installed here: %s. What is logged is kept: install it, then run `traceml sync`.",
                backend, unsupported(backend) or install_command(backend),
            )  # fmt: skip


def check_backend(backend: str, given: Mapping[str, Any], *, source: str = "") -> PluginMetadata | None:
    """Check the name and the options of one tracker; return the metadata of a built-in one.

    Args:
        source: where the name was set, for the text about a wrong one that is passed over.

    Raises:
        PluginError: there is no such backend, or an option is wrong; the text lists what exists.
    """
    from traceml.track.plugins.plugin_metadata import PluginType
    from traceml.track.plugins.plugin_registry import check_name

    check_name(PluginType.BACKEND, backend, source=source)
    metadata = check_options(backend, given)
    if fallback := given.get("fallback"):
        check_name(PluginType.BACKEND, fallback)

    return metadata


def check_options(backend: str, given: Mapping[str, Any]) -> PluginMetadata | None:
    """Check the options of one tracker; return the metadata of a built-in one.

    Raises:
        PluginError: an option is wrong; the text lists what is allowed.
    """
    from traceml.track.filters import backend_options, check_delivery_options
    from traceml.track.plugins.plugin_metadata import PluginType
    from traceml.track.plugins.plugin_registry import BUILT_IN, backend_metadata

    check_delivery_options(given)
    metadata = backend_metadata(backend) if backend in BUILT_IN[PluginType.BACKEND] else None
    if metadata is not None:
        metadata.check_options(backend_options(given))

    return metadata


def _warn_of_unknown(backend: str) -> None:
    from traceml.track.plugins.plugin_metadata import PluginType
    from traceml.track.plugins.plugin_registry import check_name

    try:
        check_name(PluginType.BACKEND, backend)
    except PluginError as error:
        warn_once(f"options {backend}", "the options of %r are not used: %s", backend, error)


def refuse_secrets(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse options that would put a secret into the store.

    Raises:
        UsageError: an option looks like a secret; the text says where it belongs.
    """
    from traceml.track.plugins.plugin_registry import backend_metadata

    for backend, values in options.items():
        for key, value in values.items():
            # By its name, or by its look: an address with a password in it.
            if not key.endswith("_file") and secrets_only().mask_value(key, value) != value:
                metadata = backend_metadata(backend)
                variable = (metadata.key_variable if metadata is not None else None) or "the environment"
                raise UsageError(
                    f"option {key!r} of backend {backend!r} looks like a secret, which would be stored with the run. "
                    f"Put it into {variable}, or into a file of mode 0600 that `api_key_file` names"
                )


def storable_trackers(config: settings.Config) -> ChosenTrackers:
    """Return the trackers of the settings, without those whose options hold a secret; warn once of each of these.

    A training must not end because of a settings file, which may be meant for another script.
    """
    storable: dict[str, dict[str, Any]] = {}
    for backend, values in config.backend_options.items():
        try:
            refuse_secrets({backend: values})
        except UsageError as error:
            warn_once(
                f"secret {backend}",
                "nothing is delivered to %s: %s. What is logged is kept: after that, `traceml sync RUN --backend %s` "
                "delivers it", backend, error, backend,
            )  # fmt: skip
        else:
            storable[backend] = dict(values)

    refused = config.backend_options.keys() - storable.keys()
    for values in storable.values():
        if values.get("fallback") in refused:
            del values["fallback"]

    return ChosenTrackers(tuple(name for name in config.backend if name not in refused), storable)


def _fallbacks(options: Mapping[str, Mapping[str, Any]], backends: Sequence[str]) -> set[str]:
    return {str(options[name]["fallback"]) for name in backends if options.get(name, {}).get("fallback")}


def _with_places(options: Mapping[str, Mapping[str, Any]], backends: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Add the places that variables name, of trackers and their fallbacks; delivery may run in another environment."""
    trackers = {*backends, *_fallbacks(options, backends)}
    places = {name: place_options(name, options.get(name, {})) for name in trackers}
    named = [name for name in {*options, *places} if name in options or places[name]]
    return {name: {**options.get(name, {}), **places.get(name, {})} for name in named}


def _with_environment(options: dict[str, dict[str, Any]], backends: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Add the variables that a registered backend declares: the aggregator does not import a third party's class."""
    from traceml.track.filters import variables_of
    from traceml.track.plugins.plugin_metadata import PluginType
    from traceml.track.plugins.plugin_registry import BUILT_IN, backend_metadata

    for backend in set(backends) - BUILT_IN[PluginType.BACKEND].keys():
        metadata = backend_metadata(backend)
        if metadata is not None and metadata.environment:
            given = options.setdefault(backend, {})
            with suppress(PluginError):  # delivery reports it
                given["env"] = [*variables_of(given), *metadata.environment]

    return options
