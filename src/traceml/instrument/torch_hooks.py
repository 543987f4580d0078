"""Hooks on torch itself: models, passes, optimizers, loaders, collectives. Imported after torch."""

from __future__ import annotations

import functools
import sys
import weakref
from _thread import get_ident
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from traceml.database.flight.flight import FlightFile
from traceml.database.info_kinds import InfoKind
from traceml.instrument import device, timed_calls
from traceml.instrument.backward import patch_backward, timed_backward
from traceml.instrument.facts.evaluation_mode import EvaluationMode
from traceml.instrument.facts.fact_reports import FactReports
from traceml.instrument.facts.kept_gradients import KeptGradients
from traceml.instrument.facts.unchanged_weights import UnchangedWeights
from traceml.instrument.forward import (
    patch_checkpoint_sequential,
    patch_compile,
    patch_own_call,
    patch_scripting,
    patch_training_mode,
    timer_maker,
)
from traceml.instrument.graph_replays import patch_graph_replays
from traceml.instrument.groups.default_group import DefaultGroup
from traceml.instrument.guard import Guard, guarded
from traceml.instrument.loader import patch_loaders
from traceml.instrument.maintenance.overhead import HookOverhead
from traceml.instrument.optimizer import (
    patch_clipping,
    patch_grad_scaler,
    patch_optimizer,
    patch_optimizer_type,
    patch_unscaling,
)
from traceml.instrument.patches import Patches
from traceml.instrument.search.discovery import ModuleDiscovery
from traceml.instrument.step_clock import StepClock
from traceml.instrument.values.collective_sizes import CollectiveSizes
from traceml.instrument.values.copy_style import CopyStyle
from traceml.instrument.values.inputs import BatchReader, patch_autocast
from traceml.instrument.values.losses import CudaLosses, LossReader, patch_scale
from traceml.instrument.workers.loader_workers import watch_workers
from traceml.instrument.workers.worker_setup import set_up_stateful_workers, set_up_workers

__all__ = ["TorchHooks"]


