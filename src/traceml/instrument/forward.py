"""Timing of the outermost calls of models, on the instance and outside of compiled code.

`nn.Module.__call__` first looks for a callable in the instance's slot `_compiled_call_impl`. `Module.compile()` stores
its result there, and so do we. There is no hook, subclass or patched `forward`: type, state dict, pickle and deepcopy
are unchanged, and torch.compile traces through without a graph break, as the timer is a plain call under dynamo.
A class with a `__call__` of its own may never look there, as GPyTorch's; that method is replaced.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.phase_timer import CHECK_FORWARD, NOT_READY, ON_FORWARD, OTHER, Began, on_training_thread
from traceml.instrument.step_clock import StepClock

__all__ = [
    "ForwardTimer",
    "TimedModule",
    "TimerMaker",
    "instrument_module",
    "is_instrumented",
    "patch_checkpoint_sequential",
    "patch_compile",
    "patch_own_call",
    "patch_scripting",
    "patch_training_mode",
    "restore_module",
    "timed_forward",
    "timer_maker",
]

_SLOT = "_compiled_call_impl"
_CALL = torch.nn.Module._wrapped_call_impl.__code__
_GONE = weakref.ref(type("_Gone", (), {})())
_FORWARD, _OPTIMIZER = int(Phase.FORWARD), int(Phase.OPTIMIZER)
_COPIERS = ("__copy__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__")
_NO_FORWARD = (int(Phase.INPUT_WAIT), _FORWARD, int(Phase.BACKWARD))  # a forward inside these is part of them
is_grad_enabled = torch.is_grad_enabled


TimerMaker = Callable[["TimedModule"], Callable[..., Any]]
Measure = Callable[[tuple[Any, ...], dict[str, Any], Any], None]
"""Notes the size of a forward's input, given its arguments and the model."""


class TimedModule:
    """A timed module, held weakly so that deleting the module frees it at once.

    A call of it calls `inner`, or what the module has as `_call_impl` by then: compilers and monitors replace that.
    """

    __slots__ = ("inner", "module")

    def __init__(self, module: Any, inner: Callable[..., Any] | None) -> None:
        self.module: Callable[[], Any] = weakref.ref(module)
        self.inner = inner  # previous content of the slot: the result of Module.compile()


class ForwardTimer:
    """Timer that copies and pickles as an empty slot, for classes that copy their `__dict__` themselves.

    It is slower than a function.
    """

    __slots__ = ("call", "timed")

    def __init__(self, call: Callable[..., Any], timed: TimedModule) -> None:
        self.call, self.timed = call, timed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: the slot of a copied module is empty."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as None: the slot of a pickled module is empty."""
        return type(None), ()


@uncounted
def timer_maker(clock: StepClock, measure: Measure) -> TimerMaker:
    """Return a function that makes timers of modules for a clock."""
    if clock.hook is not None:
        return partial(_native_timer, clock, clock.hook, measure)

    commit, begins, fail = clock.commit, clock.forward_begins, clock.fail
    # Cells of the clock.
    current = forward_ns = 0
    open_slots: Any = None
    closing_trigger: Any = NOT_READY
    input_shape: Any = None

    def make(own: TimedModule) -> Callable[..., Any]:
        module, inner = own.module, own.inner

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal current, forward_ns
            if is_dynamo_compiling():
                return (module()._call_impl if inner is None else inner)(*args, **kwargs)

            other = _other_owner(own, sys._getframe(1))
            if other is not None:
                return _own_timer(other, make, clock)(*args, **kwargs)

            if current != OTHER or not on_training_thread():
                return _nested_call(own, clock, measure, args, kwargs)

            try:
                if not args or type(args[0]) is not Tensor or args[0].is_nested or args[0].shape != input_shape:
                    measure(args, kwargs, module())

                t = monotonic_ns()
                if not is_grad_enabled():
                    begins(t, module, trains=False)
                elif closing_trigger is ON_FORWARD:
                    commit(t)
                elif closing_trigger is CHECK_FORWARD:
                    begins(t, module, trains=True)

                current = _FORWARD
                open_slots[_FORWARD] = t
            except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
                fail(error)

            try:
                return (module()._call_impl if inner is None else inner)(*args, **kwargs)
            finally:
                try:
                    forward_ns += monotonic_ns() - t
                    current = OTHER
                    open_slots[_FORWARD] = 0
                except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
                    fail(error)

        bound = clock.bind(call)
        bound.timed = own  # type: ignore[attr-defined]
        return ForwardTimer(bound, own) if _copies_by_itself(type(module())) else bound

    return make


