"""Backward passes, and within them the time until the last local gradient was there.

`Tensor.backward` calls `torch.autograd.backward`, so one patch sees both. Under DDP all ranks leave backward together,
hence its wall time says nothing of a rank's own work. A hook on the loss queues a callback on the autograd engine; it
runs after the last local gradient and before DDP's own, which waits for the other ranks. It costs 12 us: see
`StepClock.detail` for which steps have it.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, StepFlag
from traceml.instrument.clock import OTHER, StepClock
from traceml.instrument.patches import Patches

__all__ = ["patch_backward", "timed_backward"]

_BACKWARD = int(Phase.BACKWARD)
_CALLBACK = int(StepFlag.CALLBACK)


def patch_backward(patches: Patches, clock: StepClock) -> None:
    """Time `torch.autograd.backward` on the training thread."""
    patches.wrap(torch.autograd, "backward", timed_backward(torch.autograd.backward, clock))


def timed_backward(original: Callable[..., None], clock: StepClock) -> Callable[..., None]:
    """Return a function that calls `original` as a backward pass."""
    slots, add, fail, after = clock.open_slots, clock.add, clock.fail, clock.after_backward
    # Cells of the clock.
    thread = current = mark = backward_ns = backwards = 0
    detail = watch_backward = False

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal current, mark, backward_ns, backwards
        if is_dynamo_compiling() or (thread != get_ident() and not clock.adopt_thread()):
            return original(tensors, *args, **kwargs)

        previous = current
        if previous == 0 or previous == _BACKWARD:
            return original(tensors, *args, **kwargs)

        handle = None
        try:
            if detail:
                handle = _prepare(clock, tensors)

            t = monotonic_ns()
            if previous != OTHER:
                add(previous, t - mark)

            mark = t
            current = _BACKWARD
            slots[_BACKWARD] = t
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            fail(error)

        try:
            return original(tensors, *args, **kwargs)
        finally:
            try:
                t = monotonic_ns()
                if current == _BACKWARD:
                    backward_ns += t - mark
                else:
                    add(current, t - mark)

                mark = t
                current = previous
                slots[_BACKWARD] = 0
                backwards += 1
                if watch_backward:
                    after(t)

                if handle is not None:
                    handle.remove()
            except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
                fail(error)

    return clock.bind(backward)


def _prepare(clock: StepClock, tensors: Any) -> Any:
    """What some backward passes need before they begin: the first one, and those that are measured in detail."""
    if clock.fresh:
        clock.first_backward_begins()

    return _measure_own(clock, tensors) if clock.detail and clock.extras else None


def _measure_own(clock: StepClock, tensors: Any) -> Any:
    """Queue the callback by a hook on the loss; None when there is nothing to hook."""
    root = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
    if not isinstance(root, torch.Tensor) or not root.requires_grad:
        return None

    before = clock.backward_ns
    thread = clock.thread

    def finished() -> None:
        try:
            if clock.device is not None:
                clock.device.mark_own()

            if thread == get_ident():  # on another device the engine's own thread runs it, and the CPU's clock is mute
                running = monotonic_ns() - clock.mark if clock.current == _BACKWARD else 0
                clock.own += clock.backward_ns + running - before
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
