"""Places that trackers' own variables name: options of the built-in backends, so that every delivery uses them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from traceml.privacy import secrets_only

__all__ = ["moved_options", "place_options"]

# Options by backend, each with its variables, the first that is set.
_VARIABLES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "clearml": {"api_host": ("CLEARML_API_HOST",)},
    "mlflow": {"tracking_uri": ("MLFLOW_TRACKING_URI",)},
    "trackio": {"server_url": ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"), "dir": ("TRACKIO_DIR",)},
    "wandb": {"base_url": ("WANDB_BASE_URL",), "entity": ("WANDB_ENTITY",)},
}


def place_options(backend: str, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the options that variables of this process set in addition to the given ones.

    `traceml sync` in another shell would otherwise write elsewhere, or online what was logged offline.

    Args:
        environ: the variables; those that hold a secret are left out, as the store keeps none.
    """
    if backend == "trackio" and (options.get("dir") or options.get("server_url")):
        return {}  # either of them is the whole place

    found: dict[str, Any] = {}
    for option, variables in _VARIABLES.get(backend, {}).items():
        value = next(filter(None, map(environ.get, variables)), "")
        if value and not options.get(option) and secrets_only().mask_text(value) == value:
            found[option] = value

    if (mode := _mode(backend, environ)) and not options.get("mode"):
        found["mode"] = mode

    if "server_url" in found:
        found.pop("dir", None)

    return found


def moved_options(backend: str, announced: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options of a run for another place; None where its own names the same, or none is named."""
    names = {*_VARIABLES.get(backend, ()), "mode"}
    here = {name: value for name, value in {**own, **place_options(backend, own)}.items() if name in names}
    if all(announced.get(name) == value for name, value in here.items()):
        return None

    return {**{name: value for name, value in announced.items() if name not in names}, **own, **here}


def _mode(backend: str, environ: Mapping[str, str]) -> str:
    """Return the mode that the variables set; empty where they set none."""
    if backend == "wandb" and (mode := environ.get("WANDB_MODE", "")) in {"online", "offline"}:
        return mode

    is_offline = backend == "clearml" and environ.get("CLEARML_OFFLINE_MODE", "0") not in {"", "0"}
    return "offline" if is_offline else ""
