"""Functions of frameworks, timed as phases of the step; `framework_trainers` names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from traceml.instrument.guard import guarded
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.maintenance.rare_events import RareEvents
from traceml.instrument.patches import Patches

if TYPE_CHECKING:
    from traceml.instrument.checkpoints.patch_checkpoints import CheckpointPatches

__all__ = ["FrameworkCalls"]


class FrameworkCalls:
    """Timed functions of frameworks; each is timed once.

    Args:
        checkpoints: returns what times saving, once torch is imported.

    Attributes:
        set_step: gives the next step a number; see `traceml.set_step`.
    """

    def __init__(
        self,
        events: RareEvents,
        patches: Patches,
        checkpoints: Callable[[], CheckpointPatches],
        set_step: Callable[[int], int | None],
    ) -> None:
        self._events, self._patches, self._checkpoints, self.set_step = events, patches, checkpoints, set_step
        self._clock, self.guard = events.clock, events.guard
        self._timed: set[tuple[Any, str]] = set()

    @guarded
    def time_saving(self, owner: Any, name: str) -> None:
        """Time the calls of a framework's function as `checkpoint`, if it exists."""
        self._time(owner, name, self._checkpoints().saving)

    @guarded
    def time_update(self, owner: Any, name: str) -> None:
        """Time the calls of a framework's function as part of `optimizer`, if it exists."""
        from traceml.instrument.optimizer import timed_update

        self._time(owner, name, lambda original: timed_update(original, self._clock))

    @guarded
    def time_forward(self, owner: Any, name: str, module_of: Callable[[Any], Any]) -> None:
        """Time the calls of a framework's method as calls of the model, if it exists.

        Args:
            module_of: returns the model of the method's object.
        """
        from traceml.instrument.forward import timed_forward

        if self._events.torch_hooks is not None:
            measure = self._events.torch_hooks.batches.measure
            self._time(owner, name, lambda original: timed_forward(original, self._clock, module_of, measure))

    @uncounted
    def before_call(self, owner: Any, name: str, action: Callable[..., None]) -> None:
        """Call `action` with the arguments of each call of a framework's rare function, before it."""

        def following(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.guard(action, *args, **kwargs)
                return original(*args, **kwargs)

            return call

        self.guard(self._time, owner, name, following)

    def _time(self, owner: Any, name: str, timed: Callable[[Any], Any]) -> None:
        if self._clock.thread and name in vars(owner) and (owner, name) not in self._timed:
            self._timed.add((owner, name))
            self._patches.wrap(owner, name, timed(vars(owner)[name]))
