"""Search for optimizers that do not derive from torch's: objects with a method `step` that hold what is trained.

The search runs at the first backward pass, and only if no torch optimizer has parameters of the models.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Set as AbstractSet
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from traceml.inspection.thread_frames import stack_frames
from traceml.instrument.search.live_objects import of_types

__all__ = ["find_custom_optimizers"]

_MAX_VISITED = 400
_OPAQUE = (type, ModuleType, FunctionType, MethodType, CodeType, torch.nn.Module, str, bytes, int, float)
# Their own steppers hold parameters too: schedulers by their optimizer, scalers and profilers not at all.
_TORCH = "torch."


def find_custom_optimizers() -> list[Any]:
    """Return the objects with a method `step` that hold tensors to train.

    One whose `step` is running does more than an update: it is a trainer.
    """
    objects = gc.get_objects()
    steps = {cls: step for cls in set(map(type, objects)) if (step := _step_of(cls)) is not None}
    found = of_types(objects, steps.keys()) if steps else []
    running = {frame.f_code for frame in stack_frames(sys._getframe())} if found else set()
    return [each for each in found if steps[type(each)].__code__ not in running and _holds_trained(each, steps.keys())]


def _step_of(cls: type[Any]) -> FunctionType | None:
    """Return the Python method `step` of a class outside torch."""
    if issubclass(cls, _OPAQUE) or cls.__module__ == "torch" or cls.__module__.startswith(_TORCH):
        return None

    step = next((vars(base)["step"] for base in cls.__mro__ if "step" in vars(base)), None)
    return step if isinstance(step, FunctionType) else None


def _holds_trained(candidate: Any, classes: AbstractSet[type[Any]]) -> bool:
    """Whether a tensor to train is reached from an object, not through models or other objects with a `step`."""
    waiting, seen = deque([candidate]), {id(candidate)}
    while waiting and len(seen) < _MAX_VISITED:
        for part in gc.get_referents(waiting.popleft()):
            cls = type(part)
            if id(part) in seen or cls in classes or issubclass(cls, _OPAQUE):
                continue

            seen.add(id(part))
            if not issubclass(cls, torch.Tensor):
                waiting.append(part)
            elif part.is_leaf and part.requires_grad:
                return True

    return False
