"""Backward passes, and within them the time until the last local gradient was there.

`Tensor.backward` calls `torch.autograd.backward`, so one patch sees both. Under DDP all ranks leave backward together,
hence its wall time says nothing of a rank's own work. A hook on the loss queues a callback on the autograd engine; it
runs after the last local gradient and before DDP's own, which waits for the other ranks. It costs 12 us: see
`StepClock.detail` for which steps have it.
"""

from __future__ import annotations

from _thread import get_ident
from typing import Any

import torch
from torch.compiler import is_compiling

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, StepFlag
from traceml.instrument.clock import OTHER, StepClock
from traceml.instrument.patches import Patches

__all__ = ["patch_backward"]

_BACKWARD = int(Phase.BACKWARD)
_CALLBACK = int(StepFlag.CALLBACK)


def patch_backward(patches: Patches, clock: StepClock) -> None:
    """Time `torch.autograd.backward` on the training thread."""
    original = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or (clock.thread != get_ident() and not clock.adopt_thread()):
            return original(tensors, *args, **kwargs)

        previous = clock.current
        if previous == 0 or previous == _BACKWARD:
            return original(tensors, *args, **kwargs)

        handle = None
        try:
            if clock.fresh:
                clock.first_backward_begins()

            t = monotonic_ns()
            if previous != OTHER:
                clock.acc[previous] += t - clock.mark

            clock.mark = t
            clock.current = _BACKWARD
            clock.open_slots[_BACKWARD] = t
            if clock.device is not None:
                clock.device.mark(_BACKWARD)

            if clock.detail:
                handle = _measure_own(clock, tensors)
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

        try:
            return original(tensors, *args, **kwargs)
        finally:
            try:
                t = monotonic_ns()
                clock.acc[clock.current] += t - clock.mark
                clock.mark = t
                clock.current = previous
                clock.open_slots[_BACKWARD] = 0
                if clock.device is not None:
                    clock.device.mark(previous)

                clock.backwards += 1
                if clock.fused or clock.watch_backward:
                    clock.after_backward(t)

                if handle is not None:
                    handle.remove()
            except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
                clock.fail(error)

    patches.wrap(torch.autograd, "backward", backward)


def _measure_own(clock: StepClock, tensors: Any) -> Any:
    """Queue the callback by a hook on the loss; None when there is nothing to hook."""
    root = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
    if not isinstance(root, torch.Tensor) or not root.requires_grad:
        return None

    before = clock.acc[_BACKWARD]
    thread = clock.thread

    def finished() -> None:
        try:
            if clock.device is not None:
                clock.device.mark_own()

            if thread == get_ident():  # on another device the engine's own thread runs it, and the CPU's clock is mute
                running = monotonic_ns() - clock.mark if clock.current == _BACKWARD else 0
                clock.own += clock.acc[_BACKWARD] + running - before
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
