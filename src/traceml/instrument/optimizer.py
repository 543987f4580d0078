"""Timing of optimizer steps: outermost step calls, including those that GradScaler skips.

We replace the `step` of each optimizer class in use. (torch's global step hooks cost 1 us more per step, and none runs
after a `step` that raised.) Nested steps, of ZeRO's inner optimizer or by `super().step()`, are part of the outermost.
A closure given to `step` is code of the training loop, and no part of the optimizer.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from _thread import get_ident
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.optim import Optimizer

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, StepFlag
from traceml.instrument.facts.instance_attributes import instance_attribute
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.phase_timer import NOT_READY, OTHER, Began, on_training_thread
from traceml.instrument.step_clock import StepClock
from traceml.instrument.timed_calls import timed_call

__all__ = [
    "is_wrapper",
    "patch_clipping",
    "patch_grad_scaler",
    "patch_optimizer",
    "patch_optimizer_type",
    "patch_unscaling",
    "timed_step",
    "timed_update",
]

_log = logging.getLogger("traceml")

# Their optimizers wrap the user's. They step it, or skip it while gradients accumulate.
_FRAMEWORKS = {"accelerate", "lightning", "lightning_fabric", "opacus", "pytorch_lightning"}
_CLIPPING = ("clip_grad_norm_", "clip_grad_value_")
_INPUT_WAIT, _BACKWARD, _OPTIMIZER = int(Phase.INPUT_WAIT), int(Phase.BACKWARD), int(Phase.OPTIMIZER)
_SKIPPED, _CLOSURES = int(StepFlag.SKIPPED), int(StepFlag.CLOSURES)


def is_wrapper(cls: type[Any]) -> bool:
    """Whether this class is a framework's wrapper around another optimizer."""
    owner = _owner(cls)
    return owner is not None and owner.__module__.partition(".")[0] in _FRAMEWORKS


def _owner(cls: type[Any]) -> type[Any] | None:
    return next((base for base in cls.__mro__ if "step" in vars(base)), None)


def patch_optimizer_type(patches: Patches, clock: StepClock, cls: type[Any]) -> None:
    """Time the steps of all optimizers of one class, once."""
    owner = _owner(cls)
    if owner is None or owner is Optimizer or is_wrapper(cls):
        return

    if getattr(vars(owner)["step"], "_traceml_clock", None) is clock:
        return

    wrapper = timed_step(vars(owner)["step"], clock)
    patches.wrap(owner, "step", wrapper)
    wrapper._traceml_clock = clock  # type: ignore[attr-defined]


@uncounted
def patch_optimizer(patches: Patches, clock: StepClock, optimizer: Any) -> None:
    """Time the steps of an optimizer that is alive.

    An LR scheduler gives its optimizer an instance attribute `step` that calls the class's `step` of that time.
    """
    patch_optimizer_type(patches, clock, type(optimizer))
    own = instance_attribute(optimizer, "step")
    if own is None or getattr(own, "_traceml_clock", None) is clock or is_wrapper(type(optimizer)):
        return

    if isinstance(own, MethodType) and own.__self__ is optimizer:
        patches.on_undo(_time_bound_step(clock, optimizer, own.__func__))
    else:
        patches.on_undo(_time_plain_step(clock, optimizer, own))


@uncounted
def _time_bound_step(clock: StepClock, optimizer: Any, function: Callable[..., Any]) -> Callable[[], None]:
    """Time a bound method of the instance. It stays one: schedulers read its function."""
    timed = timed_step(function, clock)
    functools.update_wrapper(timed, function)
    timed._traceml_clock = clock  # type: ignore[attr-defined]
    optimizer.step = MethodType(timed, optimizer)
    return functools.partial(_restore_step, weakref.ref(optimizer), weakref.ref(timed))


@uncounted
def _time_plain_step(clock: StepClock, optimizer: Any, own: Callable[..., Any]) -> Callable[[], None]:
    """Time a function that the instance has as its `step`."""
    ref = weakref.ref(optimizer)
    timed = timed_step(lambda _self, *args, **kwargs: own(*args, **kwargs), clock)

    def step(*args: Any, **kwargs: Any) -> Any:
        return timed(ref(), *args, **kwargs)

    functools.update_wrapper(step, own)  # copies the attribute by which schedulers recognize their wrapper
    step._traceml_clock = clock  # type: ignore[attr-defined]
    optimizer.step = step
    return functools.partial(_restore_step, ref, weakref.ref(step))


