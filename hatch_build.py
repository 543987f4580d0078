"""Build the native library of traceml.traces when the package is installed: plain C without Python.h, for ctypes.

It makes reading traces fast. Without a C compiler the package is installed without it and gives the same answers.
`make` installs again after a change of the sources.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src", "traceml", "traces", "native")
SOURCES = ("scanner.c", "kernels.c")
LIBRARY = "_native.so"
FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC"]


class NativeBuildHook(BuildHookInterface[Any]):
    """Compiles the library beside its sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - part of the interface
        """Compile before the package is built; a wheel with the library is for this platform only."""
        if self.target_name != "wheel":
            return

        try:
            build(Path(self.root))
        except BuildError as error:
            self.app.display_warning(
                f"{error}: the native library is not built, and reading traces is slower without it"
            )
            return

        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(str(FOLDER / LIBRARY))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"


class BuildError(Exception):
    """The library cannot be built."""


def build(root: Path) -> Path:
    """Compile the library of a source tree; return its path.

    Raises:
        BuildError: there is no C compiler, or it failed.
    """
    folder = root / FOLDER
    compiler = shlex.split(os.environ.get("CC", "")) or _compiler()
    if not compiler:
        raise BuildError("no C compiler")

    unfinished = folder / f"{LIBRARY}.{os.getpid()}"
    command = [*compiler, *FLAGS, "-o", str(unfinished), *(str(folder / source) for source in SOURCES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise BuildError(f"{shlex.join(command)} failed: {result.stderr.strip()}")

    return unfinished.replace(folder / LIBRARY)  # atomic: other processes may have the old one mapped


def _compiler() -> list[str]:
    names = [sysconfig.get_config_var("CC") or "", "cc", "gcc", "clang"]
    return next((shlex.split(name) for name in names if name and shutil.which(shlex.split(name)[0])), [])