@uncounted
def _native_timer(
    clock: StepClock, make_hook: Callable[..., Callable[..., Any]], measure: Measure, timed: TimedModule
) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        other = _other_owner(timed, sys._getframe(1))
        if other is not None:
            return _own_timer(other, partial(_native_timer, clock, make_hook, measure), clock)(*args, **kwargs)

        return _nested_call(timed, clock, measure, args, kwargs)

    hook: Callable[..., Any] = make_hook(clock, _FORWARD, timed.inner, slow, measure, timed.module, _of_torch())
    hook.timed = timed  # type: ignore[attr-defined]
    return hook


def _other_owner(timed: TimedModule, frame: Any) -> Any:
    """Return the module that is called if it is another one, which was given a copy of the `__dict__`; else None.

    Libraries of meta learning clone modules so, as `higher` and learn2learn.

    Args:
        frame: the one that called the timer.
    """
    if frame.f_code is ForwardTimer.__call__.__code__:
        frame = frame.f_back

    if timed.inner is not None or frame.f_code is not _CALL:
        return None

    called = frame.f_locals.get("self")
    return None if called is timed.module() else called


def _own_timer(module: Any, make: TimerMaker, clock: StepClock) -> Callable[..., Any]:
    """Return a timer of a module's own in place of another one's; after the end of tracing, the call without one."""
    if not clock.thread:
        del module.__dict__[_SLOT]
        return module._call_impl  # type: ignore[no-any-return]

    timer = module.__dict__[_SLOT] = make(TimedModule(module, None))
    return timer


@cache
def _of_torch() -> tuple[type[Tensor], Callable[[], int], Callable[[], bool], int]:
    """Return what a hook in C asks torch for; the last is the address of a function in C, 0 if there is none."""
    address = 0
    with suppress(OSError, AttributeError):  # it is in torch's stable interface for C
        library = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        address = ctypes.cast(library.aoti_torch_grad_mode_is_enabled, ctypes.c_void_p).value or 0

    return Tensor, Tensor().numel, is_grad_enabled, address


@uncounted
def _nested_call(timed: TimedModule, clock: StepClock, measure: Measure, args: Any, kwargs: Any) -> Any:
    """Call the module inside another phase, or on another thread."""
    began = _begin(timed, clock, measure, args, kwargs)
    try:
        return (timed.module()._call_impl if timed.inner is None else timed.inner)(*args, **kwargs)
    finally:
        if began is not None:
            clock.leave(_FORWARD, began)


def _begin(timed: TimedModule, clock: StepClock, measure: Measure, args: Any, kwargs: Any) -> Began | None:
    """Begin a forward; return None if it does not count."""
    try:
        if clock.current in _NO_FORWARD or not clock.is_training_thread():
            return None

        measure(args, kwargs, timed.module())
        clock.forward_begins(monotonic_ns(), timed.module, trains=is_grad_enabled())
        return clock.enter(_FORWARD)
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)
        return None


@uncounted
def timed_forward(
    original: Callable[..., Any], clock: StepClock, module_of: Callable[[Any], Any], measure: Measure
) -> Callable[..., Any]:
    """Return a framework's method that calls `original` and times it as the outermost call of a model.

    Args:
        module_of: returns the model of the method's object.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        previous = clock.current
        if (
            (previous != OTHER and previous != _OPTIMIZER)
            or is_dynamo_compiling()
            or not (on_training_thread() or clock.is_training_thread())
        ):
            return original(self, *args, **kwargs)

        try:
            measure(args, kwargs, module_of(self))
            t = monotonic_ns()
            if clock.closing_trigger is CHECK_FORWARD or clock.closing_trigger is ON_FORWARD:
                clock.forward_begins(t, weakref.ref(module_of(self)), trains=is_grad_enabled())

            clock.current = _FORWARD
            clock.open_slots[_FORWARD] = t
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

        try:
            return original(self, *args, **kwargs)
        finally:
            try:
                spent = monotonic_ns() - t
                clock.forward_ns += spent
                if previous == _OPTIMIZER:  # Lightning trains in the optimizer's closure
                    clock.optimizer_ns -= spent

                clock.current = previous
                clock.open_slots[_FORWARD] = 0
            except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
                clock.fail(error)

    return call


@uncounted
def patch_checkpoint_sequential(patches: Patches, clock: StepClock, measure: Measure) -> None:
    """Time `checkpoint_sequential` as a call of the model: it calls the model's parts, and never the model itself."""
    module: Any = sys.modules.get("torch.utils.checkpoint")
    original = getattr(module, "checkpoint_sequential", None)
    if original is None:
        return

    timed = timed_forward(original, clock, _first_module, lambda args, options, of: measure(args[1:], options, of))

    def checkpoint_sequential(functions: Any, *args: Any, **kwargs: Any) -> Any:
        call = original if _first_module(functions) is None else timed
        return call(functions, *args, **kwargs)

    patches.wrap(module, "checkpoint_sequential", checkpoint_sequential)


