"""Environment of a delivery process, and keys from files.

A delivery process gets the environment of its aggregator without the variables of other trackers and without variables
that look like a secret, except its own. A key may be in a file that only its owner can read. It is read when the
process starts, and each probe of a failing tracker is a new process, so a changed key is picked up.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traceml.errors import PluginError
from traceml.privacy import is_secret_name, secrets_only
from traceml.track.filters import matches, variables_of
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import backend_metadata, known_backends, load

__all__ = ["environment_for", "key_variables", "read_key_file"]

_SECRET_WORD = re.compile(
    r"(?:^|_)(?:KEYS?|TOKENS?|SECRETS?|PASS(?:WORD|WD|PHRASE)?|PWD|CREDENTIALS?|AUTH|COOKIE)(?:_|$)"
)


def environment_for(
    backend: str, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the environment of a delivery process.

    Args:
        options: of the backend; `env` names further variables (patterns) that it needs, and the variables of its
            `fallback` are included.
        environ: the environment to choose from.

    Raises:
        PluginError: the option `env` is invalid.
    """
    own = _own_patterns(backend, options)
    others = {pattern for metadata in known_backends().values() for pattern in metadata.environment or ()} - set(own)
    return {
        name: value
        for name, value in environ.items()
        if matches(own, name) or not (matches(others, name) or _is_secret(name) or _holds_secret(name, value))
    }


def key_variables(backend: str, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of the set variables from which a backend takes credentials."""
    own = _own_patterns(backend, options)
    return sorted(name for name, value in environ.items() if value and matches(own, name) and _is_secret(name))


def read_key_file(backend: str, path: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that a key file sets: lines of `NAME=value`, or the key alone.

    Args:
        known: backends registered in another process.

    Raises:
        PluginError: the file cannot be read, others may read it, or the backend accepts no key alone; the text says
            what to do and never what the file contains.
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
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise PluginError(f"api_key_file {path} of backend {backend!r} cannot be read: {why}") from error

    if all(_is_assignment(line) for line in lines):
        pairs = (line.removeprefix("export ").partition("=") for line in lines)
        return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}

    metadata = backend_metadata(backend) or load(PluginType.BACKEND, backend, known).get_metadata()
    if len(lines) != 1 or metadata.key_variable is None:
        raise PluginError(f"api_key_file {path} of backend {backend!r}: write it as lines of NAME=value")

    return {metadata.key_variable: lines[0]}


def _own_patterns(backend: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    fallback = str(options.get("fallback") or "")
    return (*_patterns_of(backend), *_patterns_of(fallback), *variables_of(options))


def _patterns_of(backend: str) -> tuple[str, ...]:
    """Return the patterns of a backend's variables; without metadata, of those that begin with its name."""
    metadata = backend_metadata(backend)
    if metadata is not None and metadata.environment is not None:
        return metadata.environment

    word = re.sub(r"[^A-Z0-9]+", "_", backend.upper())
    return (f"{word}_*",) if backend and ":" not in backend else ()


def _is_secret(name: str) -> bool:
    """Whether a variable may hold a secret; in doubt yes, since a backend can name the variables that it needs."""
    if name in {"PWD", "OLDPWD"}:
        return False

    return is_secret_name(name) or _SECRET_WORD.search(name.upper()) is not None


def _holds_secret(name: str, value: str) -> bool:
    """Whether a value looks like a secret, such as an address with a password in it; a proxy's address is needed."""
    if name.lower().endswith("_proxy"):
        return False

    return secrets_only().mask_text(value) != value


def _is_assignment(line: str) -> bool:
    name, equals, _ = line.removeprefix("export ").partition("=")
    return bool(equals) and name.strip().isidentifier() and name.strip().isupper()
