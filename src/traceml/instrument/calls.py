"""Timing of functions whose whole call is one phase: collectives, checkpoints, copies to a device."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.compiler import is_dynamo_compiling

from traceml.database.schema import Phase
from traceml.instrument.patches import Patches
from traceml.instrument.save_folder import SaveFolder
from traceml.instrument.step_clock import StepClock
from traceml.instrument.values.saves import SaveLog

__all__ = [
    "patch_checkpoint",
    "patch_collectives",
    "patch_copies",
    "patch_distributed_checkpoint",
    "patch_functional_collectives",
    "patch_safetensors",
    "timed_call",
    "timed_save",
]

_H2D, _COMM, _CHECKPOINT = int(Phase.H2D), int(Phase.COMM), int(Phase.CHECKPOINT)
# The names depend on the torch version, so they are matched once torch is imported.
_COLLECTIVE = re.compile(
    r"(all_gather|all_reduce|all_to_all|reduce|reduce_scatter|broadcast|gather|scatter|barrier|monitored_barrier"
    r"|send|recv|isend|irecv|batch_isend_irecv)(_.*)?$"
)
_FUNCTIONAL = re.compile(
    r"(all_gather|all_reduce|all_to_all|broadcast|permute|reduce_scatter|wait)_?(tensor|single|inplace|coalesced"
    r"|autograd|into|_)*$"
)


def timed_call(original: Callable[..., Any], phase: int, clock: StepClock) -> Callable[..., Any]:
    """Return a function that calls `original` and times it as a phase."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return original(*args, **kwargs)

        began = clock.enter(phase)
        if began is None:
            return original(*args, **kwargs)

        try:
            return original(*args, **kwargs)
        finally:
            clock.leave(phase, began)

    return call


def timed_save(original: Callable[..., Any], clock: StepClock, saves: SaveLog) -> Callable[..., Any]:
    """Return a function that calls `original`, times it as `checkpoint`, and takes it down."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return original(*args, **kwargs)

        began = clock.enter(_CHECKPOINT)
        if began is None:
            if clock.current == _CHECKPOINT and clock.is_training_thread():  # it is part of another one
                saves.add_nested(clock, args, kwargs)

            return original(*args, **kwargs)

        try:
            return original(*args, **kwargs)
        finally:
            clock.leave(_CHECKPOINT, began)
            saves.end(clock, args, kwargs, began[1], sys._getframe(1))

    return call


def patch_collectives(patches: Patches, clock: StepClock) -> None:
    """Time the collectives called from Python, and `Work.wait`.

    Collectives issued from C++ (DDP's buckets) are not included.
    """
    distributed, c10d = sys.modules["torch.distributed"], sys.modules["torch.distributed.distributed_c10d"]
    # `vars`, not `getattr`: access to deprecated names would warn.
    names = [name for name in c10d.__all__ if _COLLECTIVE.match(name) and type(vars(c10d).get(name)) is FunctionType]
    for name in names:
        original = getattr(c10d, name)
        wrapper = timed_call(original, _COMM, clock)
        for module in (c10d, distributed):
            if getattr(module, name, None) is original:
                patches.wrap(module, name, wrapper)

    work: Any = getattr(c10d, "Work", None)
    if work is not None:
        patches.replace(work, "wait", _timed_method(work.wait, _COMM, clock))


def patch_functional_collectives(patches: Patches, clock: StepClock) -> None:
    """Time functional collectives, which DTensor calls, and the wait for their results.

    A result waits where it is first used, by `wait_tensor`.
    """
    module = sys.modules["torch.distributed._functional_collectives"]
    for name, value in list(vars(module).items()):
        if type(value) is FunctionType and _FUNCTIONAL.match(name) and value.__module__ == module.__name__:
            patches.wrap(module, name, timed_call(value, _COMM, clock))


def patch_checkpoint(patches: Patches, clock: StepClock, folder: SaveFolder, saves: SaveLog) -> None:
    """Time `torch.save`, and note its folder."""
    torch, serialization = sys.modules["torch"], sys.modules["torch.serialization"]
    wrapper = folder.watch(timed_save(serialization.save, clock, saves), 1, "f")
    patches.wrap(torch, "save", wrapper)
    patches.wrap(serialization, "save", wrapper)


def patch_distributed_checkpoint(patches: Patches, clock: StepClock, folder: SaveFolder, saves: SaveLog) -> None:
    """Time the functions that save a distributed checkpoint, and note the folder that has its folder."""
    package, saver = (
        sys.modules["torch.distributed.checkpoint"],
        sys.modules.get("torch.distributed.checkpoint.state_dict_saver"),
    )
    for name in ("save", "async_save", "save_state_dict"):
        original = getattr(saver, name, None)
        if original is None:
            continue

        wrapper = folder.watch(timed_save(original, clock, saves), -1, "checkpoint_id")
        for module in (package, saver):
            if getattr(module, name, None) is original:
                patches.wrap(module, name, wrapper)


def patch_safetensors(patches: Patches, clock: StepClock, folder: SaveFolder, saves: SaveLog) -> None:
    """Time the writing of safetensors by two inner functions: other packages hold references to the public ones."""
    module = sys.modules["safetensors.torch"]
    for name in ("_flatten", "serialize_file"):
        original = vars(module).get(name)
        if callable(original):
            timed = timed_save(original, clock, saves)
            patches.wrap(module, name, folder.watch(timed, 1, "filename") if name == "serialize_file" else timed)


def patch_copies(patches: Patches, clock: StepClock, device_types: frozenset[str]) -> None:
    """Time copies of CPU tensors to a device of one of the given types (`Module.to` calls `Tensor.to`)."""
    if not device_types:
        return

    tensor_type: Any = sys.modules["torch"].Tensor
    for name in ("to", "cuda"):
        patches.wrap(tensor_type, name, _timed_copy(getattr(tensor_type, name), clock, device_types))


def _timed_copy(original: Any, clock: StepClock, device_types: frozenset[str]) -> Callable[..., Any]:
    def copy(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or self.device.type != "cpu":
            return original(self, *args, **kwargs)

        began = clock.enter(_H2D)
        if began is None:
            return original(self, *args, **kwargs)

        copied = False
        try:
            result = original(self, *args, **kwargs)
            copied = result.device.type in device_types
            return result
        finally:
            if copied:
                clock.leave(_H2D, began)
            else:
                clock.cancel(_H2D, began)  # only another dtype

    return copy


def _timed_method(original: Any, phase: int, clock: StepClock) -> Callable[..., Any]:
    """Return a timed method for a C type, whose instances bind only Python functions."""
    timed = timed_call(original, phase, clock)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return timed(self, *args, **kwargs)

    method.__name__, method.__doc__ = original.__name__, original.__doc__
    return method
