"""Installation and removal of all hooks."""

from __future__ import annotations

import functools
import logging
import sys
from _thread import get_ident
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from traceml.database.flight.flight import FlightFile
from traceml.database.info_kinds import InfoKind
from traceml.fail_open import fail_open
from traceml.instrument.checkpoints.checkpoint_marks import CheckpointMarks
from traceml.instrument.checkpoints.save_log import SaveFolder, SaveLog
from traceml.instrument.clock_implementations import new_clock
from traceml.instrument.facts.fact_reports import FactReports
from traceml.instrument.framework_trainers import TRAINERS
from traceml.instrument.groups.default_group import DefaultGroup
from traceml.instrument.import_hook import PostImportHook, is_imported
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.loader import TracedIterable
from traceml.instrument.patches import Patches
from traceml.instrument.search.iterators import BatchSource, batch_source_of
from traceml.instrument.user_phases import StepBlock, UserPhases
from traceml.instrument.values.step_pace import StepPace

if TYPE_CHECKING:
    from traceml.instrument.checkpoints.patch_checkpoints import CheckpointPatches
    from traceml.instrument.search.alive_objects import AliveObjects
    from traceml.instrument.values.collective_sizes import CollectiveSizes
    from traceml.instrument.values.inputs import BatchReader
    from traceml.instrument.values.losses import LossReader

__all__ = ["Instrumentation", "install"]

Info = dict[str, Any]
_log = logging.getLogger("traceml")
_MAX_LOST = 64


