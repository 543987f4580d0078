"""Backward passes, and within them the time until the last local gradient was there.

`Tensor.backward` calls `torch.autograd.backward`, so one patch sees both. Under DDP all ranks leave backward together,
hence its wall time says nothing of a rank's own work. A hook on the loss queues a callback on the autograd engine; it
runs after the last local gradient and before DDP's own, which waits for the other ranks. It costs 12 us: see
`StepClock.detail` for which steps have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, StepFlag
from traceml.instrument.accumulator import OTHER, on_training_thread
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock

__all__ = ["patch_backward", "timed_backward"]

_INPUT_WAIT, _BACKWARD = int(Phase.INPUT_WAIT), int(Phase.BACKWARD)
_CALLBACK = int(StepFlag.CALLBACK)


def patch_backward(patches: Patches, clock: StepClock) -> None:
    """Time `torch.autograd.backward` on the training thread."""
    patches.wrap(torch.autograd, "backward", timed_backward(torch.autograd.backward, clock))


def timed_backward(original: Callable[..., None], clock: StepClock) -> Callable[..., None]:
    """Return a function that calls `original` as a backward pass."""
    slots = clock.open_slots
    # Cells of the clock.
    current = backward_ns = backwards = 0
    detail = False

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal current, backward_ns, backwards
        if is_dynamo_compiling():
            return original(tensors, *args, **kwargs)

        if current != OTHER or detail or not on_training_thread():
            return _careful(original, clock, tensors, args, kwargs)

        t = monotonic_ns()
        current = _BACKWARD
        slots[_BACKWARD] = t
        try:
            return original(tensors, *args, **kwargs)
        finally:
            backward_ns += monotonic_ns() - t
            current = OTHER
            slots[_BACKWARD] = 0
            backwards += 1

    return clock.bind(backward)


def _careful(original: Callable[..., Any], clock: StepClock, tensors: Any, args: Any, kwargs: Any) -> Any:
    """A backward pass inside another phase, on another thread, or of which more must be known."""
    previous = clock.current
    if previous in (_INPUT_WAIT, _BACKWARD) or not (clock.is_here() or clock.adopt_thread()):
        return original(tensors, *args, **kwargs)

    handle = None
    t = 0
    try:
        if clock.fresh:
            clock.first_backward_begins()

        t = monotonic_ns()
        clock.current = _BACKWARD
        clock.open_slots[_BACKWARD] = t
        if clock.is_detailed(clock.rows):
            handle = _measure_own(clock, tensors, t)
    except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
        clock.fail(error)

    try:
        return original(tensors, *args, **kwargs)
    finally:
        try:
            clock.leave(_BACKWARD, previous, t)
            clock.backwards += 1
            clock.after_backward(monotonic_ns())
            clock.plan()
            if handle is not None:
                handle.remove()
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)


def _measure_own(clock: StepClock, tensors: Any, start: int) -> Any:
    """Queue the callback by a hook on the loss; None when there is nothing to hook."""
    root = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
    if not isinstance(root, torch.Tensor) or not root.requires_grad:
        return None

    booked = clock.backward_ns  # phases inside backward take their time from here

    def finished() -> None:
        try:
            if clock.device is not None:
                clock.device.mark_own()

            if clock.is_here():  # on another device the engine's own thread runs it, and the CPU's clock is mute
                clock.own += monotonic_ns() - start + clock.backward_ns - booked
                clock.flags |= _CALLBACK
                clock.dirty = True
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

    def queue(_gradient: Any) -> None:
        try:
            torch.autograd.Variable._execution_engine.queue_callback(finished)
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

    return root.register_hook(queue)
