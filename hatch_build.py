"""Builds the native parts of traceml.traces when the package is installed: plain C without Python.h, for ctypes.

They make reading traces fast. Without a C compiler the package is installed without them and gives the same answers.
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

SOURCES = {"native.c": "_native.so", "stats.c": "_stats.so"}
FOLDER = Path("src", "traceml", "traces")
FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC"]


class NativeBuildHook(BuildHookInterface[Any]):
    """Compiles each source into a library beside it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the interface's
        """Compile before the package is put together; a wheel with libraries is one for this platform."""
        if self.target_name != "wheel":
            return

        built = [library for source, library in SOURCES.items() if self._compile(source, library)]
        build_data["artifacts"] += [str(FOLDER / library) for library in built]
        if built:
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"

    def _compile(self, source: str, library: str) -> bool:
        folder = Path(self.root) / FOLDER
        compiler = shlex.split(os.environ.get("CC", "")) or _found()
        if not compiler or not (folder / source).exists():
            self.app.display_warning(f"no C compiler: {source} is not built, and reading traces is slower without it")
            return False

        beside = folder / f"{library}.{os.getpid()}"
        command = [*compiler, *FLAGS, "-o", str(beside), str(folder / source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            self.app.display_warning(f"{shlex.join(command)} failed: {result.stderr.strip()}")
            beside.unlink(missing_ok=True)
            return False

        beside.replace(folder / library)  # at once: other processes may have the old one mapped
        return True


def _found() -> list[str]:
    names = [sysconfig.get_config_var("CC") or "", "cc", "gcc", "clang"]
    return next((shlex.split(name) for name in names if name and shutil.which(shlex.split(name)[0])), [])
