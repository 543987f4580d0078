"""Looks at one backend without delivering anything: is its library there, where would it deliver, does that answer.

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
from traceml.track.delivery.credentials import environment_for, read_key_file
from traceml.track.filters import backend_options
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import create_backend, load

__all__ = ["ProbeResult", "main", "probe"]

_ANSWER_S = 3.0
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What is known of a backend.

    Attributes:
        versions: of its libraries.
        missing: the command that installs what is not there; empty where nothing is missing.
        target: where it would deliver, without credentials.
        is_local: whether that is on this machine.
        reaches: whether the target answers, or can be written; None where that cannot be told.
        answer: how it answers, or why it does not.
        error: why the backend cannot be used.
    """

    versions: dict[str, str]
    missing: str = ""
    target: str = ""
    is_local: bool = False
    reaches: bool | None = None
    answer: str = ""
    error: str = ""


def probe(backend: str, options: Mapping[str, Any], run_dir: Path) -> ProbeResult:
    """Look at a backend, in a process of its own.

    Args:
        backend: a name or an import path.
        options: as in the settings.
        run_dir: a folder in which a run could be.
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "traceml.track.delivery.probe", backend, str(run_dir)],
            input=json.dumps(dict(options)),
            env=environment_for(backend, options),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProbeResult({}, error=f"it did not answer within {_TIMEOUT_S:.0f} s")

    with contextlib.suppress(ValueError, IndexError, TypeError):
        return ProbeResult(**json.loads(asked.stdout.splitlines()[-1]))

    said = asked.stderr.strip().splitlines()
    return ProbeResult({}, error=said[-1] if said else f"its process ended with {asked.returncode}")


def main() -> None:
    """Look at the backend that the command line names, and print what was found."""
    backend, run_dir = sys.argv[1], sys.argv[2]
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not come between
    found = _look(backend, json.loads(sys.stdin.read() or "{}"), Path(run_dir))
    os.write(out, (json.dumps(asdict(found)) + "\n").encode())


def _look(backend: str, options: dict[str, Any], run_dir: Path) -> ProbeResult:
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
            "project": "default",
            "tags": {},
            "parent": None,
            "params": {},
        }
        config = {"options": backend_options(options), "run_id": run_dir.name, "run_dir": str(run_dir),
                  "experiment": experiment, "continue_run": None, "local_only": False}  # fmt: skip
        made = create_backend(backend, config)
    except (PluginError, ImportError) as error:
        return ProbeResult(versions, error=str(error))
    except Exception as error:  # noqa: BLE001 - a library may raise anything while it is imported
        return ProbeResult(versions, error=f"{type(error).__name__}: {error}")

    reaches, answer = _answers(made.target)
    return ProbeResult(versions, target=made.target, is_local=made.is_local, reaches=reaches, answer=answer)


def _answers(target: str) -> tuple[bool | None, str]:
    """Return whether a target can be reached, and in words how."""
    parts = urlsplit(target)
    if parts.scheme in {"http", "https"}:
        return _http_answers(target)
    if parts.scheme and parts.hostname and parts.port:
        return _port_answers(parts.hostname, parts.port)
    if target.startswith("/"):
        return _can_be_written(Path(target))

    return None, ""


def _http_answers(url: str) -> tuple[bool, str]:
    began_s = time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:  # noqa: S310 - http or https, as was seen
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code  # it answers: what this page needs is another question
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return False, f"does not answer: {reason}"

    return status < 500, f"answers ({status}) in {1e3 * (time.monotonic() - began_s):.0f} ms"


def _port_answers(host: str, port: int) -> tuple[bool, str]:
    began_s = time.monotonic()
    try:
        socket.create_connection((host, port), _ANSWER_S).close()
    except OSError as error:
        return False, f"does not answer: {error.strerror or error}"

    return True, f"answers in {1e3 * (time.monotonic() - began_s):.0f} ms"


def _can_be_written(path: Path) -> tuple[bool, str]:
    there = next(each for each in (path, *path.parents) if each.exists())
    if os.access(there, os.W_OK):
        return True, "can be written"

    return False, f"cannot be written: see the rights of {there}"


if __name__ == "__main__":
    main()
