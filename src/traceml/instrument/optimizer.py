"""Optimizer steps: the outermost attempt, whatever is nested in it, and those that GradScaler skips.

The `step` of each optimizer class that is in use is replaced. (torch's global step hooks would do, but cost 1 us more per
step, and none is called after a `step` that raised.) Steps inside a step, of ZeRO's inner optimizer or by
`super().step()`, belong to the outermost one.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable
from typing import Any

from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, StepFlag
from traceml.instrument.clock import NOWHERE, OTHER, StepClock
from traceml.instrument.patches import Patches

__all__ = ["patch_grad_scaler", "patch_optimizer_type", "timed_step"]

_BACKWARD, _OPTIMIZER = int(Phase.BACKWARD), int(Phase.OPTIMIZER)
_SKIPPED = int(StepFlag.SKIPPED)


def patch_optimizer_type(patches: Patches, clock: StepClock, kind: type[Any]) -> None:
    """Time the steps of all optimizers of one class, once."""
    owner = next((base for base in kind.__mro__ if "step" in vars(base)), None)
    if owner is None or owner is Optimizer or getattr(vars(owner)["step"], "_traceml_clock", None) is clock:
        return

    wrapper = timed_step(vars(owner)["step"], clock)
    patches.wrap(owner, "step", wrapper)
    wrapper._traceml_clock = clock  # type: ignore[attr-defined]


def timed_step(original: Callable[..., Any], clock: StepClock) -> Callable[..., Any]:
    """Return a method that calls `original` as an optimizer attempt."""
    slots, fail = clock.open_slots, clock.fail
    # Cells of the clock.
    thread = current = mark = depth = optimizer_ns = attempt = last_optimizer = 0
    dirty = False
    first_loader: Any = None
    closes_at: Any = NOWHERE
    usual: Any = NOWHERE
    usual_loader: Any = NOWHERE

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal current, mark, depth, optimizer_ns, attempt, closes_at
        if is_dynamo_compiling() or thread != get_ident() or not current:
            return original(self, *args, **kwargs)

        if depth:
            clock.inner_steps += 1
            return original(self, *args, **kwargs)

        previous = current
        ident = id(self)
        try:
            t = monotonic_ns()
            if attempt or previous != OTHER or ident != last_optimizer:
                clock.begin_attempt(self, t)
            else:
                depth = 1
                mark = t
                current = _OPTIMIZER
                slots[_OPTIMIZER] = t
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            fail(error)

        try:
            result = original(self, *args, **kwargs)
        except BaseException:
            _end(clock, self, previous, failed=True)
            raise

        try:
            if dirty or attempt or first_loader is not usual_loader or current != _OPTIMIZER:
                clock.end_attempt(self, previous, failed=False)
                return result

            t = monotonic_ns()
            optimizer_ns += t - mark
            mark = t
            current = previous
            depth = 0
            slots[_OPTIMIZER] = 0
            attempt = ident
            closes_at = usual
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            fail(error)

        return result

    return clock.bind(step)


def patch_grad_scaler(patches: Patches, clock: StepClock) -> None:
    """Count `GradScaler.step` as an attempt, also when it leaves the optimizer alone because of inf or nan."""
    from torch.amp.grad_scaler import GradScaler

    original = GradScaler.step

    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or clock.thread != get_ident() or not clock.current or clock.depth:
            return original(self, optimizer, *args, **kwargs)

        previous = OTHER
        try:
            previous = clock.begin_attempt(optimizer, monotonic_ns())
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

        failed = True
        try:
            result = original(self, optimizer, *args, **kwargs)
            failed = False
            return result
        finally:
            if not clock.inner_steps and not failed and isinstance(optimizer, Optimizer):
                clock.flags |= _SKIPPED
                clock.dirty = True

            _end(clock, optimizer, previous, failed=failed)

    patches.wrap(GradScaler, "step", step)


def _end(clock: StepClock, optimizer: Any, previous: int, *, failed: bool) -> None:
    try:
        clock.end_attempt(optimizer, previous, failed=failed)
    except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
        clock.fail(error)