@uncounted
def patch_own_call(patches: Patches, clock: StepClock, measure: Measure, cls: type[Any]) -> None:
    """Time the models of a class that has a `__call__` of its own; torch's own all look into the slot."""
    owner = next(base for base in cls.__mro__ if "__call__" in vars(base))
    original = vars(owner)["__call__"]
    if owner.__module__.partition(".")[0] == "torch" or getattr(original, "_traceml_clock", None) is clock:
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        timed = None if is_dynamo_compiling() else _timed(self)
        began = None if timed is None else _begin(timed, clock, measure, args, kwargs)
        try:
            return original(self, *args, **kwargs)
        finally:
            if began is not None:
                clock.leave(_FORWARD, began)

    call._traceml_clock = clock  # type: ignore[attr-defined]
    patches.wrap(owner, "__call__", call)


@uncounted
def patch_training_mode(
    patches: Patches, clock: StepClock, on_training: Callable[[Any], None], on_evaluation: Callable[[Any, bool], None]
) -> None:
    """Tell the clock of `Module.train()`, which ends an evaluation.

    Args:
        on_training: called with a module that changes to training mode, and not as a part of another.
        on_evaluation: called with a module that changes to evaluation mode, a timed one, or one that does not change
            as a part of another, and whether it does.
    """
    original = torch.nn.Module.train
    is_part = False

    def train(self: Any, mode: bool = True) -> Any:
        nonlocal is_part
        if mode == getattr(self, "training", None) or is_dynamo_compiling():
            return original(self, mode)

        try:
            if mode:
                clock.begin_training_mode()
                if not is_part:
                    on_training(self)
            elif clock.thread and (is_instrumented(self) or not is_part):
                on_evaluation(self, is_part)
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

        was_part, is_part = is_part, True
        try:
            return original(self, mode)
        finally:
            is_part = was_part

    patches.wrap(torch.nn.Module, "train", train)


def _first_module(functions: Any) -> Any:
    """Return the model that is given as a whole, or the first module of a list; None without one."""
    parts = functions if isinstance(functions, (list, tuple)) else (functions,)
    return next((part for part in parts if isinstance(part, torch.nn.Module)), None)


def is_instrumented(module: Any) -> bool:
    """Whether the module's slot has a timer."""
    return _timed(module) is not None


def _timed(module: Any) -> TimedModule | None:
    timed: TimedModule | None = getattr(module.__dict__.get(_SLOT), "timed", None)
    return timed if timed is not None and timed.module() is module else None


def _copies_by_itself(cls: type[Any]) -> bool:
    """Whether copies and pickles of the class may bypass `Module.__getstate__`, which omits the slot."""
    own = cls.__mro__[: cls.__mro__.index(torch.nn.Module)]
    return any(name in vars(base) for base in own for name in _COPIERS)


def instrument_module(module: Any, make: TimerMaker) -> bool:
    """Time the calls of one module; return False when its class does not allow it."""
    if is_instrumented(module):
        return True

    if not hasattr(type(module), "_call_impl"):
        return False

    inner = module.__dict__.get(_SLOT)
    own = None if hasattr(inner, "timed") else inner  # that of another module came with a copy of its `__dict__`
    object.__setattr__(module, _SLOT, make(TimedModule(module, own)))
    return True


def restore_module(module: Any) -> None:
    """Restore the previous content of the module's slot."""
    timed = _timed(module)
    if timed is None:
        return

    if timed.inner is None:
        timer = module.__dict__.pop(_SLOT)
        if hasattr(timer, "module"):
            timer.module = _GONE  # a copy of the `__dict__` may still have this hook in C
    else:
        module.__dict__[_SLOT] = timed.inner


@uncounted
def patch_compile(patches: Patches, make: TimerMaker, on_compiled: Callable[[Any], None]) -> None:
    """Keep timing a module after `compile()`.

    Args:
        on_compiled: called with a module that compiled itself, without raising.
    """
    compile_in_place = torch.nn.Module.compile

    def compile(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: A001 - name of the replaced method
        timed = is_instrumented(self)
        restore_module(self)
        compile_in_place(self, *args, **kwargs)
        if timed:
            instrument_module(self, make)

        on_compiled(self)

    patches.wrap(torch.nn.Module, "compile", compile)


@uncounted
def patch_scripting(patches: Patches) -> None:
    """Hide timers from `torch.jit.script`, which takes what a module's `__dict__` has for data of the model."""
    recursive: Any = sys.modules.get("torch.jit._recursive")
    original = getattr(recursive, "infer_concrete_type_builder", None)
    if original is None:
        return

    def infer_concrete_type_builder(nn_module: Any, *args: Any, **kwargs: Any) -> Any:
        fields = getattr(nn_module, "__dict__", {})
        timer = fields.pop(_SLOT) if hasattr(fields.get(_SLOT), "timed") else None
        try:
            return original(nn_module, *args, **kwargs)
        finally:
            if timer is not None:
                fields[_SLOT] = timer

    patches.wrap(recursive, "infer_concrete_type_builder", infer_concrete_type_builder)
