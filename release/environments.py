"""Empty environments, made by uv: it unpacks a package once and links it into each, so six with CUDA fit on a disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BrokenEnvironmentError", "Environment", "checked", "find_python", "uv_environ"]

_INSTALL_TIMEOUT_S = 1800.0
_UV = (sys.executable, "-m", "uv", "--no-progress")


class BrokenEnvironmentError(Exception):
    """A command in an environment failed; the message has the command, its status and its last lines."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees nothing of this one.

    Attributes:
        folder: its place.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path, python: str) -> Environment:
        """Make an environment of an interpreter, in place of what is there.

        Raises:
            BrokenEnvironmentError: uv cannot.
        """
        shutil.rmtree(folder, ignore_errors=True)
        checked([*_UV, "venv", "--no-project", "--python", python, str(folder)], environ=uv_environ())
        return cls(folder)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def install(self, *words: str) -> None:
        """Install requirements or files, with options of `uv pip install`.

        Raises:
            BrokenEnvironmentError: they cannot be installed.
        """
        checked([*_UV, "pip", "install", "--python", str(self.python), *words], environ=uv_environ())

    def run(
        self, *command: str, cwd: Path, environ: Mapping[str, str] | None = None, timeout_s: float = 240.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment; a timeout ends it with status 124."""
        variables = self.environ() | dict(environ or {})
        program = self.folder / "bin" / command[0]
        try:
            return subprocess.run(
                [str(program), *command[1:]], cwd=cwd, env=variables, capture_output=True, text=True, check=False,
                timeout=timeout_s, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as expired:
            said = expired.stderr or b""
            text = said.decode(errors="replace") if isinstance(said, bytes) else said
            return subprocess.CompletedProcess(list(command), 124, "", f"{text}\nnot ended after {timeout_s:.0f} s")

    def environ(self) -> dict[str, str]:
        """Return the variables of its processes: ours, without what would lead out of the environment."""
        out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP", "MAKEFLAGS")
        kept = {name: value for name, value in os.environ.items() if name not in out and "TRACEML" not in name}
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", os.defpath)])
        return kept | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"}


def checked(command: list[str], *, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command, and return what it printed.

    Raises:
        BrokenEnvironmentError: it failed.
    """
    done = subprocess.run(
        command, env=environ, cwd=cwd, capture_output=True, text=True, check=False, timeout=_INSTALL_TIMEOUT_S
    )
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BrokenEnvironmentError(f"{' '.join(command)} ended with status {done.returncode}:\n{said}")

    return done.stdout


def uv_environ() -> dict[str, str]:
    """Return the variables for uv: it does not read pip's, which name places of packages and of certificates."""
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    for theirs, ours in (("PIP_FIND_LINKS", "UV_FIND_LINKS"), ("PIP_INDEX_URL", "UV_INDEX_URL")):
        if theirs in environ:
            environ.setdefault(ours, environ[theirs])

    if "PIP_CERT" in environ:
        environ.setdefault("SSL_CERT_FILE", environ["PIP_CERT"])

    return environ


def find_python(version: str) -> str | None:
    """Return an interpreter of a version, as "3.12": from PATH, or from pyenv's folder."""
    found = [shutil.which(f"python{version}")]
    found += [str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))]
    return next((path for path in found if path and _answers(path)), None)


def _answers(path: str) -> bool:
    """Return whether an interpreter starts; a shim of pyenv may stand for a version that is not chosen."""
    command = [path, "-c", "import ensurepip, venv"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
