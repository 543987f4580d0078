"""Destinations set by trackers' own environment variables, kept with the run, so that every delivery uses them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from traceml.privacy import secrets_only

__all__ = ["moved_options", "place_options", "projects_in"]


def place_options(backend: str, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the options that variables of this process set in addition to the given ones.

    `traceml sync` in another shell would otherwise write elsewhere, or online what was logged offline.

    Args:
        environ: the variables; those that hold a secret are left out, as the store keeps none.
    """
    from traceml.track.plugins.plugin_registry import backend_metadata

    metadata = backend_metadata(backend)
    return metadata.environment_options(options, environ, _is_no_secret) if metadata is not None else {}


def projects_in(backends: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the projects that trackers' variables name, by tracker, for where the user has named none."""
    from traceml.track.plugins.plugin_registry import backend_metadata

    found: dict[str, str] = {}
    for backend in backends:
        metadata = backend_metadata(backend)
        value = environ.get(metadata.project_variable or "", "") if metadata is not None else ""
        if value and _is_no_secret(value):
            found[backend] = value

    return found


def moved_options(backend: str, announced: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options of a run changed to the destination that this process names; None if nothing changes."""
    from traceml.track.plugins.plugin_registry import backend_metadata

    metadata = backend_metadata(backend)
    names = metadata.option_variables if metadata is not None else ()
    here = {name: value for name, value in {**own, **place_options(backend, own)}.items() if name in names}
    if all(announced.get(name) == value for name, value in here.items()):
        return None

    return {**{name: value for name, value in announced.items() if name not in names}, **own, **here}


def _is_no_secret(value: str) -> bool:
    return secrets_only().mask_text(value) == value
