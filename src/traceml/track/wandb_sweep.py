"""Values from a W&B sweep agent: the parameters in its file, and the run to join."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from traceml.privacy import secrets_only

__all__ = ["parameters", "variables"]

# Variables of the rank that delivery needs: its own environment may be that of a `traceml serve` started long before.
_FORWARDED = (
    "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE",
)  # fmt: skip


_log = logging.getLogger("traceml")


def variables(environ: dict[str, str] | None = None) -> dict[str, str]:
    """Return the variables that name the W&B run of this process; never a key."""
    environ = dict(os.environ) if environ is None else environ
    given = {name: environ[name] for name in _FORWARDED if environ.get(name)}
    return {name: value for name, value in given.items() if secrets_only().mask_text(value) == value}


def parameters(environ: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the parameters that the sweep chose; empty without a sweep, or when its file cannot be read."""
    environ = dict(os.environ) if environ is None else environ
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
        return _values(text)

    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}

    given = loaded.items() if isinstance(loaded, dict) else ()
    return {str(name): each["value"] for name, each in given if isinstance(each, dict) and "value" in each}


def _values(text: str) -> dict[str, Any]:
    """Parse the form that the agent writes: `name:` followed by an indented `value: …` (YAML, one line each)."""
    found: dict[str, Any] = {}
    left_out: set[str] = set()
    name = ""
    for line in text.splitlines():
        key, separator, value = line.strip().partition(":")
        if not separator or line.lstrip().startswith("#"):
            continue

        if not line.startswith((" ", "\t")):
            name = key.strip("'\"")
        elif key == "value" and value.strip():
            found[name] = _scalar(value.strip())
        elif key == "value":
            left_out.add(name)

    if left_out:
        _log.warning("Experiment.config has no %s of the sweep: pip install pyyaml", ", ".join(sorted(left_out)))

    return found


def _scalar(text: str) -> Any:
    words = {"true": True, "false": False, "null": None, "~": None, ".nan": float("nan"), ".inf": float("inf")}
    if text.lower() in words:
        return words[text.lower()]

    try:
        return json.loads(text)
    except ValueError:
        pass

    try:
        return float(text)
    except ValueError:
        return text.strip("'\"")
