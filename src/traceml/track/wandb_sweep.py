"""Values from a W&B sweep agent: the parameters in its file, and the run to join."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traceml.privacy import secrets_only

__all__ = ["parameters", "variables"]

# Variables of the rank that delivery needs: its own environment may be that of a `traceml serve` started long before.
_FORWARDED = (
    "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE",
)  # fmt: skip


_log = logging.getLogger("traceml")


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that name the W&B run of this process; never a key."""
    given = {name: environ[name] for name in _FORWARDED if environ.get(name)}
    return {name: value for name, value in given.items() if secrets_only().mask_text(value) == value}


def parameters(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the parameters that the sweep chose; empty without one, or if its file cannot be read."""
    path = environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path or not environ.get("WANDB_SWEEP_ID"):
        return {}

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        return {}

    try:
        import yaml  # W&B needs it
    except ImportError:
        _log.warning("Experiment.config has no parameters of the sweep: pip install pyyaml")
        return {}

    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}

    given = loaded.items() if isinstance(loaded, dict) else ()
    return {str(name): each["value"] for name, each in given if isinstance(each, dict) and "value" in each}
