"""Timing of backward passes, and of the part until the last local gradient.

`Tensor.backward` calls `torch.autograd.backward`, so one patch covers both. `torch.autograd.grad` is a backward pass of
the training if it differentiates parameters with `create_graph=False`; inner loops set it to True. `torch.func.grad`
calls it too.

Under DDP all ranks leave backward together, so its wall time says nothing about a rank's own work. A hook on the loss
queues a callback on the autograd engine. It runs after the last local gradient and before DDP's callback, which waits
for the other ranks. It costs 12 us, and as much again for the slow paths around it: see `DetailedSteps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, StepFlag
from traceml.instrument.facts.descriptions import param_groups
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.phase_timer import OTHER, Began, on_training_thread
from traceml.instrument.step_clock import StepClock

__all__ = ["patch_backward", "patch_distributed_backward", "timed_backward"]

_INPUT_WAIT, _BACKWARD = int(Phase.INPUT_WAIT), int(Phase.BACKWARD)
_CALLBACK = int(StepFlag.CALLBACK)
_functorch: Any = getattr(torch._C, "_functorch", None)


def patch_backward(patches: Patches, clock: StepClock, read_loss: Callable[[Any], None]) -> None:
    """Time `torch.autograd.backward` and `torch.autograd.grad` on the training thread.

    Args:
        read_loss: called with the argument of backward in the steps whose loss is read.
    """
    patches.wrap(torch.autograd, "backward", timed_backward(torch.autograd.backward, clock, read_loss))
    patches.wrap(torch.autograd, "grad", _timed_grad(torch.autograd.grad, clock, read_loss))


@uncounted
def patch_distributed_backward(patches: Patches, clock: StepClock) -> None:
    """Time `torch.distributed.autograd.backward`, which goes through the other processes of an RPC job too."""
    import torch.distributed.autograd as owner

    original = owner.backward

    def backward(context: Any, *args: Any, **kwargs: Any) -> Any:
        return _slow_path(lambda _: original(context, *args, **kwargs), clock, _read_nothing, ())

    patches.wrap(owner, "backward", backward)


@uncounted
def timed_backward(
    original: Callable[..., None], clock: StepClock, read_loss: Callable[[Any], None]
) -> Callable[..., None]:
    """Return a function that calls `original` and times it as a backward pass."""
    if clock.hook is not None:
        return clock.hook(clock, _BACKWARD, original, partial(_slow_path, original, clock, read_loss), read_loss)

    fail = clock.fail
    # Cells of the clock.
    current = backward_ns = backwards = rows = loss_mask = 0
    samples = elements = input_samples = input_elements = 0
    open_slots: Any = None
    needs_slow_backward = False

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal current, backward_ns, backwards, samples, elements
        if is_dynamo_compiling():
            return original(tensors, *args, **kwargs)

        if current != OTHER or needs_slow_backward or not on_training_thread():
            return _slow_path(original, clock, read_loss, tensors, *args, **kwargs)

        try:
            if not rows & loss_mask:
                read_loss(tensors)

            t = monotonic_ns()
            current = _BACKWARD
            open_slots[_BACKWARD] = t
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            fail(error)

        try:
            return original(tensors, *args, **kwargs)
        finally:
            try:
                backward_ns += monotonic_ns() - t
                current = OTHER
                open_slots[_BACKWARD] = 0
                backwards += 1
                samples += input_samples
                elements += input_elements
            except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
                fail(error)

    return clock.bind(backward)


@uncounted
def _timed_grad(original: Callable[..., Any], clock: StepClock, read_loss: Callable[[Any], None]) -> Callable[..., Any]:
    """Return a function that calls `original`, which is `torch.autograd.grad`, and times it."""

    def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return original(outputs, inputs, *args, **kwargs)

        inputs = tuple(inputs) if isinstance(inputs, Iterator) else inputs
        if _differentiates_parameters(clock, inputs, kwargs):
            return _slow_path(original, clock, read_loss, outputs, inputs, *args, **kwargs)

        if _is_functorch_gradient(clock, inputs):  # its tensors are wrappers: nothing is read of them or hooked
            return _slow_path(lambda _: original(outputs, inputs, *args, **kwargs), clock, _read_nothing, ())

        began = clock.enter(_BACKWARD)  # a penalty or an inner loop: a part of the step
        try:
            return original(outputs, inputs, *args, **kwargs)
        finally:
            if began is not None:
                clock.leave(_BACKWARD, began)

    return grad


def _differentiates_parameters(clock: StepClock, inputs: Any, options: dict[str, Any]) -> bool:
    """Whether these are gradients of parameters, which an update follows."""
    try:
        values = inputs.values() if isinstance(inputs, dict) else inputs
        is_one = isinstance(values, torch.Tensor) or not isinstance(values, Iterable)
        given = [values] if is_one else list(values)
        if options.get("create_graph") or not all(isinstance(each, torch.Tensor) and each.is_leaf for each in given):
            return False

        if any(isinstance(each, torch.nn.Parameter) for each in given):
            return True

        # Else they are inputs, as for an attack on them, unless an optimizer has them, or may have.
        return len(given) > 1 and (not clock.optimizers_seen or _are_trained(clock, given))
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)
        return False


def _are_trained(clock: StepClock, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an optimizer that has stepped has one of the tensors, or does not show what it has."""
    given = {id(each) for each in tensors}
    for reference in list(clock.optimizers.values()):
        groups = param_groups(reference() if reference else None)
        if not groups or any(id(each) in given for group in groups for each in group["params"]):
            return True

    return False


