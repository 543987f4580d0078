"""Announcement of an experiment to delivery: its trackers, their options, and the settings in force. No secrets.

Functions import the registry of plugins when they need it: a script that only logs values does not pay its 13 ms.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from traceml import settings
from traceml.errors import UsageError
from traceml.privacy import secrets_only
from traceml.track.wandb_sweep import variables

__all__ = ["announcement", "check_backends", "default_backends", "refuse_secrets"]

_log = logging.getLogger("traceml")
_warned: set[str] = set()


def announcement(
    config: settings.Config, backends: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the part of an experiment's row about its trackers and the settings in force.

    Raises:
        UsageError: an option holds a secret.
    """
    from traceml.track.plugins.plugin_metadata import PluginType
    from traceml.track.plugins.plugin_registry import registered

    refuse_secrets(options)
    return {
        "backends": list(backends),
        "options": _with_environment({name: dict(values) for name, values in options.items()}, backends),
        "include": list(config.include),
        "exclude": list(config.exclude),
        "mask": list(config.mask),
        "local_only": config.local_only,
        "metrics_interval": config.metrics_interval,
        "track_system": config.track_system,
        "max_retries": config.max_retries,
        "backoff_factor": config.backoff_factor,
        "max_backoff": config.max_backoff,
        "registered": registered(PluginType.BACKEND),
        "sys_path": [entry or str(Path.cwd()) for entry in sys.path],
        "folder": str(Path.cwd()),
        "environ": variables(),
    }


def default_backends(config: settings.Config) -> tuple[str, ...]:
    """Return the trackers of the settings, else MLflow where its library is installed; warns once about the choice."""
    if config.backend:
        return config.backend

    has_mlflow = find_spec("mlflow") is not None
    where = "to MLflow, which is installed" if has_mlflow else "to the run's store alone"
    if "backend" not in _warned:
        _warned.add("backend")
        _log.warning(
            'no backend was named: values go %s. Name one by Experiment(backend="…") or TRACEML_BACKEND.', where
        )

    return ("mlflow",) if has_mlflow else ()


def check_backends(backends: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Report wrong names, wrong options and missing libraries before the training starts.

    A missing library is only a warning: it may be installed where the aggregator runs.

    Raises:
        PluginError: there is no such backend, or an option is wrong; the text lists what exists.
    """
    from traceml.track.filters import DeliveryFilter, backend_options
    from traceml.track.plugins.plugin_metadata import PluginType
    from traceml.track.plugins.plugin_registry import BUILT_IN, backend_metadata, check_name

    for backend in backends:
        given = options.get(backend, {})
        DeliveryFilter.of((), (), given)
        if fallback := given.get("fallback"):
            check_name(PluginType.BACKEND, str(fallback))

        check_name(PluginType.BACKEND, backend)
        metadata = backend_metadata(backend) if backend in BUILT_IN[PluginType.BACKEND] else None
        if metadata is None:
            continue

        metadata.check_options(backend_options(given))
        if backend not in _warned and metadata.missing():
            _warned.add(backend)
            _log.warning(
                "%s is not installed here: pip install 'traceml[%s]'. What is logged is kept, and `traceml sync` "
                "delivers it then.", backend, backend,
            )  # fmt: skip


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


def _with_environment(options: dict[str, dict[str, Any]], backends: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Add the variables that a registered backend declares: the aggregator does not import a third party's class."""
    from traceml.track.plugins.plugin_metadata import PluginType
    from traceml.track.plugins.plugin_registry import BUILT_IN, backend_metadata

    for backend in set(backends) - BUILT_IN[PluginType.BACKEND].keys():
        metadata = backend_metadata(backend)
        if metadata is not None and metadata.environment:
            given = options.setdefault(backend, {})
            named = given.get("env") or ()
            given["env"] = [*([named] if isinstance(named, str) else named), *metadata.environment]

    return options
