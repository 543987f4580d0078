"""Build the native parts when the package is installed.

The library of traceml.traces makes reading traces fast: plain C for ctypes. The extension of traceml.instrument makes
tracing cheap: it uses Python's stable ABI, so one file serves Python 3.11 and later. Without a C compiler, or without
Python's headers, the package is installed without them and gives the same answers.
`make` installs again after a change of the sources.
"""

from __future__ import annotations

import compileall
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SCHEMA = Path("src", "traceml", "database", "schema.py")
_COMMON = ("-std=gnu11", "-shared", "-fPIC")


class Part(NamedTuple):
    """A library that is compiled beside its sources.

    Attributes:
        folder: of the sources, in the source tree.
        sources: the C files.
        library: the file to make.
        flags: for the compiler.
        loss: what is lost without it.
    """

    folder: Path
    sources: tuple[str, ...]
    library: str
    flags: tuple[str, ...]
    loss: str

    @property
    def path(self) -> Path:
        """The library in the source tree."""
        return self.folder / self.library


SCANNER = Part(
    Path("src", "traceml", "traces", "native"),
    ("scanner.c", "kernels.c"),
    "_native.so",
    ("-O3",),
    "reading traces is slower",
)
HOT_PATH = Part(
    Path("src", "traceml", "instrument", "native"),
    (
        "module.c",
        "hot_path.c",
        "hot_fields.c",
        "phases.c",
        "hook.c",
        "hook_type.c",
        "forward.c",
        "metrics.c",
        "callbacks.c",
        "alive.c",
    ),
    "_hot_path.abi3.so",
    ("-O2", "-fvisibility=hidden", "-fno-plt", "-DPy_LIMITED_API=0x030b0000", f"-I{sysconfig.get_path('include')}"),
    "each training step costs some microseconds more",
)


class NativeBuildHook(BuildHookInterface[Any]):
    """Compiles the native parts beside their sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the package is built; a wheel with native parts is for this platform only."""
        if self.target_name != "wheel":
            return

        if version == "editable":
            # pip writes the bytecode of copied modules only. With PYTHONDONTWRITEBYTECODE, every process would compile.
            compileall.compile_dir(Path(self.root, "src"), quiet=2)

        built = [part for part in (SCANNER, HOT_PATH) if self._is_built(part)]
        if not built:
            return

        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"] += [str(part.path) for part in built]
        build_data["pure_python"] = False
        build_data["tag"] = f"{'cp311-abi3' if HOT_PATH in built else 'py3-none'}-{platform}"

    def _is_built(self, part: Part) -> bool:
        try:
            build(Path(self.root), part)
        except BuildError as error:
            self.app.display_warning(f"{error}: {part.path} is not built, and {part.loss}")
            return False

        return True


class BuildError(Exception):
    """A part cannot be built."""


def build(root: Path, part: Part, flags: tuple[str, ...] = ()) -> Path:
    """Compile a part of a source tree; return its path.

    Args:
        root: of the source tree.
        part: the library to make.
        flags: more flags for the compiler.

    Raises:
        BuildError: there is no C compiler, or it failed.
    """
    if part is HOT_PATH and "t" in sys.abiflags:
        raise BuildError("free-threaded Python has no stable ABI")

    folder = root / part.folder
    compiler = shlex.split(os.environ.get("CC", "")) or _compiler()
    if not compiler:
        raise BuildError("no C compiler")

    if part is HOT_PATH:
        _write_header(root)

    unfinished = folder / f"{part.library}.{os.getpid()}"
    sources = [str(folder / source) for source in part.sources]
    command = [*compiler, *_COMMON, *part.flags, *flags, "-o", str(unfinished), *sources]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"the C compiler {compiler[0]} cannot be started ({error.strerror})") from error

    if result.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise BuildError(f"{shlex.join(command)} failed: {result.stderr.strip()}")

    return unfinished.replace(root / part.path)  # atomic: other processes may have the old one mapped


def _write_header(root: Path) -> None:
    """Write the numbers of phases, slots and columns that the hooks in C are compiled with."""
    layout = runpy.run_path(str(root / _SCHEMA), run_name="schema")["native_layout"]()
    text = (
        f"/* Generated from {_SCHEMA.name} by hatch_build.py. */\n"
        f"enum {{ {', '.join(layout.split())} }};\n"
        f'#define LAYOUT "{layout}"\n'
    )
    header = root / HOT_PATH.folder / "schema.h"
    if header.exists() and header.read_text() == text:
        return  # `make` compares its time

    unfinished = header.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(header)


def _compiler() -> list[str]:
    names = [sysconfig.get_config_var("CC") or "", "cc", "gcc", "clang"]
    return next((shlex.split(name) for name in names if name and shutil.which(shlex.split(name)[0])), [])
