"""Containers inside objects of libraries that a script may fill step by step: hooks, parameter groups, figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

__all__ = ["FIGURES", "HOOKS", "PARAMETER_GROUPS", "Holder", "holders_of", "pixel_bytes", "pyplot_figures"]

HOOKS, PARAMETER_GROUPS, FIGURES = "hooks", "param_groups", "figures"
"""Kinds of `ReachableObjects` other than types of containers."""
_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MAX_MODULES = 256
_LEAST = 8
_BYTES_PER_PIXEL = 4


class Holder(NamedTuple):
    """A container of a library's object."""

    path: str  # expression that reaches the object whose it is: `model.encoder`
    kind: str
    value: Any


def holders_of(value: Any, path: str) -> Iterator[Holder]:
    """Yield the containers of a torch module or optimizer; those of a few elements are left out."""
    torch = sys.modules.get("torch")
    if torch is None:
        return

    if isinstance(value, torch.nn.Module):
        for name, module in list(islice(value.named_modules(), _MAX_MODULES)):
            yield from _hooks(module, f"{path}.{name}" if name else path)
            for each, parameter in module.named_parameters(recurse=False):
                yield from _hooks(parameter, ".".join(filter(None, (path, name, each))))
    elif isinstance(value, torch.optim.Optimizer):
        yield Holder(path, PARAMETER_GROUPS, value.param_groups)


def _hooks(owner: Any, path: str) -> Iterator[Holder]:
    for name in _OF_MODULES:
        hooks = getattr(owner, name, None)
        if isinstance(hooks, dict) and len(hooks) >= _LEAST:
            yield Holder(path, HOOKS, hooks)


def pyplot_figures() -> Holder | None:
    """Return the open figures of pyplot, which keeps them until they are closed; None if it is not imported."""
    helpers = sys.modules.get("matplotlib._pylab_helpers")
    figures = getattr(getattr(helpers, "Gcf", None), "figs", None)
    return Holder("pyplot", FIGURES, figures) if isinstance(figures, dict) else None


def pixel_bytes(manager: Any) -> int:
    """Return the size of an open figure's picture, which is most of what a drawn figure holds."""
    width, height = manager.canvas.get_width_height()
    return int(width) * int(height) * _BYTES_PER_PIXEL