class Instrumentation:
    """All hooks of this process. `install` makes it.

    Attributes:
        clock: the clock of the open step; `clock.errors` counts internal errors. After one, the hooks are off.
        feeding: the code that gives batches to a training without a loader; None before its first backward pass.
        lost_workers: facts of loader workers that died, until the recorder takes them.
        saves: checkpoints, until the recorder takes them.
        collectives: names of the timed functions of torch.distributed.
    """

    def __init__(
        self,
        flight: FlightFile,
        on_info: Callable[[Info], None] | None,
        on_group: Callable[[], None] | None,
        device_types: frozenset[str] | None,
        thread: int,
        in_worker: Callable[[], object] | None,
    ) -> None:
        self._flight, self._in_worker = flight, in_worker
        self._device_types = device_types
        self._patches = Patches()
        self._discovery: Any = None
        self._overhead: Any = None
        self._device: Any = None
        self._batches: Any = None
        self._losses: Any = None
        self._sizes: CollectiveSizes | None = None
        self._pace = StepPace()
        self._installed = True
        self.feeding: BatchSource | None = None
        self.save_folder = SaveFolder(lambda folder: self._facts.report(InfoKind.SAVES, folder=folder))
        self.saves = SaveLog()
        self.lost_workers: deque[Info] = deque(maxlen=_MAX_LOST)
        self._timed: set[tuple[Any, str]] = set()
        self.clock = new_clock(flight, self, thread=thread)
        self._facts = FactReports(self.clock, on_info)
        self._group = DefaultGroup(self.clock, self._patches, self._facts.report, self._guarded, on_group)
        self._user_phases = UserPhases(self.clock, flight.names)
        self._watch = PostImportHook(
            {
                "torch": self._on_torch_import,
                "torch.distributed._functional_collectives": self._on_functional_import,
                "torch.distributed.checkpoint": self._on_checkpoint_import,
                "torch.distributed.algorithms.join": self._on_join_import,
                "torch.distributed.optim.optimizer": self._on_rpc_import,
                "safetensors.torch": self._on_safetensors_import,
                "torchdata.stateful_dataloader.stateful_dataloader": self._on_stateful_loader_import,
                **{name: functools.partial(self._on_trainer_import, name) for name in TRAINERS},
            }
        )

    # ---- called by users ----

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Return a context manager for a user phase."""
        try:
            return self._user_phases[name]
        except Exception:  # a `with` around each call would cost as much as the phase
            with fail_open(_log, "instrument", "a phase is not timed", once=True):
                raise

        return nullcontext()

    def trace_step(self, model: Any = None, optimizer: Any = None) -> AbstractContextManager[Any]:
        """Return a context manager for one training step; the first use turns step detection off.

        Args:
            model: a model to time, if it is not discovered anyway.
            optimizer: an optimizer that is not torch's, if it is not found by its method `step` anyway.
        """
        if self._discovery is not None and self._installed and not (model is None and optimizer is None):
            self._guarded(lambda: self._discovery.declare(model, optimizer))

        return StepBlock(self.clock)

    def set_step(self, step: int) -> int | None:
        """Give the next step a number; return how many steps came before the first row.

        None if an earlier step has the number, or a later one.
        """
        if not self.clock.continue_at(step):
            return None

        self._facts.report(InfoKind.RESUMED, step=step, before=self.clock.before)
        return self.clock.before

    def trace_data(self, iterable: Iterable[Any]) -> Any:
        """Return `iterable` with timed waits for its items; like a DataLoader, it separates steps."""
        self._guarded(lambda: self._facts.loader(iterable))
        return TracedIterable(iterable, self.clock)

    # ---- called for frameworks; `uninstall` removes these hooks too ----

    def time_saving(self, owner: Any, name: str) -> None:
        """Time the calls of a framework's function as `checkpoint`, if it exists."""
        self._guarded(lambda: self._time(owner, name, self._checkpoints.saving))

    def time_update(self, owner: Any, name: str) -> None:
        """Time the calls of a framework's function as part of `optimizer`, if it exists."""
        from traceml.instrument.optimizer import timed_update

        self._guarded(lambda: self._time(owner, name, lambda original: timed_update(original, self.clock)))

    def time_forward(self, owner: Any, name: str, module_of: Callable[[Any], Any]) -> None:
        """Time the calls of a framework's method as calls of the model, if it exists.

        Args:
            module_of: returns the model of the method's object.
        """
        from traceml.instrument.forward import timed_forward

        def timed(original: Any) -> Any:
            return timed_forward(original, self.clock, module_of, self._batches.measure)

        self._guarded(lambda: self._time(owner, name, timed))

    @uncounted
    def before_call(self, owner: Any, name: str, action: Callable[..., None]) -> None:
        """Call `action` with the arguments of each call of a framework's rare function, before it."""

        def following(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._guarded(lambda: action(*args, **kwargs))
                return original(*args, **kwargs)

            return call

        self._guarded(lambda: self._time(owner, name, following))

    def _time(self, owner: Any, name: str, timed: Callable[[Any], Any]) -> None:
        if self._installed and name in vars(owner) and (owner, name) not in self._timed:
            self._timed.add((owner, name))
            self._patches.wrap(owner, name, timed(vars(owner)[name]))

    # ---- called by the recorder ----

    def hook_ns_per_step(self) -> int:
        """Cost of hooks and row per step in ns, measured on this rank (see `overhead`); 0 before the first sample."""
        return 0 if self._overhead is None else self._overhead.ns_per_step

    def close_open_step(self) -> None:
        """End timing: the open step becomes a row if it has an optimizer step call, else it is dropped."""
        if self.clock.thread:
            self._guarded(self.clock.finish)
            self._report_use()
            if self._losses is not None:
                self._guarded(self._losses.finish)

            if self.clock.device is not None:
                self._guarded(self.clock.device.drain)

    def disable_in_child(self) -> None:
        """Turn all hooks into plain calls in a forked child."""
        self.clock.stop()

    def uninstall(self) -> None:
        """Restore every replaced attribute."""
        self._installed = False
        self.clock.stop()
        self._watch.uninstall()
        if self._discovery is not None:
            self._discovery.restore()

        self._patches.restore()

    # ---- called by the clock ----

    def first_backward(self) -> bool:
        """Search for models and optimizers, all of which exist at the first backward pass."""
        from traceml.instrument.search.alive_objects import find_alive

        self._look_for_device()
        alive = functools.cache(find_alive)
        if self._discovery is not None:
            self._guarded(lambda: self._find_models(alive))

        if self.clock.first_loader is None:
            self._guarded(lambda: self._look_for_iterators(alive))

        self._guarded(self._group.report_mesh)
        self._guarded(self._facts.debugging)
        return self._discovery is None or self.clock.optimizers_alive > 0

    def _find_models(self, alive: Callable[[], AliveObjects]) -> None:
        known = self._discovery.models
        self._discovery.search_all(alive, trains=True)
        if self._batches is not None and not self._batches.has_trained and 0 < known == self._discovery.models:
            self._discovery.descend()  # the script calls `model.forward`, or parts of the model

    def _look_for_iterators(self, alive: Callable[[], AliveObjects]) -> None:
        self.feeding = batch_source_of(alive().generators)

    def new_optimizer(self, optimizer: Any) -> None:
        """Report an optimizer at its first step."""
        if self.feeding is not None:
            self.feeding = self.feeding.as_optimizer_steps()

        if self.clock.optimizers_seen > 1:
            self._guarded(self._discovery.search_all)

        self._guarded(lambda: self._facts.optimizer(optimizer))

    def is_trained(self, module: Any) -> bool:
        """Return whether an optimizer has parameters of the module; where none is known, any model is trained."""
        return self._discovery is None or bool(self._discovery.is_trained(module))

    def upkeep(self, forward_ns: int, backwards: int) -> None:
        """Plan the work during the next 64 steps; measure the overhead, look for a device, a process group, and models
        if none was called, unless steps are short.
        """
        clock, pace = self.clock, self._pace
        pace.note(clock.rows)
        if self._losses is not None:
            self._losses.plan(pace.step_ns)

        if self._batches is not None:
            self._batches.upkeep()

        if not pace.is_due():
            return

        if self._overhead is not None:
            self._guarded(lambda: self._overhead.measure(dirty=clock.dirty, marked=clock.marked))

        self._look_for_device()
        self._guarded(self._facts.debugging)
        self._guarded(self._group.find if clock.group is None else self._group.report_mesh)
        self._report_use()
        if self._sizes is not None and clock.sequence is not None:
            self._sizes.report(clock.sequence())

        is_called = forward_ns and (self._batches is None or self._batches.has_trained)
        if backwards and not is_called and clock.rows > 1:
            self._guarded(self._discovery.descend)

    def _report_use(self) -> None:
        """Report what the steps so far show of the loader, of rollouts and of reductions."""
        self._guarded(self._facts.training_loader)
        self._guarded(self._report_rollouts)
        if self.clock.reductions is not None:
            self._guarded(self._facts.reductions)

    # ---- installing ----

    def start(self) -> None:
        """Instrument imported modules, and wait for the import of the others."""
        if hasattr(sys.modules.get("torch"), "compiler"):  # torch calls `TRACEML=1` before its import has ended
            self._watch.run("torch")

        self._watch.install()
        if self._discovery is not None and is_imported("torch"):  # else nobody could make a model yet
            self._guarded(self._discovery.search_all)

    def _on_torch_import(self) -> None:
        if hasattr(sys.modules["torch"], "compiler"):  # else it is another package
            self._guarded(self._patch_torch)

    def _patch_torch(self) -> None:
        from traceml.instrument import timed_calls
        from traceml.instrument.device import CudaDevice, built_devices
        from traceml.instrument.dynamo import skip_own_code
        from traceml.instrument.facts import descriptions  # noqa: F401 - loaded now, for `skip_own_code`
        from traceml.instrument.forward import patch_own_call, timer_maker
        from traceml.instrument.native.extension import show_torch
        from traceml.instrument.optimizer import patch_optimizer, patch_optimizer_type
        from traceml.instrument.search.discovery import ModuleDiscovery
        from traceml.instrument.values.inputs import BatchReader
        from traceml.instrument.values.losses import CudaLosses, LossReader

        clock, patches = self.clock, self._patches
        show_torch()
        self._batches = batches = BatchReader(
            clock,
            self._facts.input,
            self._facts.calls,
            functools.partial(self._facts.report, InfoKind.PLAYS),
            functools.partial(self._facts.report, InfoKind.PLAIN_EVALUATION),
        )
        self._losses = LossReader(clock, self._flight.ring("losses"), CudaLosses())
        timer = timer_maker(clock, batches.measure)

        def on_model(module: Any) -> None:
            patch_own_call(patches, clock, batches.measure, type(module))
            self._facts.model(module)

        def on_optimizer_type(kind: type[Any]) -> None:
            patch_optimizer_type(patches, clock, kind)

        self._discovery = ModuleDiscovery(
            clock, timer, on_model, lambda optimizer: patch_optimizer(patches, clock, optimizer)
        )
        self._patch_passes(timer, batches, self._losses)
        self._patch_loaders(batches)
        self._guarded(lambda: self._checkpoints.patch_torch(patches))
        types = built_devices() if self._device_types is None else self._device_types
        timed_calls.patch_copies(patches, clock, types)
        self._device = CudaDevice() if "cuda" in types else None
        self._patch_distributed()
        self._watch_constructors(on_optimizer_type)
        self._discovery.watch(patches)
        self._measure_overhead()
        skip_own_code()

    def _patch_passes(self, timer: Callable[..., Any], batches: BatchReader, losses: LossReader) -> None:
        """Time forward and backward passes, and what is done with gradients."""
        from traceml.instrument.backward import patch_backward
        from traceml.instrument.forward import patch_checkpoint_sequential, patch_compile, patch_training_mode
        from traceml.instrument.optimizer import patch_clipping, patch_grad_scaler
        from traceml.instrument.values.losses import patch_scale

        clock, patches = self.clock, self._patches
        patch_compile(patches, timer)
        patch_checkpoint_sequential(patches, clock, batches.measure)
        patch_training_mode(patches, clock, lambda module: self._guarded(lambda: self._discovery.evaluates(module)))
        patch_backward(patches, clock, losses.read)
        patch_scale(patches, clock, losses.read_unscaled)
        patch_grad_scaler(patches, clock)
        patch_clipping(patches, clock)

    def _patch_loaders(self, batches: BatchReader) -> None:
        """Time waits for batches, and watch the processes that make them."""
        from traceml.instrument.loader import patch_loaders
        from traceml.instrument.workers.loader_workers import watch_workers
        from traceml.instrument.workers.worker_setup import set_up_workers

        clock, patches = self.clock, self._patches
        patch_loaders(
            patches,
            clock,
            self._new_loader,
            lambda: self._guarded(self._new_iterator),
            batches.inspect,
            lambda number: self._facts.report(InfoKind.SAME_ORDER, number=number),
        )
        self._guarded(lambda: watch_workers(patches, clock, self.lost_workers))
        self._guarded(lambda: set_up_workers(patches, self._in_worker))

    def _patch_distributed(self) -> None:
        from traceml.instrument import timed_calls
        from traceml.instrument.values.collective_sizes import CollectiveSizes

        distributed: Any = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available():
            self._sizes = CollectiveSizes(
                lambda kind, /, **facts: self._guarded(lambda: self._facts.report(kind, **facts))
            )
            timed_calls.patch_collectives(self._patches, self.clock, self._sizes)
            self._group.patch()

        if hasattr(sys.modules.get("torch.distributed.rpc"), "init_rpc"):  # else torch was built without it
            timed_calls.patch_remote_calls(self._patches, self.clock, lambda *_: self._facts.report(InfoKind.RPC))

    def _look_for_device(self) -> None:
        """Measure device times from now on if the script uses CUDA; a job on the CPU pays nothing."""
        if self._device is not None and self.clock.device is None:
            self._guarded(lambda: self._measure_device() if self._device.is_initialized() else None)

    def _measure_device(self) -> None:
        from traceml.instrument.device import DeviceMarkingSlots, DeviceTimes

        device = DeviceTimes(self.clock, self._flight.ring("device_steps"), self._device)
        self.clock.use_device(device, DeviceMarkingSlots(self.clock, device))

    @uncounted
    def _watch_constructors(self, on_optimizer_type: Callable[[type[Any]], None]) -> None:
        """Search for models when an optimizer is created: the model exists then, and has not been called."""
        optimizer_type = sys.modules["torch"].optim.Optimizer
        original = optimizer_type.__init__

        def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - name of the replaced method
            original(optimizer, *args, **kwargs)
            self._guarded(lambda: on_optimizer_type(type(optimizer)))
            self._guarded(lambda: self._discovery.note_optimizer(optimizer))
            if self.clock.thread == get_ident():
                self._guarded(self._discovery.search_recent)
                self._guarded(lambda: self.clock.optimizer_made(trains_others=self._facts.trains_others(optimizer)))

        self._patches.wrap(optimizer_type, "__init__", __init__)

    @functools.cached_property
    def _checkpoints(self) -> CheckpointPatches:
        from traceml.instrument.checkpoints.patch_checkpoints import CheckpointPatches

        marks = CheckpointMarks(self._flight.open_slots, self.clock, self._facts.report)
        return CheckpointPatches(self.clock, self.saves, self.save_folder, marks)

    def _measure_overhead(self) -> None:
        from traceml.instrument.backward import timed_backward
        from traceml.instrument.overhead import HookOverhead

        self._overhead = HookOverhead(timed_backward, self._flight)

    def _on_functional_import(self) -> None:
        from traceml.instrument.timed_calls import patch_functional_collectives

        self._guarded(lambda: patch_functional_collectives(self._patches, self.clock))

    def _on_checkpoint_import(self) -> None:
        self._guarded(lambda: self._checkpoints.patch_distributed(self._patches))

    def _on_rpc_import(self) -> None:
        from traceml.instrument.backward import patch_distributed_backward
        from traceml.instrument.optimizer import patch_optimizer_type

        kind = sys.modules["torch.distributed.optim.optimizer"].DistributedOptimizer
        self._guarded(lambda: patch_optimizer_type(self._patches, self.clock, kind))
        self._guarded(lambda: patch_distributed_backward(self._patches, self.clock))

    def _on_join_import(self) -> None:
        from traceml.instrument.groups.default_group import patch_join

        self._guarded(lambda: patch_join(self._patches, self.clock, self._facts.report))

    def _on_safetensors_import(self) -> None:
        self._guarded(lambda: self._checkpoints.patch_safetensors(self._patches))

    def _on_stateful_loader_import(self) -> None:
        from traceml.instrument.workers.worker_setup import set_up_stateful_workers

        self._guarded(lambda: set_up_stateful_workers(self._patches, self._in_worker))

    def _on_trainer_import(self, name: str) -> None:
        self._guarded(lambda: TRAINERS[name](self))

    # ---- called by hooks ----

    def _new_loader(self, loader: Any, number: int) -> None:
        self._guarded(lambda: self._facts.loader(loader, number))

    def _new_iterator(self) -> None:
        self._batches.begin_epoch()
        self._discovery.search_recent()

    def _report_rollouts(self) -> None:
        if self.clock.evaluation.collects:
            self._facts.report(InfoKind.ROLLOUTS)

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Run a rare action; on failure log and count it, and continue without it."""
        with fail_open(_log, "instrument", "a part of the instrumentation failed and is skipped"):
            action()
            return

        self.clock.errors += 1


def install(
    flight: FlightFile,
    *,
    on_info: Callable[[Info], None] | None = None,
    on_group: Callable[[], None] | None = None,
    device_types: frozenset[str] | None = None,
    in_worker: Callable[[], object] | None = None,
) -> Instrumentation:
    """Install all hooks.

    Args:
        on_info: called with facts about each loader, model and optimizer: maps with `kind` and `t_ns`.
        on_group: called on the training thread when a process group exists.
        device_types: copies to these devices are `h2d`; None: every accelerator that torch was built for.
        in_worker: called in each loader worker before the user's code, without raising; can be pickled.

    Returns:
        The handle for using and removing the hooks.
    """
    instrumentation = Instrumentation(flight, on_info, on_group, device_types, get_ident(), in_worker)
    instrumentation.start()
    return instrumentation
