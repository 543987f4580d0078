"""Probe of one backend without delivering anything: its library, its target, and whether that responds.

`python -m traceml.track.delivery.probe BACKEND RUN_DIR` reads the backend's options as JSON from standard input and
prints the result as JSON. It is a process of its own with that backend's environment alone, as a delivery is.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from traceml.errors import PluginError
from traceml.formatting import left_text, ms_text
from traceml.helper_programs import helper_program, search_working_directory
from traceml.ids import DEFAULT_PROJECT
from traceml.track.delivery.credentials import environment_for, read_key_file
from traceml.track.filters import backend_options
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import create_backend, load

__all__ = ["ProbeResult", "main", "probe"]

_RESPONSE_S = 3.0
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Result of a probe."""

    versions: dict[str, str]  # versions of its libraries
    missing: str = ""  # what is missing and the command that installs it; empty if nothing is missing
    target: str = ""  # address or path of the tracker, without credentials
    is_local: bool = False  # whether that is on this machine
    reaches: bool | None = None  # whether the target responds or can be written; None if that is unknown
    answer: str = ""  # details of the response, or why there is none
    error: str = ""  # why the backend cannot be used


def probe(backend: str, options: Mapping[str, Any], run_dir: Path) -> ProbeResult:
    """Probe a backend in a process of its own.

    Args:
        backend: a name or an import path.
        run_dir: a folder for a run; it need not exist.
    """
    try:
        done = subprocess.run(
            helper_program("traceml.track.delivery.probe", backend, str(run_dir)),
            input=json.dumps(dict(options)),
            env=environment_for(backend, options),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProbeResult({}, error=f"it did not respond within {left_text(_TIMEOUT_S)}")

    with contextlib.suppress(ValueError, IndexError, TypeError):
        return ProbeResult(**json.loads(done.stdout.splitlines()[-1]))

    lines = done.stderr.strip().splitlines()
    return ProbeResult({}, error=lines[-1] if lines else f"its process ended with {done.returncode}")


def main() -> None:
    """Probe the backend that the command line names, and print the result."""
    backend, run_dir = sys.argv[1], sys.argv[2]
    search_working_directory()
    out = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the result
    result = _probe(backend, json.loads(sys.stdin.read() or "{}"), Path(run_dir))
    os.write(out, (json.dumps(asdict(result)) + "\n").encode())


def _probe(backend: str, options: dict[str, Any], run_dir: Path) -> ProbeResult:
    versions: dict[str, str] = {}
    try:
        plugin = load(PluginType.BACKEND, backend)
        about = plugin.get_metadata()
        if missing := about.missing():
            return ProbeResult({}, missing=missing)

        for module in about.dependencies:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[module] = metadata.version(module)

        if key_file := options.get("api_key_file"):
            os.environ.update(read_key_file(backend, Path(str(key_file))))

        experiment: dict[str, Any] = {
            "id": "doctor",
            "name": "doctor",
            "project": DEFAULT_PROJECT,
            "tags": {},
            "parent": None,
            "params": {},
        }
        config = {"options": backend_options(options), "run_id": run_dir.name, "run_dir": str(run_dir),
                  "experiment": experiment, "continue_run": None, "local_only": False}  # fmt: skip
        with contextlib.ExitStack() as ends:
            created = create_backend(backend, config, on_end=ends.callback)
    except (PluginError, ImportError) as error:
        return ProbeResult(versions, error=str(error))
    except Exception as error:  # noqa: BLE001 - a library may raise anything while it is imported
        return ProbeResult(versions, error=f"{type(error).__name__}: {error}")

    reaches, answer = _check_target(created.target)
    return ProbeResult(versions, target=created.target, is_local=created.is_local, reaches=reaches, answer=answer)


def _check_target(target: str) -> tuple[bool | None, str]:
    """Return whether a target can be reached, and details."""
    parts = urlsplit(target)
    if parts.scheme in {"http", "https"}:
        return _check_http(target)
    if parts.scheme and parts.hostname and parts.port:
        return _check_port(parts.hostname, parts.port)
    if target.startswith("/"):
        return _check_folder(Path(target))

    return None, ""


def _check_http(url: str) -> tuple[bool, str]:
    began_s = time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=_RESPONSE_S) as answer:  # noqa: S310 - http or https, see the caller
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code  # it responds, with whatever status
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return False, f"does not respond: {reason}"

    return status < 500, f"responds ({status}) in {ms_text(1e3 * (time.monotonic() - began_s))}"


def _check_port(host: str, port: int) -> tuple[bool, str]:
    began_s = time.monotonic()
    try:
        socket.create_connection((host, port), _RESPONSE_S).close()
    except OSError as error:
        return False, f"does not respond: {error.strerror or error}"

    return True, f"responds in {ms_text(1e3 * (time.monotonic() - began_s))}"


def _check_folder(path: Path) -> tuple[bool, str]:
    existing = next(each for each in (path, *path.parents) if each.exists())
    if os.access(existing, os.W_OK):
        return True, "can be written"

    return False, f"cannot be written: check the permissions of {existing}"


if __name__ == "__main__":
    main()
