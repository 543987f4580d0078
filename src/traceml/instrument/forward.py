"""The outermost calls of models, timed on the instance and outside what torch.compile compiles.

`nn.Module.__call__` looks for a callable in the instance's slot `_compiled_call_impl` first; that is where
`Module.compile()` puts its result, and where the timer goes. No hook, no subclass, no patched `forward`: type, state
dict, pickle and deepcopy see nothing, and torch.compile traces through it without a break, as under dynamo it is
 a plain call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase
from traceml.instrument.clock import ASK, NOWHERE, ON_FORWARD, OTHER, StepClock, mine
from traceml.instrument.patches import Patches

__all__ = ["ForwardTimer", "instrument_module", "is_instrumented", "patch_compile", "restore_module", "timer_type"]

_SLOT = "_compiled_call_impl"
_FORWARD = int(Phase.FORWARD)
_NO_FORWARD = (int(Phase.INPUT_WAIT), _FORWARD, int(Phase.BACKWARD))  # inside these it is part of them
is_grad_enabled = torch.is_grad_enabled


class ForwardTimer:
    """Stands in one module's call slot; holds the module weakly, so that deleting it frees it at once.

    What is called is a subclass made by `timer_type`: a class whose `__call__` has the clock's cells.
    """

    __slots__ = ("impl", "inner", "module")

    def __init__(self, module: Any, inner: Callable[..., Any] | None) -> None:
        self.module = weakref.ref(module)
        self.inner = inner  # what was in the slot: the result of Module.compile()
        self.impl: Callable[..., Any] = type(module)._call_impl if inner is None else _without_module(inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module is another one: its slot is empty."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A pickled module has an empty slot."""
        return type(None), ()


def timer_type(clock: StepClock) -> type[ForwardTimer]:
    """Return the type of timers of a clock."""
    slots, commit, begins, fail = clock.open_slots, clock.commit, clock.forward_begins, clock.fail
    # Cells of the clock.
    current = forward_ns = 0
    closes_at: Any = NOWHERE

    def __call__(self: ForwardTimer, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it becomes the method
        nonlocal current, forward_ns
        if is_dynamo_compiling():
            return self.impl(self.module(), *args, **kwargs)

        if current != OTHER or not mine():
            return _nested(self, clock, args, kwargs)

        t = monotonic_ns()
        try:
            if closes_at is ON_FORWARD:
                commit(t)
            elif closes_at is ASK:
                begins(t, self.module, trains=is_grad_enabled())

            current = _FORWARD
            slots[_FORWARD] = t
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            fail(error)

        try:
            return self.impl(self.module(), *args, **kwargs)
        finally:
            forward_ns += monotonic_ns() - t
            current = OTHER
            slots[_FORWARD] = 0

    return type("ForwardTimer", (ForwardTimer,), {"__slots__": (), "__call__": clock.bind(__call__)})


def _nested(timer: ForwardTimer, clock: StepClock, args: Any, kwargs: Any) -> Any:
    """Call the module inside another phase, or on another thread."""
    previous = clock.current
    if previous in _NO_FORWARD or not clock.is_here():
        return timer.impl(timer.module(), *args, **kwargs)

    t = monotonic_ns()
    try:
        clock.forward_begins(t, timer.module, trains=is_grad_enabled())
        clock.current = _FORWARD
        clock.open_slots[_FORWARD] = t
    except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
        clock.fail(error)

    try:
        return timer.impl(timer.module(), *args, **kwargs)
    finally:
        clock.leave(_FORWARD, previous, t)


def _without_module(inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(_module: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    return call


def is_instrumented(module: Any) -> bool:
    """Whether a timer stands in the module's slot."""
    return isinstance(module.__dict__.get(_SLOT), ForwardTimer)


def instrument_module(module: Any, timer: type[ForwardTimer]) -> bool:
    """Time the calls of one module; False when its kind does not allow it."""
    if is_instrumented(module):
        return True

    if isinstance(module, torch.jit.ScriptModule) or not hasattr(type(module), "_call_impl"):
        return False

    object.__setattr__(module, _SLOT, timer(module, module.__dict__.get(_SLOT)))
    return True


def restore_module(module: Any) -> None:
    """Put back what was in the module's slot."""
    timer = module.__dict__.get(_SLOT)
    if not isinstance(timer, ForwardTimer):
        return

    if timer.inner is None:
        del module.__dict__[_SLOT]
    else:
        module.__dict__[_SLOT] = timer.inner


def patch_compile(patches: Patches, timer: type[ForwardTimer]) -> None:
    """Keep timing a module that is compiled in place, and keep its replicas from calling the original."""
    module_type = torch.nn.Module
    compile_in_place, replicate = module_type.compile, module_type._replicate_for_data_parallel

    def compile(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: A001 - the name that it stands in for
        timed = is_instrumented(self)
        restore_module(self)
        compile_in_place(self, *args, **kwargs)
        if timed:
            instrument_module(self, timer)

    def replicate_for_data_parallel(self: Any) -> Any:
        replica = replicate(self)
        if is_instrumented(replica):
            replica.__dict__.pop(_SLOT)  # it would call the module it was copied from

        return replica

    patches.wrap(module_type, "compile", compile)
    patches.wrap(module_type, "_replicate_for_data_parallel", replicate_for_data_parallel)
