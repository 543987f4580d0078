"""Discovery of the user's models and optimizers.

torch offers hooks on all modules (a cost on every call of every layer) or on one. So we search for the few outermost
modules when new ones may exist. A quick search covers the modules made since the last one: torch's registration hooks
report those that are constructed, and `Module.__setstate__` those that are copied or unpickled. A full search over all
objects of the collector takes 20-100 ms: it runs where torch was imported before tracing began, and at the first
backward pass.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from traceml.fail_open import fail_open
from traceml.instrument.forward import TimerMaker, instrument_module, restore_module
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.optimizer import is_wrapper
from traceml.instrument.patches import Patches
from traceml.instrument.phase_timer import NOT_READY
from traceml.instrument.search.live_objects import LiveObjects, find_live
from traceml.instrument.step_clock import StepClock

__all__ = ["ModuleDiscovery"]

_MAX_PENDING = 100_000
_MAX_DESCENTS = 3
_log = logging.getLogger("traceml")


class ModuleDiscovery:
    """Timed modules, and the search for more.

    Args:
        clock: receives the number of optimizers that are alive.
    """

    def __init__(
        self, clock: StepClock, timer: TimerMaker, on_model: Callable[[Any], None], on_optimizer: Callable[[Any], None]
    ) -> None:
        self._clock, self._timer = clock, timer
        self._on_model, self._on_optimizer = on_model, on_optimizer
        self._known: dict[int, weakref.ref[Any]] = {}
        self._parts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._asked: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # at how many known models
        self._descents = 0
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._declared: set[type[Any]] = set()
        self._refused: set[type[Any]] = set()  # of what was named as a model, and is none
        self._trained: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # answers of `is_trained`
        self._pending: list[weakref.ref[Any]] = []  # modules that are new or have new parts since the last search

    @property
    def models(self) -> int:
        """Number of modules that are or were timed."""
        return len(self._known)

    def optimizers(self) -> list[Any]:
        """Return the known optimizers that are alive, without wrappers."""
        return list(self._optimizers)

    @uncounted
    def watch(self, patches: Patches) -> None:
        """Collect the modules that are constructed, copied or unpickled."""

        def on_registration(module: Any, *_: Any) -> None:
            if not is_dynamo_compiling() and len(self._pending) < _MAX_PENDING:
                with fail_open(_log, "instrument", "a module is not searched for models", once=True):
                    self._pending.append(weakref.ref(module))

        for register in (
            torch.nn.modules.module.register_module_parameter_registration_hook,
            torch.nn.modules.module.register_module_module_registration_hook,
        ):
            patches.on_undo(register(on_registration).remove)

        patches.follow(torch.nn.Module, "__setstate__", on_registration)

    def models_with(self, module: Any) -> list[Any]:
        """Return the known models that are or have the module."""
        return [known for known in self._modules() if is_inside(module, known)]

    def search_all(self, find: Callable[[], LiveObjects] = find_live, *, trains: bool = False) -> int:
        """Time all root modules that are alive; return the number of their optimizers.

        Args:
            find: lists what is alive.
            trains: whether a backward pass begins, so that there is an optimizer, also one that is not torch's.
        """
        self._pending.clear()
        alive = find()
        optimizers = [each for each in alive.optimizers if not is_wrapper(type(each))]
        roots = _roots(alive.modules)
        for module in roots:
            self.add(module)

        for optimizer in optimizers:
            self.note_optimizer(optimizer)
            self._on_optimizer(optimizer)

        self._count_optimizers(optimizers, roots)
        if trains and not self._clock.optimizers_alive:
            self._clock.optimizers_alive = self._find_own()

        return self._clock.optimizers_alive

    def search_for(self, optimizer: Any) -> None:
        """Time the models made since the last search, and count the known optimizers again: a further one steps."""
        if isinstance(optimizer, torch.optim.Optimizer):  # it may be a copy, which no constructor has made
            self.note_optimizer(optimizer)

        self.search_recent()
        self._count_optimizers(self._optimizers, self._modules())

    def _count_optimizers(self, optimizers: Iterable[Any], modules: Iterable[Any]) -> None:
        trained = {id(parameter) for module in modules for parameter in module.parameters()}
        self._clock.optimizers_alive = sum(_has_any(optimizer, trained) for optimizer in optimizers)
        self._clock.usual_loader = NOT_READY

    def _find_own(self) -> int:
        from traceml.instrument.search.custom_optimizers import find_custom_optimizers

        own = find_custom_optimizers()
        for optimizer in own:
            self._on_optimizer(optimizer)

        return len(own)

    def search_recent(self) -> None:
        """Time the root modules made since the last search."""
        pending, self._pending = self._pending, []
        found = {id(module): module for ref in pending if (module := ref()) is not None}
        new = [module for module in _roots(found.values()) if not self._knows(module)]
        inner = {id(module) for known in self._modules() for module in known.modules()} if new else set()
        for module in new:
            if id(module) not in inner:
                self.add(module)

    def declare(self, module: Any, optimizer: Any) -> None:
        """Time a model and an optimizer that the script names; either may be None."""
        if isinstance(module, torch.nn.Module):
            self.add(module)
        elif module is not None and type(module) not in self._refused:
            self._refused.add(type(module))
            _warn_of("model", module, "a torch.nn.Module")

        if optimizer is not None and type(optimizer) not in self._declared:
            self._declared.add(type(optimizer))
            if callable(getattr(optimizer, "step", None)):
                self._on_optimizer(optimizer)
            else:
                _warn_of("optimizer", optimizer, "an object with the method step()")

    def note_optimizer(self, optimizer: Any) -> None:
        """Remember an optimizer, whose models are trained."""
        if not is_wrapper(type(optimizer)):
            self._optimizers.add(optimizer)
            self._trained.clear()

    def is_trained(self, module: Any) -> bool:
        """Whether a known optimizer has parameters of the module; True if none is known."""
        known = self._trained.get(module)
        if known is None:
            parameters = {id(parameter) for parameter in module.parameters()}
            known = not self._optimizers or any(_has_any(optimizer, parameters) for optimizer in self._optimizers)
            self._trained[module] = known

        return known

    def is_trained_as_a_whole(self, module: Any) -> bool:
        """Whether a known model is trained that is the module, or a wrapper of it without parameters of its own."""
        models = self.models_with(module)
        return bool(models) and all(_count(each) == _count(module) for each in models) and self.is_trained(module)

    def add(self, module: Any) -> None:
        """Time one module."""
        if self._knows(module) or not instrument_module(module, self._timer):
            return

        self._known[id(module)] = weakref.ref(module)
        self._on_model(module)
        for inside in _called_inside(module):
            self._add_inside(inside)

    def _add_inside(self, module: Any) -> None:
        """Time a module without describing it as a model; a call inside the outer one's is a part of that."""
        if not self._knows(module) and instrument_module(module, self._timer):
            self._known[id(module)] = weakref.ref(module)

    def evaluates(self, module: Any) -> None:
        """Time a model that evaluates, also where the training calls a module around it, as one that adds the loss."""
        if not self._knows(module) and not _has_compiled() and self._is_most_of_a_model(module):
            self._add_inside(module)

        self._add_parts(module)

    def _is_most_of_a_model(self, module: Any) -> bool:
        """Whether a known model has the module inside, with most of its parameters; a frozen layer has few.

        Looked up again only when more models are known: scripts may change the mode of layers in each step.
        """
        if self._asked.get(module) == self.models or not _has_parameters(module):
            return False

        self._asked[module] = self.models
        own = _count(module)
        return any(2 * own > _count(known) and is_inside(module, known) for known in self._modules())

    def _add_parts(self, module: Any) -> None:
        """Time the parts of a model that evaluates: a method of its own, as `generate`, may call them.

        Not the parts of these, which change to evaluation with them, and not after a compilation, which would be
        repeated.
        """
        if module in self._parts or not self._knows(module) or not _has_methods(type(module)) or _has_compiled():
            return

        for child in filter(_has_parameters, module.children()):
            self._add_inside(child)
            self._parts.add(child)

    def descend(self) -> None:
        """Time the children of known modules too: without any forward, the script may call them directly."""
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


