"""What an experiment's row tells the delivery: its trackers, their options, and the settings in force. No secrets."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from traceml import settings
from traceml.errors import UsageError
from traceml.track.wandb_sweep import variables

__all__ = ["ADDRESS_OPTIONS", "KEY_VARIABLES", "announcement", "check_backends", "default_backends", "refuse_secrets"]

_log = logging.getLogger("traceml")
# Where a tracker's key belongs, and its address; neither is a secret itself.
KEY_VARIABLES = {"wandb": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_TOKEN", "clearml": "CLEARML_API_SECRET_KEY"}
ADDRESS_OPTIONS = {
    "mlflow": "tracking_uri", "wandb": "base_url", "clearml": "api_host", "aim": "repo", "tensorboard": "log_dir",
    "jsonl": "path",
}  # fmt: skip
_SAID: set[str] = set()


def announcement(
    config: settings.Config, backends: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what an experiment's row says of its trackers and of the settings in force.

    Raises:
        UsageError: an option holds a secret.
    """
    from traceml.track.plugins.plugin_registry import PluginType, registered

    refuse_secrets(options)
    return {
        "backends": list(backends),
        "options": {name: dict(values) for name, values in options.items()},
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
    """Return the trackers of the settings, else MLflow where its library is installed; says so once."""
    if config.backend:
        return config.backend

    has_mlflow = find_spec("mlflow") is not None
    where = "to MLflow, which is installed" if has_mlflow else "to the run's store alone"
    if "backend" not in _SAID:
        _SAID.add("backend")
        _log.warning(
            'no backend was named: values go %s. Name one by Experiment(backend="…") or TRACEML_BACKEND.', where
        )

    return ("mlflow",) if has_mlflow else ()


def check_backends(backends: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Say before the training starts what would only turn out beside it: wrong names and options, missing libraries.

    A library may be there where the aggregator runs, so that one is missing is no error.

    Raises:
        PluginError: there is no such backend, or an option of one is wrong; the text has what there is.
    """
    from traceml.track.filters import DeliveryFilter, backend_options
    from traceml.track.plugins.plugin_registry import BUILT_IN, PluginType, check_name, check_options

    for backend in backends:
        given = options.get(backend, {})
        DeliveryFilter.of((), (), given)
        if fallback := given.get("fallback"):
            check_name(PluginType.BACKEND, str(fallback))

        built_in = BUILT_IN[PluginType.BACKEND].get(backend)
        if built_in is None:
            check_name(PluginType.BACKEND, backend)
            continue

        check_options(backend, backend_options(given))
        if backend != "jsonl" and backend not in _SAID and find_spec(backend) is None:
            _SAID.add(backend)
            _log.warning(
                "%s is not installed here: pip install 'traceml[%s]'. What is logged is kept, and `traceml sync` "
                "delivers it then.", backend, backend,
            )  # fmt: skip


def refuse_secrets(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse options that would put a secret into the store.

    Raises:
        UsageError: one looks like a secret; the text says where that belongs.
    """
    from traceml.privacy import secrets_only

    for backend, values in options.items():
        for key, value in values.items():
            # By its name, or by its look: an address with a password in it.
            if not key.endswith("_file") and secrets_only().mask_value(key, value) != value:
                variable = KEY_VARIABLES.get(backend, "the environment")
                raise UsageError(
                    f"option {key!r} of backend {backend!r} looks like a secret, which would be stored with the run. "
                    f"Put it into {variable}, or into a file of mode 0600 that `api_key_file` names"
                )
