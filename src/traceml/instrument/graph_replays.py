"""Replays of CUDA graphs: computation that no hook of a module or an optimizer sees.

A graph that was captured while an optimizer stepped holds a whole step: each replay is one. The time of a replay counts
as forward, on the device as well, unless it is inside another phase, as that of a compiled model is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase
from traceml.instrument.guard import Guard
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.phase_timer import OTHER, Began
from traceml.instrument.step_clock import StepClock

__all__ = ["patch_graph_replays"]

_FORWARD = int(Phase.FORWARD)


def patch_graph_replays(patches: Patches, clock: StepClock, guard: Guard) -> None:
    """Time replays of graphs, and see the steps in them."""
    graph_type: Any = torch.cuda.CUDAGraph
    methods = vars(graph_type)
    if not {"capture_begin", "capture_end", "replay"} <= methods.keys():  # another version of torch
        return

    captures = _Captures()
    patches.follow(graph_type, "capture_begin", guard.wrap(captures.begun))
    patches.follow(graph_type, "capture_end", guard.wrap(captures.ended))
    patches.wrap(graph_type, "replay", _timed_replay(methods["replay"], clock, captures.optimizer_of))


class _Captures:
    """Graphs, and the optimizers that stepped while they were captured."""

    def __init__(self) -> None:
        self._watches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # graph that is captured -> handle of a hook
        self._optimizers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def begun(self, graph: Any) -> None:
        """Watch which optimizer steps during a capture."""
        found = self._optimizers

        def stepped(optimizer: Any, *_: Any) -> None:
            found[graph] = id(optimizer)

        self._watches[graph] = register_optimizer_step_post_hook(stepped)

    def ended(self, graph: Any) -> None:
        """Watch no longer."""
        if (watch := self._watches.pop(graph, None)) is not None:
            watch.remove()

    def optimizer_of(self, graph: Any) -> int:
        """Return the id of the optimizer whose step a graph holds; 0 if it holds none."""
        return self._optimizers.get(graph, 0)


@uncounted
def _timed_replay(
    original: Callable[..., Any], clock: StepClock, optimizer_of: Callable[[Any], int]
) -> Callable[..., Any]:
    def replay(self: Any, *args: Any, **kwargs: Any) -> Any:
        if clock.current != OTHER or not clock.is_training_thread():
            return original(self, *args, **kwargs)

        optimizer, stepped = optimizer_of(self), 0
        began = _begin(clock, optimizer)
        try:
            result = original(self, *args, **kwargs)
            stepped = optimizer
            return result
        finally:
            _end(clock, began, stepped)

    return replay


def _begin(clock: StepClock, optimizer: int) -> Began | None:
    try:
        if optimizer:
            clock.forward_begins(monotonic_ns(), _no_module, trains=True)

        return clock.enter(_FORWARD)
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)
        return None


def _end(clock: StepClock, began: Began | None, optimizer: int) -> None:
    try:
        if began is not None:
            clock.leave(_FORWARD, began)
            if optimizer:
                clock.backwards = clock.backwards or 1  # unless the graph holds the optimizer alone
                clock.step_without_call(monotonic_ns(), optimizer)
    except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
        clock.fail(error)


def _no_module() -> None:
    """Stand in for a weak reference to the model, which is not known."""