def _roots(modules: Iterable[Any]) -> list[Any]:
    """Return the modules with parameters that are not children of another one."""
    made = [module for module in modules if "_modules" in vars(module)]  # a constructor may still be running
    children = {id(child) for module in made for child in vars(module)["_modules"].values()}
    return [module for module in made if id(module) not in children and _has_parameters(module)]


def _called_inside(module: Any) -> list[Any]:
    """Return the modules that are called in place of one: the parts of one without a forward, what a wrapper is for.

    Evaluation often calls the one inside a replica, on one rank.
    """
    children = {name: part for name, part in vars(module)["_modules"].items() if part is not None}
    parts = [part for part in children.values() if _has_parameters(part)]
    # A compiled module has its own, as an attribute; the class of a scripted one raises for it.
    if "forward" not in vars(module) and getattr(type(module), "forward", None) is torch.nn.Module.forward:
        return [inside for part in parts for inside in (part, *_called_inside(part))]

    return parts if children.keys() == {"module"} else []


def _has_methods(cls: type[Any]) -> bool:
    """Whether a class of the script has public methods that `Module` has not, besides `forward`."""
    own = cls.__mro__[: cls.__mro__.index(torch.nn.Module)]
    names = {
        name
        for base in own
        if base.__module__.partition(".")[0] != "torch"
        for name, value in vars(base).items()
        if isinstance(value, FunctionType) and not name.startswith("_")
    }
    return any(not hasattr(torch.nn.Module, name) for name in names - {"forward"})


def _warn_of(what: str, value: object, expected: str) -> None:
    _log.warning("trace_step(%s=...) takes %s, not %s: it is not timed", what, expected, type(value).__name__)


def _has_compiled() -> bool:
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    return bool(counters.get("frames"))


def _has_parameters(module: Any) -> bool:
    return next(iter(module.parameters()), None) is not None


def _count(module: Any) -> int:
    return sum(1 for _ in module.parameters())


def is_inside(module: Any, known: Any) -> bool:
    """Whether a module is another one or a part of it."""
    return any(each is module for each in known.modules())


def _has_any(optimizer: Any, parameters: set[int]) -> bool:
    """Whether the optimizer has one of the parameters; one left over from earlier models has not."""
    groups = getattr(optimizer, "param_groups", ())
    return any(id(parameter) in parameters for group in groups for parameter in group["params"])
