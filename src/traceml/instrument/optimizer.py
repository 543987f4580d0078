"""Optimizer steps: the outermost attempt, whatever is nested in it, and those that GradScaler skips.

torch's public global hooks fire once per `step` function, so also for the inner optimizer of ZeRO and for a subclass
that calls `super().step()`: only the outermost one is a step. A `step` that raises runs no post hook; the stale depth
is noticed by the frames on the stack.
"""

from __future__ import annotations

import sys
from _thread import get_ident
from typing import Any

from torch.compiler import is_compiling
from torch.optim import optimizer as torch_optimizer

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, StepFlag
from traceml.instrument.clock import OTHER, StepClock
from traceml.instrument.patches import Patches

__all__ = ["patch_grad_scaler", "patch_optimizers"]

_BACKWARD, _OPTIMIZER = int(Phase.BACKWARD), int(Phase.OPTIMIZER)
_SKIPPED = int(StepFlag.SKIPPED)


class _OptimizerTimer:
    """The two global hooks."""

    __slots__ = ("clock", "in_scaler", "inner_steps", "previous")

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.previous = OTHER
        self.in_scaler = False
        self.inner_steps = 0

    def before(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """Runs before every `step` of every torch optimizer."""
        if is_compiling():
            return

        clock = self.clock
        if clock.thread != get_ident() or not clock.current:
            return

        try:
            if clock.depth and (self.in_scaler or self._is_nested()):
                self.inner_steps += 1
                clock.depth += 1
                return

            self.begin(optimizer)
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

    def after(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """Runs after every `step` that did not raise."""
        if is_compiling():
            return

        clock = self.clock
        if clock.thread != get_ident() or not clock.current:
            return

        try:
            if clock.depth > 1 and (self.in_scaler or self._is_nested()):
                clock.depth -= 1
            elif clock.depth:
                self.end(optimizer)
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

    def begin(self, optimizer: Any) -> None:
        """The outermost attempt begins."""
        clock = self.clock
        t = monotonic_ns()
        previous = self.previous = clock.current if not clock.depth else OTHER
        if clock.current != OTHER:
            clock.acc[clock.current] += t - clock.mark

        clock.mark = t
        if id(optimizer) != clock.last_optimizer:
            clock.meet(optimizer)

        if previous == _BACKWARD:
            clock.fused = clock.dirty = True  # counts as one attempt when backward has ended
        elif clock.stepped:
            clock.attempted_again(id(optimizer), t)

        clock.depth = 1
        clock.current = _OPTIMIZER
        clock.open_slots[_OPTIMIZER] = t
        if clock.device is not None:
            clock.device.mark(_OPTIMIZER)

    def end(self, optimizer: Any) -> None:
        """The outermost attempt ends."""
        clock = self.clock
        t = monotonic_ns()
        clock.acc[clock.current] += t - clock.mark
        clock.mark = t
        clock.current = self.previous
        clock.depth = 0
        clock.open_slots[_OPTIMIZER] = 0
        if clock.device is not None:
            clock.device.mark(self.previous)

        if self.previous != _BACKWARD:
            clock.after_step(t, id(optimizer))

    @staticmethod
    def _is_nested() -> bool:
        """Whether another `step` is on the stack above the one that called the hook."""
        frame: Any = sys._getframe(2)
        code = frame.f_code
        frame = frame.f_back
        while frame is not None:
            if frame.f_code is code:
                return True

            frame = frame.f_back

        return False


def patch_optimizers(patches: Patches, clock: StepClock) -> _OptimizerTimer:
    """Install the global step hooks."""
    timer = _OptimizerTimer(clock)
    before = torch_optimizer.register_optimizer_step_pre_hook(timer.before)
    after = torch_optimizer.register_optimizer_step_post_hook(timer.after)
    patches.on_undo(before.remove)
    patches.on_undo(after.remove)
    return timer


def patch_grad_scaler(patches: Patches, clock: StepClock, timer: _OptimizerTimer) -> None:
    """Count `GradScaler.step` as an attempt, also when it leaves the optimizer alone because of inf or nan."""
    from torch.amp.grad_scaler import GradScaler

    original = GradScaler.step

    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or clock.thread != get_ident() or not clock.current or clock.depth or timer.in_scaler:
            return original(self, optimizer, *args, **kwargs)

        try:
            timer.inner_steps = 0
            timer.begin(optimizer)
            timer.in_scaler = True
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

        try:
            return original(self, optimizer, *args, **kwargs)
        finally:
            try:
                timer.in_scaler = False
                if not timer.inner_steps and isinstance(optimizer, torch_optimizer.Optimizer):
                    clock.flags |= _SKIPPED

                timer.end(optimizer)
            except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
                clock.fail(error)

    patches.wrap(GradScaler, "step", step)
