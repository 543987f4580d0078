"""Work at the rare events of the clock: searches for models and devices, and reports of what the steps show."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from traceml.database.flight.flight import FlightFile
from traceml.database.info_kinds import InfoKind
from traceml.instrument.clock_implementations import new_clock
from traceml.instrument.divided_step import StepListener
from traceml.instrument.facts.fact_reports import FactReports, Info
from traceml.instrument.groups.default_group import DefaultGroup, OnGroup
from traceml.instrument.guard import Guard
from traceml.instrument.patches import Patches
from traceml.instrument.search.iterators import BatchSource, batch_source_of
from traceml.instrument.values.step_pace import StepPace

if TYPE_CHECKING:
    from traceml.instrument.search.live_objects import LiveObjects
    from traceml.instrument.torch_hooks import TorchHooks

__all__ = ["RareEvents"]


class RareEvents(StepListener):
    """Listener of the clock that it makes.

    Attributes:
        clock: the clock of the open step; `clock.errors` counts internal errors. After one, the hooks are off.
        guard: runs rare actions of all hooks.
        torch_hooks: the hooks on torch; None until it is imported.
        batch_source: the code that gives batches to a training without a loader; None before its first backward pass.
    """

    def __init__(
        self,
        flight: FlightFile,
        patches: Patches,
        on_info: Callable[[Info], None] | None,
        on_group: OnGroup | None,
        thread: int,
    ) -> None:
        self.clock = new_clock(flight, self, thread=thread)
        self.guard = Guard(self.clock)
        self.facts = FactReports(self.clock, on_info)
        self.group = DefaultGroup(self.clock, patches, self.facts.report, self.guard, on_group)
        self.torch_hooks: TorchHooks | None = None
        self.batch_source: BatchSource | None = None
        self._pace = StepPace()

    def first_backward(self) -> bool:
        """Search for models and optimizers, all of which exist at the first backward pass."""
        from traceml.instrument.search.live_objects import find_live

        alive = functools.cache(find_live)
        if self.torch_hooks is not None:
            self.torch_hooks.look_for_device()
            self.guard(_find_models, self.torch_hooks, alive)
            self.guard(self.torch_hooks.unchanged_weights.begin)

        if self.clock.first_loader is None:
            self.guard(self._look_for_iterators, alive)

        self.guard(self.group.report_mesh)
        self.guard(self.facts.debugging)
        return self.torch_hooks is None or self.clock.optimizers_alive > 0

    def _look_for_iterators(self, alive: Callable[[], LiveObjects]) -> None:
        self.batch_source = batch_source_of(alive().generators)

    def find_new_models(self) -> None:
        """Time the models made since the last search; next to nothing if there is none."""
        if self.torch_hooks is not None:
            self.guard(self.torch_hooks.discovery.search_recent)

    def new_optimizer(self, optimizer: Any) -> None:
        """Report an optimizer at its first step."""
        if self.batch_source is not None:
            self.batch_source = self.batch_source.as_optimizer_steps()

        if self.torch_hooks is not None:
            self.guard(self.torch_hooks.kept_gradients.watch, optimizer)
            if self.clock.optimizers_seen > 1:
                self.guard(self.torch_hooks.discovery.search_for, optimizer)

        self.guard(self.facts.optimizer, optimizer)

    def is_trained(self, module: Any) -> bool:
        """Return whether an optimizer has parameters of the module; where none is known, any model is trained."""
        return self.torch_hooks is None or self.torch_hooks.discovery.is_trained(module)

    def maintain(self, forward_ns: int, backwards: int) -> None:
        """Plan the work during the next 64 steps; unless steps are short, look after the hooks."""
        self._pace.record(self.clock.rows)
        if self.torch_hooks is not None:
            self.torch_hooks.losses.plan(self._pace.step_ns)
            self.torch_hooks.batches.plan_fingerprint()

        if self._pace.is_due():
            self._look_after_hooks(is_called=forward_ns > 0, is_trained=backwards > 0)

    def _look_after_hooks(self, *, is_called: bool, is_trained: bool) -> None:
        """Measure the overhead; look for a device, a process group, and models if the step has called none."""
        clock, hooks = self.clock, self.torch_hooks
        if hooks is not None:
            self.guard(hooks.overhead.measure, is_slow=clock.needs_slow_commit, has_user_phases=clock.has_user_phases)
            hooks.look_for_device()

        self.guard(self.facts.debugging)
        self.guard(self.group.find if clock.group is None else self.group.report_mesh)
        self._report_use()
        if hooks is None:
            return

        self.guard(hooks.evaluation_mode.look)
        self.guard(hooks.unchanged_weights.look)
        if hooks.sizes is not None and clock.sequence is not None:
            hooks.sizes.report(clock.sequence())

        if is_trained and not (is_called and hooks.batches.has_trained) and clock.rows > 1:
            self.guard(hooks.discovery.descend)

    def finish(self) -> None:
        """End timing: close the open step, and report what is left."""
        self.guard(self.clock.finish)
        self._report_use()
        if self.torch_hooks is not None:
            self.guard(self.torch_hooks.losses.finish)
            self.guard(self.torch_hooks.evaluation_mode.look, is_last=True)
            self.guard(self.torch_hooks.unchanged_weights.look, is_last=True)

        if self.clock.device is not None:
            self.guard(self.clock.device.drain)

    def _report_use(self) -> None:
        """Report what the steps so far show of the loader, of evaluation and of reductions."""
        self.guard(self.facts.training_loader)
        if self.clock.evaluation.collects:
            self.guard(self.facts.report, InfoKind.ROLLOUTS)

        if self.clock.evaluates_gradients:
            self.guard(self.facts.report, InfoKind.EVALUATES_GRADIENTS)

        if self.clock.is_plain_evaluation:
            self.guard(self.facts.report, InfoKind.PLAIN_EVALUATION)

        if self.clock.reductions is not None:
            self.guard(self.facts.reductions)


def _find_models(hooks: TorchHooks, alive: Callable[[], LiveObjects]) -> None:
    known = hooks.discovery.models
    hooks.discovery.search_all(alive, trains=True)
    if not hooks.batches.has_trained and 0 < known == hooks.discovery.models:
        hooks.discovery.descend()  # the script calls `model.forward`, or parts of the model