class TorchHooks:
    """Hooks on torch, and what they read.

    Args:
        device_types: copies to these devices are `h2d`; None: every accelerator that torch was built for.

    Attributes:
        guard: runs what hooks call beside timing.
        discovery: the timed models.
        batches: sizes and fingerprints of the inputs.
        overhead: the measured cost of the hooks.
        evaluation_mode: models that are trained in `eval()`.
        kept_gradients: optimizers whose gradients are not cleared.
        unchanged_weights: parameters that no optimizer changes.
        sizes: of what collectives carry; None where torch was built without them.
    """

    def __init__(
        self,
        flight: FlightFile,
        clock: StepClock,
        patches: Patches,
        facts: FactReports,
        guard: Guard,
        device_types: frozenset[str] | None,
    ) -> None:
        self._flight, self._clock, self._patches, self._facts, self.guard = flight, clock, patches, facts, guard
        self._device_types = device.built_devices() if device_types is None else device_types
        self._cuda = device.CudaDevice() if "cuda" in self._device_types else None
        self.batches = BatchReader(
            clock,
            facts.input,
            facts.batch,
            facts.calls,
            functools.partial(facts.report, InfoKind.PLAYS),
        )
        self.losses = LossReader(clock, flight.ring("losses"), CudaLosses())
        self.overhead = HookOverhead(timed_backward, flight)
        self.sizes: CollectiveSizes | None = None
        self._compiled_models: weakref.WeakSet[Any] = weakref.WeakSet()
        self._timer = timer_maker(clock, self.batches.measure)
        self.discovery = ModuleDiscovery(
            clock, self._timer, self._on_model, functools.partial(patch_optimizer, patches, clock)
        )
        self.evaluation_mode = EvaluationMode(clock, self.discovery.is_trained_as_a_whole, facts.report)
        self.kept_gradients = KeptGradients(lambda: clock.rows, facts.report)
        self.unchanged_weights = UnchangedWeights(clock, self.discovery.optimizers, facts.report)

    def patch_passes(self) -> None:
        """Time forward and backward passes, and what is done with gradients."""
        clock, patches = self._clock, self._patches
        patch_compile(patches, self._timer, self.guard.wrap(self._compiled))
        patch_scripting(patches)
        patch_checkpoint_sequential(patches, clock, self.batches.measure)
        patch_training_mode(patches, clock, self.guard.wrap(self.evaluation_mode.end), self._evaluates)
        patch_backward(patches, clock, self._read_backward)
        patch_scale(patches, clock, self.losses.read_unscaled, torch.amp.GradScaler)
        patch_grad_scaler(patches, clock, lambda: self._facts.report(InfoKind.UNREAD_SKIPS))
        patch_clipping(patches, clock)
        patch_autocast(patches, clock, self.guard.wrap(self._facts.autocast))
        for manager in (torch.autograd.detect_anomaly, torch.autograd.set_detect_anomaly):
            patches.follow(manager, "__enter__", self.guard.wrap(lambda _: self._facts.look_for_detection()))

        if self._cuda is not None:
            self.guard(patch_graph_replays, patches, clock, self.guard)

    def patch_sharded_scaler(self, scaler_type: Any) -> None:
        """Read the losses of FSDP's scaler, and time its work on gradients: its methods do not call GradScaler's."""
        patch_scale(self._patches, self._clock, self.losses.read_unscaled, scaler_type)
        patch_unscaling(self._patches, self._clock, scaler_type)

    def patch_loaders(self, lost_workers: deque[dict[str, Any]], in_worker: Callable[[], object] | None) -> None:
        """Time waits for batches, and watch the processes that make them."""
        clock, patches = self._clock, self._patches
        self._patch_loader_type = patch_loaders(
            patches,
            clock,
            self.guard.wrap(self._facts.loader),
            self._new_iterator,
            self.batches.inspect,
            lambda number: self._facts.report(InfoKind.SAME_ORDER, number=number),
        )
        self.guard(watch_workers, patches, clock, lost_workers)
        self.guard(set_up_workers, patches, in_worker)

    def patch_stateful_loader(self, module: Any, in_worker: Callable[[], object] | None) -> None:
        """Do the same for torchdata's `StatefulDataLoader`, whose iterators and workers are not torch's."""
        with_workers = module._StatefulMultiProcessingDataLoaderIter
        self._patch_loader_type(module.StatefulDataLoader, with_workers)
        self.guard(set_up_stateful_workers, self._patches, with_workers, in_worker)

    def patch_copies(self) -> None:
        """Time copies to devices."""
        style = CopyStyle(self._facts.report, lambda: self._clock.rows)
        timed_calls.patch_copies(self._patches, self._clock, self._device_types, style, self.guard)

    def patch_distributed(self, group: DefaultGroup) -> None:
        """Time collectives and remote calls, and watch for the default process group."""
        distributed: Any = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available():
            self.sizes = CollectiveSizes(self.guard.wrap(self._facts.report))
            timed_calls.patch_collectives(self._patches, self._clock, self.sizes)
            group.patch()

        if hasattr(sys.modules.get("torch.distributed.rpc"), "init_rpc"):  # else torch was built without it
            timed_calls.patch_remote_calls(self._patches, self._clock, lambda *_: self._facts.report(InfoKind.RPC))

    def watch_constructors(self) -> None:
        """Search for models when an optimizer is created: the model exists then, and has not been called.

        Report it again when it is given more parameters, as those of unfrozen layers.
        """
        self._patches.follow(torch.optim.Optimizer, "__init__", self._optimizer_made)
        self._patches.follow(torch.optim.Optimizer, "add_param_group", self._group_added)
        self.discovery.watch(self._patches)

    @guarded
    def look_for_device(self) -> None:
        """Measure device times from now on if the script uses CUDA; a job on the CPU pays nothing."""
        if self._cuda is not None and self._clock.device is None and self._cuda.is_initialized():
            times = device.DeviceTimes(self._clock, self._flight.ring("device_steps"), self._cuda)
            self._clock.use_device(times)

    # ---- called by the hooks ----

    def _on_model(self, module: Any) -> None:
        patch_own_call(self._patches, self._clock, self.batches.measure, type(module))
        self._facts.model(module)

    @guarded
    def _evaluates(self, module: Any, is_part: bool) -> None:
        self.discovery.evaluates(module)
        if not is_part:
            self.evaluation_mode.begin(module)

    def _read_backward(self, tensors: Any) -> None:
        """Read the loss of a backward that begins, and the gradients before it."""
        self.losses.read(tensors)
        if self.kept_gradients.watched:
            self.guard(self.kept_gradients.look)

    def _compiled(self, module: Any) -> None:
        """Report models again whose modules compile themselves, each once."""
        for model in self.discovery.models_with(module):
            if model not in self._compiled_models:
                self._compiled_models.add(model)
                self._facts.model(model)

    @guarded
    def _optimizer_made(self, optimizer: Any) -> None:
        self.guard(patch_optimizer_type, self._patches, self._clock, type(optimizer))
        self.guard(self.discovery.note_optimizer, optimizer)
        # The thread that makes an optimizer before any training is the one that trains, as far as is known.
        if self._clock.thread == get_ident() or (self._clock.awaits_backward and self._clock.claim_thread()):
            self.guard(self.discovery.search_recent)
            self._clock.optimizer_made(trains_others=self._facts.trains_others(optimizer))

    @guarded
    def _group_added(self, optimizer: Any) -> None:
        if id(optimizer) in self._clock.optimizers:  # else it is reported at its first step
            self.guard(self.discovery.note_optimizer, optimizer)
            self.guard(self._facts.optimizer, optimizer)

    @guarded
    def _new_iterator(self) -> None:
        self.batches.begin_epoch()
        self.discovery.search_recent()
