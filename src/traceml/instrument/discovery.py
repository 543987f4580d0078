"""Finding the user's models and optimizers without asking for them.

torch offers hooks on all modules (paid on every call of every layer) or on one. So the few that matter are looked for
at the few moments when new ones may be there. A glance sees the modules that were constructed since the last one, as
torch tells of their parameters and children; and, for copies, of which it does not tell, the garbage collector's young
objects (0.3 ms, at most 1 % of the time). A look at all of the collector's objects takes 20-50 ms: it is taken at the
start and at the first backward pass, and for new optimizers as long as all looks took less than 1 % of the time.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from traceml.clock import monotonic_ns
from traceml.instrument.accumulator import NOWHERE
from traceml.instrument.forward import TimerMaker, instrument_module, restore_module
from traceml.instrument.optimizer import is_wrapper
from traceml.instrument.step_clock import StepClock

__all__ = ["ModuleDiscovery"]

_FREE_SCANS = 4
_SHARE = 100  # further ones while all of them took less than one part in so many of the time
_MAX_PENDING = 100_000
_MAX_DESCENTS = 3


class ModuleDiscovery:
    """The modules that are timed, and how more are found.

    Args:
        clock: who is told how many optimizers there are.
        timer: what the modules get.
        on_model: called with each module when it is first timed.
        on_optimizer: called with the optimizers that are alive.
    """

    def __init__(
        self,
        clock: StepClock,
        timer: TimerMaker,
        on_model: Callable[[Any], None],
        on_optimizer: Callable[[Any], None],
    ) -> None:
        self._clock, self._timer = clock, timer
        self._on_model, self._on_optimizer = on_model, on_optimizer
        self._known: dict[int, weakref.ref[Any]] = {}
        self._made_ns = monotonic_ns()
        self._scans = self._scan_ns = self._glance_at_ns = 0
        self._descents = 0
        self._pending: list[weakref.ref[Any]] = []  # modules that got parameters or children since the last glance

    def watch(self) -> list[Any]:
        """Be told of modules under construction; return torch's handles, whose `remove` ends that."""

        def told(module: Any, _name: str, _part: Any) -> None:
            if not is_dynamo_compiling() and len(self._pending) < _MAX_PENDING:
                self._pending.append(weakref.ref(module))

        return [
            torch.nn.modules.module.register_module_parameter_registration_hook(told),
            torch.nn.modules.module.register_module_module_registration_hook(told),
        ]

    def scan(self) -> int:
        """Time all root modules that are alive now; return how many optimizers of theirs are."""
        start = monotonic_ns()
        if self._scans >= _FREE_SCANS and self._scan_ns * _SHARE > start - self._made_ns:
            self.glance()
            return self._clock.optimizers_alive

        self._scans += 1
        self._pending.clear()
        modules, optimizers = _alive(gc.get_objects())
        roots = _roots(modules)
        for module in roots:
            self.add(module)

        for optimizer in optimizers:
            self._on_optimizer(optimizer)

        trained = {id(parameter) for module in roots for parameter in module.parameters()}
        self._clock.optimizers_alive = sum(_has_any(optimizer, trained) for optimizer in optimizers)
        self._clock.usual_loader = NOWHERE
        self._scan_ns += monotonic_ns() - start
        return self._clock.optimizers_alive

    def glance(self) -> None:
        """Time the root modules that were made lately."""
        pending, self._pending = self._pending, []
        found = {id(module): module for ref in pending if (module := ref()) is not None}
        start = monotonic_ns()
        looks = start >= self._glance_at_ns
        if looks:
            # Added, not gathered into a list: that one would be young too, and hold itself until it is collected.
            young = gc.get_objects(generation=0) + gc.get_objects(generation=1)
            found |= {id(module): module for module in _alive(young)[0]}

        new = [module for module in _roots(found.values()) if not self._knows(module)]
        inner = {id(module) for known in self._modules() for module in known.modules()} if new else set()
        for module in new:
            if id(module) not in inner:
                self.add(module)

        if looks:
            end = monotonic_ns()
            self._glance_at_ns = end + (end - start) * _SHARE

    def add(self, module: Any) -> None:
        """Time one module."""
        if self._knows(module) or not instrument_module(module, self._timer):
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

    def _knows(self, module: Any) -> bool:
        known = self._known.get(id(module))
        return known is not None and known() is module

    def _modules(self) -> list[Any]:
        alive = (ref() for ref in self._known.values())
        return [module for module in alive if module is not None]


def _alive(objects: list[Any]) -> tuple[list[Any], list[Any]]:
    """The modules and optimizers among some objects."""
    # `isinstance` would ask an object's `__class__`, which proxies answer with code of theirs.
    module_types, optimizer_types = _subclasses(torch.nn.Module), _subclasses(torch.optim.Optimizer)
    wanted = module_types | optimizer_types
    found = list(compress(objects, map(wanted.__contains__, map(type, objects))))
    modules = [candidate for candidate in found if type(candidate) in module_types]
    optimizers = [candidate for candidate in found if type(candidate) in optimizer_types]
    return modules, [candidate for candidate in optimizers if not is_wrapper(type(candidate))]


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
