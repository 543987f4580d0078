"""Timing of functions whose whole call is one phase: collectives, copies to a device."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from torch.compiler import is_dynamo_compiling

from traceml.database.schema import Phase
from traceml.instrument.guard import Guard
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock
from traceml.instrument.values.collective_sizes import CollectiveSizes
from traceml.instrument.values.copy_style import CopyStyle

__all__ = [
    "patch_collectives",
    "patch_copies",
    "patch_functional_collectives",
    "patch_remote_calls",
    "timed_call",
]

_H2D, _COMM = int(Phase.H2D), int(Phase.COMM)
# The names depend on the torch version, so they are matched once torch is imported.
_COLLECTIVE = re.compile(
    r"(all_gather|all_reduce|all_to_all|reduce|reduce_scatter|broadcast|gather|scatter|barrier|monitored_barrier"
    r"|send|recv|isend|irecv|batch_isend_irecv)(_.*)?$"
)
_MESSAGE = re.compile(r"send|recv")
_OF_BUFFERS = "_broadcast_coalesced"
_FUNCTIONAL = re.compile(
    r"(all_gather|all_reduce|all_to_all|broadcast|permute|reduce_scatter|wait)_?(tensor|single|inplace|coalesced"
    r"|autograd|into|_)*$"
)


_REMOTE_CALLS = ("rpc_sync", "rpc_async", "remote")

_Recorded = Callable[[tuple[Any, ...], Mapping[str, Any]], None]


@uncounted
def timed_call(
    original: Callable[..., Any], phase: int, clock: StepClock, record: _Recorded | None = None
) -> Callable[..., Any]:
    """Return a function that calls `original` and times it as a phase.

    Args:
        record: takes the arguments of each call.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return original(*args, **kwargs)

        try:
            if record is not None:
                record(args, kwargs)
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

        began = clock.enter(phase)
        if began is None:
            return original(*args, **kwargs)

        try:
            return original(*args, **kwargs)
        finally:
            clock.leave(phase, began)

    return call


def patch_collectives(patches: Patches, clock: StepClock, sizes: CollectiveSizes) -> None:
    """Time the collectives called from Python, and `Work.wait`; record the sizes of their tensors.

    Collectives issued from C++ (DDP's buckets) are not included, except for DDP's broadcast of the model's buffers, as
    those of BatchNorm, in forward.
    """
    distributed, c10d = sys.modules["torch.distributed"], sys.modules["torch.distributed.distributed_c10d"]
    # `vars`, not `getattr`: access to deprecated names would warn.
    names = [name for name in c10d.__all__ if _COLLECTIVE.match(name) and type(vars(c10d).get(name)) is FunctionType]
    for name in names:
        record = sizes.record_message if _MESSAGE.search(name) else sizes.record
        patches.wrap_in((c10d, distributed), name, partial(timed_call, phase=_COMM, clock=clock, record=record))

    if (broadcast := vars(distributed).get(_OF_BUFFERS)) is not None:
        patches.wrap(distributed, _OF_BUFFERS, timed_call(broadcast, _COMM, clock))

    work: Any = getattr(c10d, "Work", None)
    if work is not None:
        patches.wrap(work, "wait", timed_call(work.wait, _COMM, clock))


def patch_functional_collectives(patches: Patches, clock: StepClock) -> None:
    """Time functional collectives, which DTensor calls, and the wait for their results.

    A result waits where it is first used, by `wait_tensor`.
    """
    module = sys.modules["torch.distributed._functional_collectives"]
    for name, value in list(vars(module).items()):
        if type(value) is FunctionType and _FUNCTIONAL.match(name) and value.__module__ == module.__name__:
            patches.wrap(module, name, timed_call(value, _COMM, clock))


def patch_remote_calls(patches: Patches, clock: StepClock, record: _Recorded) -> None:
    """Time calls of functions in other processes (`torch.distributed.rpc`), and the wait for their results.

    Args:
        record: takes the arguments of each call of `init_rpc`.
    """
    package, api = sys.modules["torch.distributed.rpc"], sys.modules["torch.distributed.rpc.api"]
    for name in _REMOTE_CALLS:
        patches.wrap_in((api, package), name, partial(timed_call, phase=_COMM, clock=clock))

    future, reference = sys.modules["torch"]._C.Future, vars(package)["RRef"].__base__  # what C++ returns
    for owner, name in ((future, "wait"), (reference, "to_here")):
        patches.wrap(owner, name, timed_call(getattr(owner, name), _COMM, clock))

    patches.wrap(package, "init_rpc", timed_call(vars(package)["init_rpc"], _COMM, clock, record))


def patch_copies(
    patches: Patches, clock: StepClock, device_types: frozenset[str], style: CopyStyle, guard: Guard
) -> None:
    """Time copies of CPU tensors to a device of one of the given types (`Module.to` calls `Tensor.to`).

    Args:
        style: takes some of the copies.
    """
    if not device_types:
        return

    tensor_type: Any = sys.modules["torch"].Tensor
    for name in ("to", "cuda"):
        patches.wrap(tensor_type, name, _timed_copy(getattr(tensor_type, name), clock, device_types, style, guard))


@uncounted
def _timed_copy(
    original: Any, clock: StepClock, device_types: frozenset[str], style: CopyStyle, guard: Guard
) -> Callable[..., Any]:
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
                if style.wants_more:
                    guard(style.record, self, args, kwargs)
            else:
                clock.cancel(_H2D, began)  # only another dtype

    return copy
