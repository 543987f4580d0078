"""Putting all hooks in place, and taking all of them away."""

from __future__ import annotations

import logging
import sys
from _thread import get_ident
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from traceml.clock import monotonic_ns
from traceml.database.flight import FlightFile
from traceml.database.schema import Phase
from traceml.instrument.import_hook import PostImportHook
from traceml.instrument.loader import TracedIterable
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock
from traceml.instrument.user import StepBlock, UserPhases

__all__ = ["Instrumentation", "install"]

Info = dict[str, Any]
_log = logging.getLogger("traceml")


class Instrumentation:
    """All hooks of this process. Made by `install`.

    Attributes:
        clock: the accounts of the open step; `clock.errors` counts internal errors, after one the hooks are off.
        collectives: names of the functions of torch.distributed that are timed.
    """

    def __init__(
        self,
        flight: FlightFile,
        on_info: Callable[[Info], None] | None,
        on_group: Callable[[], None] | None,
        device_types: frozenset[str] | None,
        thread: int,
    ) -> None:
        self._flight, self._on_info, self._on_group = flight, on_info, on_group
        self._device_types = device_types
        self._patches = Patches()
        self._discovery: Any = None
        self._overhead: Any = None
        self._installed = True
        self._timed: set[tuple[Any, str]] = set()
        self.collectives: list[str] = []
        self.clock = StepClock(flight, self, thread=thread)
        self._users = UserPhases(self.clock, flight.names)
        self._watch = PostImportHook(
            {
                "torch": self._torch_is_there,
                "torch.distributed.checkpoint": self._checkpoint_is_there,
                "safetensors.torch": self._safetensors_is_there,
            }
        )

    # ---- what users call ----

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Return a context manager for a phase of the user."""
        return self._users.get(name)

    def trace_step(self, model: Any = None, optimizer: Any = None) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Return a context manager for one training step; the first use turns inference off.

        Args:
            model: its calls are timed, also if it would not have been found.
            optimizer: accepted for the reader's sake; all torch optimizers are seen.
        """
        if model is not None and self._discovery is not None and self._installed:
            self._guarded(lambda: self._discovery.add(model))

        return StepBlock(self.clock)

    def trace_data(self, iterable: Iterable[Any]) -> Any:
        """Return `iterable` with the waiting for its items timed; it bounds steps as a DataLoader does."""
        self._guarded(lambda: self._tell_loader(iterable))
        return TracedIterable(iterable, self.clock)

    # ---- what integrations call: the hooks go with all others ----

    def time_saving(self, owner: Any, name: str) -> None:
        """Time the calls of a framework's function as `checkpoint`, where it has such a function."""
        from traceml.instrument.calls import timed_call

        number = int(Phase.CHECKPOINT)
        self._guarded(lambda: self._time(owner, name, lambda original: timed_call(original, number, self.clock)))

    def time_update(self, owner: Any, name: str) -> None:
        """Time the calls of a framework's function as a part of `optimizer`, where it has such a function."""
        from traceml.instrument.optimizer import timed_update

        self._guarded(lambda: self._time(owner, name, lambda original: timed_update(original, self.clock)))

    def time_forward(self, owner: Any, name: str, module_of: Callable[[Any], Any]) -> None:
        """Time the calls of a framework's method as those of the model, where it has such a method.

        Args:
            owner: the method's class.
            name: its name.
            module_of: returns the model, of the method's object.
        """
        from traceml.instrument.forward import timed_forward

        self._guarded(lambda: self._time(owner, name, lambda original: timed_forward(original, self.clock, module_of)))

    def _time(self, owner: Any, name: str, timed: Callable[[Any], Any]) -> None:
        if self._installed and name in vars(owner) and (owner, name) not in self._timed:
            self._timed.add((owner, name))
            self._patches.wrap(owner, name, timed(vars(owner)[name]))

    # ---- what the recorder calls ----

    @property
    def steps(self) -> int:
        """Training steps done."""
        return int(self.clock.rows)

    @property
    def errors(self) -> int:
        """Internal errors so far; after one, timing is off."""
        return self.clock.errors

    def hook_ns_per_step(self) -> int:
        """Cost of hooks and row per step in ns, measured on this rank (see `overhead`); 0 before the first sample."""
        return 0 if self._overhead is None else self._overhead.ns_per_step

    def close_open_step(self) -> None:
        """At shutdown: the open step becomes a row when it has stepped, else it is dropped. Timing ends."""
        if self.clock.thread:
            self._guarded(self.clock.finish)
            if self.clock.device is not None:
                self._guarded(self.clock.device.drain)

    def disable_in_child(self) -> None:
        """In a forked child: all hooks become plain calls."""
        self.clock.stop()

    def uninstall(self) -> None:
        """Put every replaced attribute back."""
        self._installed = False
        self.clock.stop()
        self._watch.uninstall()
        if self._discovery is not None:
            self._discovery.restore()

        self._patches.restore()

    # ---- what the clock tells ----

    def first_backward(self) -> bool:
        """A backward pass begins for the first time: models and optimizers are all made now."""
        return self._discovery is None or self._discovery.scan() > 0

    def new_optimizer(self, optimizer: Any) -> None:
        """An optimizer steps for the first time."""
        from traceml.instrument.facts import optimizer_facts

        if len(self.clock.optimizers) > 1:
            self._discovery.scan()

        self._tell(optimizer_facts(optimizer))

    def upkeep(self, forward_ns: int, backwards: int) -> None:
        """Once in 64 steps: measure what we cost, look for a group, and for models if none is seen."""
        clock = self.clock
        if self._overhead is not None:
            self._overhead.measure(3 + max(1, backwards))

        if clock.group is None:
            self._guarded(self._look_for_group)

        if backwards and not forward_ns and clock.rows > 1:
            self._guarded(self._discovery.descend)

    # ---- installing ----

    def start(self) -> None:
        """Instrument what is there, watch for the rest."""
        if "torch" in sys.modules and hasattr(sys.modules["torch"], "compiler"):
            self._torch_is_there()

        if "torch.distributed.checkpoint" in sys.modules:
            self._checkpoint_is_there()

        if "safetensors.torch" in sys.modules:
            self._safetensors_is_there()

        self._watch.install()

    def _torch_is_there(self) -> None:
        self._guarded(self._patch_torch)

    def _patch_torch(self) -> None:
        from traceml.instrument import calls, facts  # noqa: F401 - loaded now, for `skip_own_code`
        from traceml.instrument.backward import patch_backward
        from traceml.instrument.discovery import ModuleDiscovery
        from traceml.instrument.dynamo import skip_own_code
        from traceml.instrument.forward import patch_compile, timer_maker
        from traceml.instrument.loader import patch_loaders
        from traceml.instrument.optimizer import patch_grad_scaler, patch_optimizer, patch_optimizer_type

        clock, patches = self.clock, self._patches
        self._patch_device()  # first: hooks bind `open_slots`
        timer = timer_maker(clock)

        def on_optimizer_type(kind: type[Any]) -> None:
            patch_optimizer_type(patches, clock, kind)

        self._discovery = ModuleDiscovery(
            clock, timer, self._tell_model, lambda optimizer: patch_optimizer(patches, clock, optimizer)
        )
        patch_compile(patches, timer)
        patch_backward(patches, clock)
        patch_grad_scaler(patches, clock)
        patch_loaders(patches, clock, self._new_loader, lambda: self._guarded(self._discovery.glance))
        calls.patch_checkpoint(patches, clock)
        self._patch_distributed()
        self._watch_constructors(on_optimizer_type)
        for handle in self._discovery.watch():
            patches.on_undo(handle.remove)

        self._measure_overhead()
        skip_own_code()
        self._discovery.scan()

    def _patch_distributed(self) -> None:
        from traceml.instrument import calls

        distributed: Any = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available():
            return

        self.collectives = calls.patch_collectives(self._patches, self.clock)
        c10d = sys.modules["torch.distributed.distributed_c10d"]
        for name, after in (("init_process_group", self._look_for_group), ("destroy_process_group", self._drop_group)):
            original = getattr(c10d, name)
            wrapper = self._then(original, after)
            for module in (c10d, distributed):
                if getattr(module, name, None) is original:
                    self._patches.wrap(module, name, wrapper)

        self._look_for_group()

    def _patch_device(self) -> None:
        from traceml.instrument import calls
        from traceml.instrument.device import DeviceMarkingSlots, DeviceTimes, cuda_events

        torch: Any = sys.modules["torch"]
        types = self._device_types
        if types is None:
            accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
            types = frozenset({accelerator.type} if accelerator is not None else ())

        calls.patch_copies(self._patches, self.clock, types)
        events = cuda_events() if "cuda" in types else None
        if events is not None:
            device = DeviceTimes(self.clock, self._flight.ring("device_steps"), *events)
            self.clock.use_device(device, DeviceMarkingSlots(self.clock, device))

    def _watch_constructors(self, on_optimizer_type: Callable[[type[Any]], None]) -> None:
        """An optimizer is made when the model is, and before it is first called: look for models then."""
        optimizer_type = sys.modules["torch"].optim.Optimizer
        original = optimizer_type.__init__

        def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - the name that it stands in for
            original(optimizer, *args, **kwargs)
            self._guarded(lambda: on_optimizer_type(type(optimizer)))
            if self.clock.thread == get_ident():
                self._guarded(self._discovery.glance)

        self._patches.wrap(optimizer_type, "__init__", __init__)

    def _measure_overhead(self) -> None:
        from traceml.instrument.backward import timed_backward
        from traceml.instrument.overhead import HookOverhead

        self._overhead = HookOverhead(timed_backward)

    def _checkpoint_is_there(self) -> None:
        from traceml.instrument.calls import patch_distributed_checkpoint

        self._guarded(lambda: patch_distributed_checkpoint(self._patches, self.clock))

    def _safetensors_is_there(self) -> None:
        from traceml.instrument.calls import patch_safetensors

        self._guarded(lambda: patch_safetensors(self._patches, self.clock))

    # ---- groups ----

    def _look_for_group(self) -> None:
        distributed: Any = sys.modules.get("torch.distributed")
        clock = self.clock
        if clock.group is not None or distributed is None or not distributed.is_available():
            return

        if not distributed.is_initialized():
            return

        group = distributed.group.WORLD
        clock.group = group
        if distributed.get_world_size() > 1:
            clock.extras = clock.special = clock.dirty = clock.detail = True
            # Private, hence optional; on a group that was never used it raises until the first collective.
            clock.sequence = _quiet(getattr(group, "_get_sequence_number_for_group", None))

        if self._on_group is not None:
            self._on_group()

    def _drop_group(self) -> None:
        self.clock.group = self.clock.sequence = None
        self.clock.extras = self.clock.device is not None
        self.clock.detail = self.clock.extras or self.clock.fresh

    def _then(self, original: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.clock.thread:
                self._guarded(after)

            return result

        return call

    # ---- facts ----

    def _new_loader(self, loader: Any) -> None:
        self._guarded(lambda: self._tell_loader(loader))

    def _tell_loader(self, loader: Any) -> None:
        from traceml.instrument.facts import loader_facts

        self._tell(loader_facts(loader))

    def _tell_model(self, module: Any) -> None:
        from traceml.instrument.facts import model_facts

        self._tell(model_facts(module))

    def _tell(self, info: Info) -> None:
        if self._on_info is not None:
            self._on_info(info | {"t_ns": monotonic_ns()})

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Do something rare of ours; a failure is said and counted, and the rest goes on."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - fail open
            self.clock.errors += 1
            _log.warning("a part of the instrumentation failed and is left out: %r", error, exc_info=error)


def _quiet(read: Callable[[], int] | None) -> Callable[[], int] | None:
    if read is None:
        return None

    def number() -> int:
        try:
            return read()
        except RuntimeError:  # the group is gone, or its backend does not count
            return 0

    return number


def install(
    flight: FlightFile,
    *,
    on_info: Callable[[Info], None] | None = None,
    on_group: Callable[[], None] | None = None,
    device_types: frozenset[str] | None = None,
) -> Instrumentation:
    """Put all hooks in place.

    Args:
        flight: where rows and open phases go.
        on_info: is told facts of loaders, models and optimizers, once each, as maps with `kind` and `t_ns`.
        on_group: is called when a process group is there, on the training thread.
        device_types: copies to these devices are `h2d`; None: this machine's accelerator.

    Returns:
        The handle by which they are used and removed.
    """
    instrumentation = Instrumentation(flight, on_info, on_group, device_types, get_ident())
    instrumentation.start()
    return instrumentation
