"""Environment of the code (Python, packages, CUDA, command line, variables), and of the machine."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from traceml.formatting import shell_joined
from traceml.privacy import Masker
from traceml.setting_sources import ENV_PREFIX, INTERNAL_ENV, USER_ENV
from traceml.settings import declarations
from traceml.track.plugins.interfaces import CollectorInterface
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = ["EnvironmentCollector", "SystemCollector"]

# Variables that change what a training does; no others are read, and secrets among these are masked.
_VARIABLES = re.compile(
    r"(?:CUDA|NCCL|GLOO|UCX|TORCH|PYTORCH|OMP|MKL|OPENBLAS|NUMEXPR|HF|TRANSFORMERS|TOKENIZERS|PYTHON|XLA|ROCM|HIP|HSA"
    r"|NVIDIA|TRACEML|SLURM|LSB|PBS|SGE|MASTER|RAY|ACCELERATE|DEEPSPEED|PL|LIGHTNING)(?:_|(?<=PYTHON)).*"
    r"|PATH|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|CONDA_DEFAULT_ENV|CONDA_PREFIX"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK"
)


class EnvironmentCollector(CollectorInterface):
    """Reads versions, packages, the command line and the relevant variables.

    Args:
        config: `argv`, `executable`, `path` (sys.path) and `folder` of the training process, and the setting `mask`;
            where that is no parent of this process, also its `python` (version) and `environ` (None: not known).
    """

    metadata = PluginMetadata(name="environment", version="1", description="Python, packages, CUDA, command, variables")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def collect(self) -> list[Metric | dict[str, Any]]:
        """Return one map: python, torch, cuda, packages, command, folder, variables."""
        from traceml.version import __version__

        config = self._config
        path = [str(each) for each in config.get("path") or sys.path]
        # Masked as a list, where an option tells about the next argument; in joined text an argument may end anywhere.
        argv = Masker(config.get("mask") or ()).mask_value("command", [str(each) for each in config.get("argv") or ()])
        environ: Mapping[str, str] = config.get("environ", os.environ) or {}
        facts: dict[str, Any] = {
            "python": config.get("python") or platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": config.get("executable") or sys.executable,
            "traceml": __version__,
            "folder": config.get("folder") or "",
            "command": shell_joined(argv),
            "variables": {name: environ[name] for name in sorted(environ) if _is_relevant(name)},
            "packages": "\n".join(sorted(_packages(path), key=str.lower)),
        }
        facts |= _torch(path)
        return [facts]


class SystemCollector(CollectorInterface):
    """Reads the machine's hardware and system; every rank samples its load."""

    metadata = PluginMetadata(name="system", version="1", description="host, processor, memory, devices")

    def collect(self) -> list[Metric | dict[str, Any]]:
        """Return one map: host, os, kernel, machine, cpu, cores, memory_bytes, gpus, gpu_driver."""
        facts: dict[str, Any] = {
            "host": platform.node(),
            "os": _os_name(),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "cpu": _first(r"model name\s*:\s*(.+)", "/proc/cpuinfo") or platform.processor(),
            "cores": os.cpu_count() or 0,
            "memory_bytes": int(_first(r"MemTotal:\s*(\d+)", "/proc/meminfo") or 0) * 1024,
        }
        gpus = list(_gpus())
        if gpus:
            facts |= {
                "gpus": gpus,
                "gpu_driver": _first(r"Kernel Module\D+([\d.]+)", "/proc/driver/nvidia/version") or "",
            }

        return [facts]


def _is_relevant(name: str) -> bool:
    """Whether a variable may change the training; what our own processes pass on does not, nor do our secrets.

    A token of a few letters looks like none to the masker.
    """
    return (
        _VARIABLES.fullmatch(name) is not None
        and name not in {*INTERNAL_ENV, *USER_ENV}
        and name.upper() not in {f"{ENV_PREFIX}{key.upper()}" for key, each in declarations().items() if each.secret}
    )


def _packages(path: list[str]) -> Iterator[str]:
    """Yield `name==version` of the installed packages; of several versions the first, which is imported."""
    from importlib.metadata import distributions

    seen = set()
    for each in distributions(path=path):
        try:
            name, version = each.metadata["Name"], each.version
        except Exception:  # noqa: BLE001, S112 - one broken package must not hide the others
            continue

        if name and name.lower() not in seen:
            seen.add(name.lower())
            yield f"{name}=={version}"


def _torch(path: list[str]) -> dict[str, Any]:
    """Return torch's versions from its files: importing it takes seconds and hundreds of megabytes."""
    for folder in path:
        try:
            text = Path(folder, "torch", "version.py").read_text(encoding="utf-8")
        except OSError:
            continue

        found = dict(re.findall(r"^(__version__|cuda|hip)\b[^=\n]*= ['\"]([^'\"]+)['\"]", text, re.MULTILINE))
        return {"torch" if key == "__version__" else key: value for key, value in found.items()}

    return {}


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _gpus() -> Iterator[str]:
    for each in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        if model := _first(r"Model:\s*(.+)", str(each)):
            yield model


def _first(pattern: str, path: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None

    return match[1].strip() if match else None