def _restore_step(optimizer: weakref.ref[Any], step: weakref.ref[Any]) -> None:
    """Put back what the instance had as its `step`, unless that was replaced again. It keeps neither of them."""
    alive = optimizer()
    if alive is None:
        return

    found = instance_attribute(alive, "step")
    if found is None or getattr(found, "__func__", found) is not step():
        return

    original = found.__wrapped__
    alive.step = MethodType(original, alive) if isinstance(found, MethodType) else original


@uncounted
def timed_step(original: Callable[..., Any], clock: StepClock) -> Callable[..., Any]:
    """Return a method that calls `original` and times it as a step call."""
    if clock.hook is not None:
        return clock.hook(clock, _OPTIMIZER, original, functools.partial(_slow_path, original, clock))

    fail = clock.fail
    # Cells of the clock.
    current = optimizer_ns = step_call = last_optimizer = 0
    open_slots: Any = None
    first_loader: Any = None
    closing_trigger: Any = NOT_READY
    usual_trigger: Any = NOT_READY
    usual_loader: Any = NOT_READY

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal current, optimizer_ns, step_call, closing_trigger
        if is_dynamo_compiling():
            return original(self, *args, **kwargs)

        ident = id(self)
        if (
            current != OTHER
            or step_call
            or ident != last_optimizer
            or first_loader is not usual_loader
            or not on_training_thread()
        ):
            return _slow_path(original, clock, self, *args, **kwargs)

        try:
            t = monotonic_ns()
            current = _OPTIMIZER
            open_slots[_OPTIMIZER] = t
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            fail(error)

        try:
            result = original(self, *args, **kwargs)
            step_call, closing_trigger = ident, usual_trigger
            return result
        finally:
            try:
                optimizer_ns += monotonic_ns() - t
                current = OTHER
                open_slots[_OPTIMIZER] = 0
            except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
                fail(error)

    return clock.bind(step)


@uncounted
def timed_update(original: Callable[..., Any], clock: StepClock) -> Callable[..., Any]:
    """Return a function that calls `original` and times it as optimizer work without a step call, such as clipping."""
    timed = timed_call(original, _OPTIMIZER, clock)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (timed if clock.current == OTHER else original)(*args, **kwargs)

    return call


@uncounted
def _slow_path(original: Callable[..., Any], clock: StepClock, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an optimizer step that differs from the usual loop; `self`, which may be given by name, is the optimizer."""
    began = _begin(clock, self)
    if began is None:
        return original(self, *args, **kwargs)

    failed = True
    closure: Any = args[0] if args else kwargs.get("closure")
    has_closure = callable(closure) and not isinstance(closure, Module)  # a module is another kind of argument
    if has_closure:
        apart = _apart(closure, clock, began)
        args, kwargs = ((apart, *args[1:]), kwargs) if args else (args, {**kwargs, "closure": apart})

    try:
        result = original(self, *args, **kwargs)
        failed = False
        return result
    finally:
        if clock.closure_calls > 1:
            clock.flags |= _CLOSURES
            clock.needs_slow_commit = True

        _end(clock, self, began, failed=failed)
        if has_closure:
            clock.last_optimizer = 0  # the next step takes this path, too


@uncounted
def _apart(closure: Callable[..., Any], clock: StepClock, began: Began) -> Callable[..., Any]:
    """Return a function that calls a closure, whose time is not the optimizer's.

    L-BFGS calls it up to 20 times in a step: all but the first repeat the same data, unless they take a batch.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        interrupted = clock.interrupt(_OPTIMIZER, began)
        clock.closure_calls += 1
        batches, *data = clock.batches, clock.backwards, clock.samples, clock.elements
        try:
            return closure(*args, **kwargs)
        finally:
            if interrupted:
                if data[0] and clock.batches == batches:
                    clock.backwards, clock.samples, clock.elements = data

                clock.resume(_OPTIMIZER, began)

    functools.update_wrapper(call, closure)  # with its attributes, which the optimizer may read
    return call


@uncounted
def patch_grad_scaler(patches: Patches, clock: StepClock, on_unread_skips: Callable[[], None]) -> None:
    """Count `GradScaler.step` as a step call, also when it skips the optimizer because of inf or nan.

    Args:
        on_unread_skips: called where the kernel of a fused optimizer may skip the update on a device.
    """
    from torch.amp.grad_scaler import GradScaler

    original = GradScaler.step

    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        began = None if is_dynamo_compiling() or clock.depth else _begin(clock, optimizer)
        if began is None:
            return original(self, optimizer, *args, **kwargs)

        failed = True
        own = _count_own_step(clock, optimizer)
        try:
            result = original(self, optimizer, *args, **kwargs)
            failed = False
            return result
        finally:
            _restore_own_step(clock, optimizer, own)
            if not failed:
                _note_skip(clock, self, optimizer, on_unread_skips)

            _end(clock, optimizer, began, failed=failed)

    patches.wrap(GradScaler, "step", step)


def _count_own_step(clock: StepClock, optimizer: Any) -> Any:
    """Count calls of a `step` that the optimizer itself has, and which may not call the timed one of its class.

    Accelerate gives its optimizers one for each call of the scaler, which calls the method of the time of `prepare`.

    Returns:
        that `step`, for `_restore_own_step`; None without one that has to be counted.
    """
    try:
        own = instance_attribute(optimizer, "step") if isinstance(optimizer, Optimizer) else None
        if own is None or getattr(own, "_traceml_clock", None) is clock:  # also a scheduler's: it calls the timed one
            return None

        optimizer.step = _counting(own, clock)
        return own
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)
        return None


