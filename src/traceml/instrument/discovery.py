"""Finding the user's models and optimizers without asking for them.

torch offers hooks on all modules (paid on every call of every layer) or on one. So the few that matter are looked for
among the objects of the garbage collector, at the few moments when new ones may be there: 20-50 ms each, before or in
the first steps.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from traceml.instrument.clock import NOWHERE, StepClock
from traceml.instrument.forward import ForwardTimer, instrument_module, restore_module

__all__ = ["Discovery"]

_MAX_SCANS = 12
_MAX_DESCENTS = 3


class Discovery:
    """The modules that are timed, and how more are found.

    Args:
        clock: who is told how many optimizers there are.
        timer: what the modules get.
        on_model: called with each module when it is first timed.
        on_optimizer_type: called with the types of optimizers that are alive.
    """

    def __init__(
        self,
        clock: StepClock,
        timer: type[ForwardTimer],
        on_model: Callable[[Any], None],
        on_optimizer_type: Callable[[type[Any]], None],
    ) -> None:
        self._clock, self._timer = clock, timer
        self._on_model, self._on_optimizer_type = on_model, on_optimizer_type
        self._known: dict[int, weakref.ref[Any]] = {}
        self._scans = 0
        self._descents = 0

    def scan(self) -> int:
        """Time all root modules that are alive now; return how many optimizers of theirs are."""
        if self._scans >= _MAX_SCANS:
            return self._clock.optimizers_alive

        self._scans += 1
        modules, optimizers = _alive()
        roots = _roots(modules)
        for module in roots:
            self.add(module)

        for kind in {type(optimizer) for optimizer in optimizers}:
            self._on_optimizer_type(kind)

        trained = {id(parameter) for module in roots for parameter in module.parameters()}
        self._clock.optimizers_alive = sum(_has_any(optimizer, trained) for optimizer in optimizers)
        self._clock.usual_loader = NOWHERE
        return self._clock.optimizers_alive

    def add(self, module: Any) -> None:
        """Time one module."""
        known = self._known.get(id(module))
        if (known is not None and known() is module) or not instrument_module(module, self._timer):
            return

        self._known[id(module)] = weakref.ref(module)
        self._on_model(module)

    def descend(self) -> None:
        """No forward is seen: the script may call parts of its model; time those too."""
        if self._descents >= _MAX_DESCENTS:
            return

        self._descents += 1
        for module in self._modules():
            for child in module.children():
                if _has_parameters(child):
                    self.add(child)

    def restore(self) -> None:
        """Stop timing all of them."""
        for module in self._modules():
            restore_module(module)

        self._known.clear()

    def _modules(self) -> list[Any]:
        alive = (ref() for ref in self._known.values())
        return [module for module in alive if module is not None]


def _alive() -> tuple[list[Any], list[Any]]:
    """All modules and optimizers that are alive."""
    # `isinstance` would ask an object's `__class__`, which proxies answer with code of theirs.
    module_types, optimizer_types = _subclasses(torch.nn.Module), _subclasses(torch.optim.Optimizer)
    modules, optimizers = [], []
    for candidate in gc.get_objects():
        kind = type(candidate)
        if kind in module_types:
            modules.append(candidate)
        elif kind in optimizer_types:
            optimizers.append(candidate)

    return modules, optimizers


def _subclasses(kind: type[Any]) -> set[type[Any]]:
    found, waiting = set(), [kind]
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found.add(kind)
            waiting.extend(type.__subclasses__(kind))

    return found


def _roots(modules: Iterable[Any]) -> list[Any]:
    """Those with parameters which are no child of another one."""
    made = [module for module in modules if "_modules" in vars(module)]  # a constructor may be under way
    children = {id(child) for module in made for child in vars(module)["_modules"].values()}
    return [module for module in made if id(module) not in children and _has_parameters(module)]


def _has_parameters(module: Any) -> bool:
    return next(iter(module.parameters()), None) is not None


def _has_any(optimizer: Any, parameters: set[int]) -> bool:
    """Whether the optimizer is of one of the models; one that is left over from before is not."""
    groups = getattr(optimizer, "param_groups", ())
    return any(id(parameter) in parameters for group in groups for parameter in group["params"])
