"""Contents of libraries' objects: containers that a script may fill (hooks, parameter groups, figures), and tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

__all__ = [
    "FIGURES",
    "HOOKS",
    "PARAMETER_GROUPS",
    "Holder",
    "group_bytes",
    "holders_of",
    "is_tensor",
    "pixel_bytes",
    "pyplot_figures",
    "tensors_of",
]

HOOKS, PARAMETER_GROUPS, FIGURES = "hooks", "param_groups", "figures"
"""Kinds of `ReachableObjects` other than types of containers."""
_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MAX_MODULES, _MAX_TENSORS, _MAX_STATES = 256, 16, 2048
_LEAST = 8
_BYTES_PER_PIXEL = 4


class Holder(NamedTuple):
    """A container of a library's object."""

    path: str  # expression that reaches the object whose it is: `model.encoder`
    kind: str
    value: Any
    owner: Any = None  # the optimizer of parameter groups


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of torch, which is not imported only to ask."""
    return _is_of_torch(value, "torch", "Tensor")


def _is_module(value: Any) -> bool:
    return _is_of_torch(value, "torch.nn", "Module")


def _is_optimizer(value: Any) -> bool:
    return _is_of_torch(value, "torch.optim", "Optimizer")


def _is_of_torch(value: Any, module: str, name: str) -> bool:
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def holders_of(value: Any, path: str) -> Iterator[Holder]:
    """Yield the containers of a torch module or optimizer; those of a few elements are left out."""
    if _is_module(value):
        for name, module in list(islice(value.named_modules(), _MAX_MODULES)):
            yield from _hooks(module, f"{path}.{name}" if name else path)
            for each, parameter in module.named_parameters(recurse=False):
                yield from _hooks(parameter, ".".join(filter(None, (path, name, each))))
    elif _is_optimizer(value):
        yield Holder(path, PARAMETER_GROUPS, value.param_groups, value)


def _hooks(owner: Any, path: str) -> Iterator[Holder]:
    for name in _OF_MODULES:
        hooks = getattr(owner, name, None)
        if isinstance(hooks, dict) and len(hooks) >= _LEAST:
            yield Holder(path, HOOKS, hooks)


def tensors_of(value: Any) -> Iterator[Any]:
    """Yield the parameters and buffers of a torch module, or the tensors of an optimizer's state, some thousand."""
    if _is_module(value):
        for module in list(islice(value.modules(), _MAX_MODULES)):
            yield from list(islice(module.parameters(recurse=False), _MAX_TENSORS))
            yield from list(islice(module.buffers(recurse=False), _MAX_TENSORS))
    elif _is_optimizer(value):
        for state in list(islice(value.state.values(), _MAX_STATES)):
            yield from (each for each in list(state.values()) if is_tensor(each))


def group_bytes(optimizer: Any) -> int:
    """Return the size of an optimizer's newest parameter group: its parameters, their gradients and states.

    A group that was added in the open step has no gradients and states yet: the one before it is looked at, too.
    """
    return max((_kept_bytes(group["params"], optimizer.state) for group in optimizer.param_groups[-2:]), default=0)


def _kept_bytes(parameters: list[Any], states: Mapping[Any, Mapping[str, Any]]) -> int:
    counted = parameters[:_MAX_TENSORS]
    kept = [part for each in counted for part in (each, each.grad, *states.get(each, {}).values())]
    known = sum(int(each.untyped_storage().nbytes()) for each in kept if is_tensor(each))
    return known * len(parameters) // max(len(counted), 1)


def pyplot_figures() -> Holder | None:
    """Return the open figures of pyplot, which keeps them until they are closed; None if it is not imported."""
    helpers = sys.modules.get("matplotlib._pylab_helpers")
    figures = getattr(getattr(helpers, "Gcf", None), "figs", None)
    return Holder("pyplot", FIGURES, figures) if isinstance(figures, dict) else None


def pixel_bytes(manager: Any) -> int:
    """Return the size of an open figure's picture, which is most of what a drawn figure holds."""
    width, height = manager.canvas.get_width_height()
    return int(width) * int(height) * _BYTES_PER_PIXEL
