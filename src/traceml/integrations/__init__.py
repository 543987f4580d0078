"""Adapters for training frameworks: one added line traces a training and shows its verdict.

Runs in the training process (`ray.trace` also in Ray's driver). Imports `session`, `runs`, `track` and `recorder`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `traceml`: this module is imported by scripts, and adds nothing to their start
if TYPE_CHECKING:
    from types import ModuleType

_MODULES = ("accelerate", "huggingface", "lightning", "ray")


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module(f"{__name__}.{name}")
