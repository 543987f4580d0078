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
from traceml.instrument.facts.fact_reports import Info
from traceml.instrument.frameworks.framework_calls import FrameworkCalls
from traceml.instrument.frameworks.framework_trainers import TRAINERS
from traceml.instrument.frameworks.notebook_cells import NotebookCells
from traceml.instrument.groups.default_group import OnGroup
from traceml.instrument.guard import guarded
from traceml.instrument.import_hook import PostImportHook, is_imported
from traceml.instrument.loader import TracedIterable
from traceml.instrument.maintenance.rare_events import RareEvents
from traceml.instrument.patches import Patches
from traceml.instrument.user_phases import StepBlock, UserPhases

if TYPE_CHECKING:
    from traceml.instrument.checkpoints.patch_checkpoints import CheckpointPatches

__all__ = ["Instrumentation", "install"]

_log = logging.getLogger("traceml")
_MAX_LOST = 64


class Instrumentation:
    """All hooks of this process. `install` makes it.

    Attributes:
        events: what is done at rare events of the clock.
        is_compiling: returns whether torch.compile reads the code that calls it, in place of running it.
        clock: the clock of the open step; `clock.errors` counts internal errors. After one, the hooks are off.
        frameworks: times functions of frameworks. `uninstall` removes these hooks too.
        lost_workers: facts of loader workers that died, until the recorder takes them.
        saves: checkpoints, until the recorder takes them.
    """

    def __init__(
        self,
        flight: FlightFile,
        on_info: Callable[[Info], None] | None,
        on_group: OnGroup | None,
        device_types: frozenset[str] | None,
        thread: int,
        in_worker: Callable[[], object] | None,
    ) -> None:
        self._flight, self._in_worker = flight, in_worker
        self._device_types = device_types
        self._patches = Patches()
        self.is_compiling: Callable[[], bool] = bool
        self.events = RareEvents(flight, self._patches, on_info, on_group, thread)
        self.clock, self.guard, self._facts = self.events.clock, self.events.guard, self.events.facts
        self.save_folder = SaveFolder(lambda folder: self._facts.report(InfoKind.SAVES, folder=folder))
        self.saves = SaveLog()
        self.lost_workers: deque[Info] = deque(maxlen=_MAX_LOST)
        self.frameworks = FrameworkCalls(self.events, self._patches, lambda: self._checkpoints, self.set_step)
        self._cells = NotebookCells(self.clock, self.guard)
        self._user_phases = UserPhases(self.clock, flight.names)
        self._watch = PostImportHook(
            {
                "torch": self._on_torch_import,
                "torch.distributed._functional_collectives": self._on_functional_import,
                "torch.distributed.checkpoint": self._on_checkpoint_import,
                "torch.distributed.algorithms.join": self._on_join_import,
                "torch.distributed.fsdp.sharded_grad_scaler": self._on_sharded_scaler_import,
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
        hooks = self.events.torch_hooks
        if hooks is not None and self.clock.thread and not (model is None and optimizer is None):
            self.guard(hooks.discovery.declare, model, optimizer)

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
        """Return `iterable` with timed waits for its items; like a DataLoader, it separates steps.

        What `for` cannot read, as an asynchronous generator, is returned as it is.
        """
        if not (hasattr(type(iterable), "__iter__") or hasattr(type(iterable), "__getitem__")):
            return iterable

        self.guard(self._facts.loader, iterable)
        return TracedIterable.of(iterable, self.clock)

    # ---- called by the recorder ----

    def hook_ns_per_step(self) -> int:
        """Cost of hooks and row per step in ns, measured on this rank (see `overhead`); 0 before the first sample."""
        hooks, device = self.events.torch_hooks, self.clock.device
        return (hooks.overhead.ns_per_step if hooks else 0) + (device.ns_per_step if device else 0)

    def close_open_step(self) -> None:
        """End timing: the open step becomes a row if it has an optimizer step call, else it is dropped."""
        if self.clock.thread:
            self.events.finish()

    def uninstall(self) -> None:
        """Restore every replaced attribute."""
        self.clock.stop()
        self._watch.uninstall()
        self.guard(self._cells.leave)
        if self.events.torch_hooks is not None:
            self.events.torch_hooks.discovery.restore()

        self._patches.restore()

    # ---- installing ----

    def start(self) -> None:
        """Instrument imported modules, and wait for the import of the others."""
        if hasattr(sys.modules.get("torch"), "compiler"):  # torch calls `TRACEML=1` before its import has ended
            self._watch.run("torch")

        self._watch.install()
        with fail_open(_log, "instrument", "time between a notebook's cells counts as training"):
            self._cells.follow()

        if self.events.torch_hooks is not None and is_imported("torch"):  # else nobody could make a model yet
            self.guard(self.events.torch_hooks.discovery.search_all)

    @functools.cached_property
    def _checkpoints(self) -> CheckpointPatches:
        from traceml.instrument.checkpoints.patch_checkpoints import CheckpointPatches

        facts = self._facts
        marks = CheckpointMarks(self._flight.open_slots, self.clock, facts.report, facts.least_checkpoint_bytes)
        return CheckpointPatches(self.clock, self.saves, self.save_folder, marks)

    def _on_torch_import(self) -> None:
        if hasattr(sys.modules["torch"], "compiler"):  # else it is another package
            self._patch_torch()

    @guarded
    def _patch_torch(self) -> None:
        from torch.compiler import is_dynamo_compiling

        from traceml.instrument.dynamo import skip_own_code
        from traceml.instrument.native.extension import show_torch
        from traceml.instrument.torch_hooks import TorchHooks

        self.is_compiling = is_dynamo_compiling
        show_torch()
        hooks = TorchHooks(self._flight, self.clock, self._patches, self._facts, self.guard, self._device_types)
        self.events.torch_hooks = hooks
        hooks.patch_passes()
        hooks.patch_loaders(self.lost_workers, self._in_worker)
        self._patch_saving()
        hooks.patch_copies()
        hooks.patch_distributed(self.events.group)
        hooks.watch_constructors()
        skip_own_code()

    @guarded
    def _patch_saving(self) -> None:
        self._checkpoints.patch_torch(self._patches)

    @guarded
    def _on_functional_import(self) -> None:
        from traceml.instrument.timed_calls import patch_functional_collectives

        patch_functional_collectives(self._patches, self.clock)

    @guarded
    def _on_checkpoint_import(self) -> None:
        self._checkpoints.patch_distributed(self._patches)

    def _on_rpc_import(self) -> None:
        from traceml.instrument.backward import patch_distributed_backward
        from traceml.instrument.optimizer import patch_optimizer_type

        optimizer_type = sys.modules["torch.distributed.optim.optimizer"].DistributedOptimizer
        self.guard(patch_optimizer_type, self._patches, self.clock, optimizer_type)
        self.guard(patch_distributed_backward, self._patches, self.clock)

    @guarded
    def _on_sharded_scaler_import(self) -> None:
        if self.events.torch_hooks is not None:
            module = sys.modules["torch.distributed.fsdp.sharded_grad_scaler"]
            self.events.torch_hooks.patch_sharded_scaler(module.ShardedGradScaler)

    @guarded
    def _on_join_import(self) -> None:
        from traceml.instrument.groups.default_group import patch_join

        patch_join(self._patches, self.clock, self._facts.report)

    @guarded
    def _on_safetensors_import(self) -> None:
        self._checkpoints.patch_safetensors(self._patches)

    @guarded
    def _on_stateful_loader_import(self) -> None:
        if self.events.torch_hooks is not None:
            module = sys.modules["torchdata.stateful_dataloader.stateful_dataloader"]
            self.events.torch_hooks.patch_stateful_loader(module, self._in_worker)

    @guarded
    def _on_trainer_import(self, name: str) -> None:
        TRAINERS[name](self.frameworks)


def install(
    flight: FlightFile,
    *,
    on_info: Callable[[Info], None] | None = None,
    on_group: OnGroup | None = None,
    device_types: frozenset[str] | None = None,
    in_worker: Callable[[], object] | None = None,
) -> Instrumentation:
    """Install all hooks.

    Args:
        on_info: called with facts about each loader, model and optimizer: maps with `kind` and `t_ns`.
        on_group: called on the training thread before and after a process group is made; see `DefaultGroup`.
        device_types: copies to these devices are `h2d`; None: every accelerator that torch was built for.
        in_worker: called in each loader worker before the user's code, without raising; can be pickled.

    Returns:
        The handle for using and removing the hooks.
    """
    instrumentation = Instrumentation(flight, on_info, on_group, device_types, get_ident(), in_worker)
    instrumentation.start()
    return instrumentation
