"""Which variables a delivery process gets to see, and keys from files.

A delivery process gets the environment of its aggregator without other backends' variables and without whatever sounds
like a secret, except its own. A key may rest in a file that only its owner can read; it is read when the process
starts, and a process starts anew for each probe, so a key that was changed is picked up.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from traceml.errors import PluginError
from traceml.privacy import is_secret_name, secrets_only

__all__ = ["environment_for", "key_variables", "read_key_file"]

# Per backend: what its library reads (patterns), and which variable a key alone goes into.
_OWN: dict[str, tuple[str, ...]] = {
    "mlflow": (
        "MLFLOW_*", "DATABRICKS_*", "AWS_*", "AZURE_*", "GOOGLE_*", "BOTO*", "S3_*", "REQUESTS_CA_BUNDLE",
    ),
    "wandb": ("WANDB_*",),
    "clearml": ("CLEARML_*", "TRAINS_*"),
    "aim": ("AIM_*", "__AIM_*"),
}  # fmt: skip
_SECRET_WORD = re.compile(
    r"(?:^|_)(?:KEYS?|TOKENS?|SECRETS?|PASS(?:WORD|WD|PHRASE)?|PWD|CREDENTIALS?|AUTH|COOKIE)(?:_|$)"
)
_KEY_VARIABLE = {"mlflow": "MLFLOW_TRACKING_TOKEN", "wandb": "WANDB_API_KEY", "clearml": "CLEARML_API_SECRET_KEY"}


def environment_for(
    backend: str, options: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment of a delivery process.

    Args:
        backend: its backend.
        options: of that backend; `env` names further variables (patterns) that it needs, and those of `fallback` pass
            too.
        environ: the environment to choose from; by default this process's.
    """
    environ = os.environ if environ is None else environ
    own = _own(backend, options)
    others = {pattern for name, patterns in _OWN.items() for pattern in patterns} - set(own)
    return {
        name: value
        for name, value in environ.items()
        if _any(own, name) or not (_any(others, name) or _sounds_secret(name) or _holds_secret(name, value))
    }


def key_variables(backend: str, options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the names of the set variables from which a backend takes credentials."""
    environ = os.environ if environ is None else environ
    own = _own(backend, options)
    return sorted(name for name, value in environ.items() if value and _any(own, name) and _sounds_secret(name))


def read_key_file(backend: str, path: Path) -> dict[str, str]:
    """Return the variables that a key file sets: lines of `NAME=value`, or the key alone.

    Raises:
        PluginError: it cannot be read, others may read it, or the backend takes no single key; the text says what to
            do and never what is in the file.
    """
    path = path.expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise PluginError(
                    f"api_key_file {path} of backend {backend!r} may be read by others (mode {mode:04o}): "
                    f"chmod 600 {path}"
                )

            lines = [line.strip() for line in file if line.strip() and not line.lstrip().startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise PluginError(f"api_key_file {path} of backend {backend!r} cannot be read: {why}") from error

    if all(_is_assignment(line) for line in lines):
        pairs = (line.removeprefix("export ").partition("=") for line in lines)
        return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}

    variable = _KEY_VARIABLE.get(backend)
    if len(lines) != 1 or variable is None:
        raise PluginError(f"api_key_file {path} of backend {backend!r}: write it as lines of NAME=value")

    return {variable: lines[0]}


def _own(backend: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    named = options.get("env") or ()
    both = (backend, str(options.get("fallback") or ""))
    return (*(each for name in both for each in _of(name)), *([named] if isinstance(named, str) else named))


def _of(backend: str) -> tuple[str, ...]:
    """Return the patterns of a backend's variables; of one that we do not know, those that begin with its name."""
    known = _OWN.get(backend)
    word = re.sub(r"[^A-Z0-9]+", "_", backend.upper())
    return known if known is not None else (f"{word}_*",) if backend and ":" not in backend else ()


def _any(patterns: Any, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sounds_secret(name: str) -> bool:
    """Whether a variable may hold a secret: in doubt it is kept back, as what a backend needs can be named."""
    if name in {"PWD", "OLDPWD"}:
        return False

    return is_secret_name(name) or _SECRET_WORD.search(name.upper()) is not None


def _holds_secret(name: str, value: str) -> bool:
    """Whether a variable's value looks like a secret, such as an address with a password in it; a proxy's is needed."""
    if name.lower().endswith("_proxy"):
        return False

    return secrets_only().mask_text(value) != value


def _is_assignment(line: str) -> bool:
    name, equals, _ = line.removeprefix("export ").partition("=")
    return bool(equals) and name.strip().isidentifier() and name.strip().isupper()