def _is_functorch_gradient(clock: StepClock, inputs: Any) -> bool:
    """Whether these are gradients by `torch.func.grad` of several tensors, as of a training's parameters.

    Of each sample, too (`vmap` around it). Not those of a transform inside another one that differentiates, nor those
    of an inner loop, which `backward` goes through.
    """
    try:
        several = _functorch is not None and isinstance(inputs, (list, tuple)) and len(inputs) > 1
        if not several or not all(_functorch.is_gradtrackingtensor(each) for each in inputs):
            return False

        whole = _functorch.get_unwrapped(inputs[0])
        return not _functorch.is_functorch_wrapped_tensor(whole) and not whole.requires_grad
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)
        return False


def _read_nothing(_: Any) -> None:
    """Leave the loss of a transform unread."""


@uncounted
def _slow_path(
    original: Callable[..., Any],
    clock: StepClock,
    read_loss: Callable[[Any], None],
    /,
    tensors: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a backward pass inside another phase, on another thread, or with detailed measurement."""
    began = _begin(clock, read_loss, tensors)
    if began is None:
        return original(tensors, *args, **kwargs)

    try:
        return original(tensors, *args, **kwargs)
    finally:
        _end(clock, *began)


def _begin(clock: StepClock, read_loss: Callable[[Any], None], tensors: Any) -> tuple[Began, Any] | None:
    """Begin a backward pass; return its phase and the hook of the loss, or None if it does not count."""
    try:
        previous = clock.current
        if previous in (_INPUT_WAIT, _BACKWARD) or not (clock.is_training_thread() or clock.claim_thread()):
            return None

        if clock.awaits_backward:
            clock.first_backward_begins()

        if clock.evaluation.start:
            clock.evaluation.end(monotonic_ns())

        if not clock.rows & clock.loss_mask:
            read_loss(tensors)

        began = clock.enter(_BACKWARD)
        if began is None:
            return None

        measures_own = clock.is_grouped and clock.is_detailed(clock.step)
        return began, _measure_own(clock, tensors, began[1]) if measures_own else None
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)
        return None


def _end(clock: StepClock, began: Began, handle: Any) -> None:
    try:
        clock.leave(_BACKWARD, began)
        clock.backwards += 1
        clock.samples += clock.input_samples
        clock.elements += clock.input_elements
        clock.after_backward(monotonic_ns())
        clock.plan_backward()
        if handle is not None:
            handle.remove()
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)


def _measure_own(clock: StepClock, tensors: Any, start: int) -> Any:
    """Hook the loss to queue the callback; return the hook's handle, None when there is nothing to hook."""
    # After a step call, the same batch is trained on again: that reduction is for another step call.
    if clock.reductions is not None and (not clock.step_call or clock.ended.may_be_step):
        clock.reductions.count(clock.rows)

    root = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
    if not isinstance(root, torch.Tensor) or not root.requires_grad:
        return None

    before_ns = clock.backward_ns  # phases inside backward subtract their time from it

    def finished() -> None:
        try:
            if clock.device is not None:
                clock.device.mark_own()

            if clock.is_training_thread():  # with a GPU, a thread of autograd runs this: host time says nothing then
                clock.own += monotonic_ns() - start + clock.backward_ns - before_ns
                clock.flags |= _CALLBACK
                clock.needs_slow_commit = True
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

    def queue(_gradient: Any) -> None:
        try:
            torch.autograd.Variable._execution_engine.queue_callback(finished)
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

    return root.register_hook(queue)