@uncounted
def _counting(own: Callable[..., Any], clock: StepClock) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        clock.inner_steps += 1
        return own(*args, **kwargs)

    functools.update_wrapper(counted, own)
    counted._traceml_counts = True  # type: ignore[attr-defined]
    return counted


def _restore_own_step(clock: StepClock, optimizer: Any, own: Any) -> None:
    try:
        if own is not None and hasattr(optimizer.step, "_traceml_counts"):
            optimizer.step = own
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)


def _note_skip(clock: StepClock, scaler: Any, optimizer: Any, on_unread_skips: Callable[[], None]) -> None:
    """Flag the step if GradScaler has changed nothing in it, as far as that is known without waiting for a device."""
    try:
        if clock.inner_steps:
            is_skipped = _skips_itself(scaler, optimizer, on_unread_skips)
        else:
            is_skipped = isinstance(optimizer, Optimizer)

        if is_skipped:
            clock.flags |= _SKIPPED
            clock.needs_slow_commit = True
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)


def _skips_itself(scaler: Any, optimizer: Any, on_unread_skips: Callable[[], None]) -> bool:
    """Whether an optimizer has skipped its step: a fused one gets what the scaler has found, and its kernel skips."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False

    states = getattr(scaler, "_per_optimizer_states", {})  # one that is not enabled has none
    found = states.get(id(optimizer), {}).get("found_inf_per_device", {})
    if all(each.is_cpu for each in found.values()):
        return any(each.item() for each in found.values())

    on_unread_skips()
    return False


def patch_clipping(patches: Patches, clock: StepClock) -> None:
    """Time what is done to the gradients before an optimizer step: clipping, and unscaling by GradScaler."""
    from torch.amp.grad_scaler import GradScaler
    from torch.nn import utils

    for name in _CLIPPING:
        patches.wrap_in((utils, utils.clip_grad), name, lambda original: timed_update(original, clock))

    patch_unscaling(patches, clock, GradScaler)


def patch_unscaling(patches: Patches, clock: StepClock, scaler_type: Any) -> None:
    """Time what a class of scalers does to the gradients before the step."""
    patches.wrap(scaler_type, "unscale_", timed_update(scaler_type.unscale_, clock))


def _begin(clock: StepClock, optimizer: Any) -> Began | None:
    """Begin an optimizer step call; return None if it is not a step call of its own."""
    try:
        if clock.current == _INPUT_WAIT:
            return None

        if not (clock.is_training_thread() or clock.claim_thread()):
            _warn_of_other_thread(clock)
            return None

        if clock.depth or clock.current == _OPTIMIZER:
            clock.inner_steps += 1
            return None

        return clock.begin_step_call(optimizer, monotonic_ns())
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)
        return None


def _warn_of_other_thread(clock: StepClock) -> None:
    """Log, once, that two threads of the script train at the same time, of which one is traced."""
    # Autograd has threads of its own, in which hooks of a backward pass may step.
    if clock.warned_of_thread or clock.current == _BACKWARD or not clock.has_stepped:
        return

    known = (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))
    names = {thread.ident: thread.name for thread in known}
    own, traced = (names.get(ident) for ident in (get_ident(), clock.thread))
    if own is None or traced is None:
        return

    clock.warned_of_thread = True
    _log.warning(
        "an optimizer steps in the thread %s while the training in the thread %s is traced: only the steps of the "
        "latter are counted. Train them one after the other, or in separate processes, to trace both.",
        own,
        traced,
    )


def _end(clock: StepClock, optimizer: Any, began: Began, *, failed: bool) -> None:
    try:
        clock.end_step_call(optimizer, began, failed=failed)
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)
