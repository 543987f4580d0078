"""The default process group: reported when the script makes it, forgotten when the script destroys it.

The place of this rank in it is known before, where the script passes it: the other ranks may never come.

Also the steps at whose end ranks wait for others in `with Join(...)`.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.fail_open import fail_open
from traceml.instrument.divided_step import DividedStep
from traceml.instrument.guard import Guard
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches

if TYPE_CHECKING:
    from traceml.instrument.step_clock import StepClock

__all__ = ["DefaultGroup", "OnGroup", "patch_join"]

OnGroup = Callable[[tuple[int, int] | None], None]

_log = logging.getLogger("traceml")
MODULE = "torch.distributed.algorithms.join"


class DefaultGroup:
    """Watch for the default process group of torch.distributed.

    Args:
        clock: gets the group and its counter of collectives.
        report: takes facts about the group, and this rank's place in the device mesh.
        guard: runs what is done when the group is made and destroyed.
        on_group: called on the training thread with the rank and size of a group that the script is about to make,
            and without them when the group exists.
    """

    def __init__(
        self,
        clock: StepClock,
        patches: Patches,
        report: InfoSender,
        guard: Guard,
        on_group: OnGroup | None,
    ) -> None:
        self._clock, self._patches = clock, patches
        self._report, self._guard, self._on_group = report, guard, on_group

    def patch(self) -> None:
        """Watch the functions that make and destroy the group; torch.distributed is imported and available."""
        distributed, c10d = sys.modules["torch.distributed"], sys.modules["torch.distributed.distributed_c10d"]
        modules = c10d, distributed
        self._patches.wrap_in(modules, "init_process_group", self._joining)
        self._patches.wrap_in(modules, "destroy_process_group", self._dropping)

        self.find()

    def find(self) -> None:
        """Take the group if it exists and is not known yet."""
        distributed: Any = sys.modules.get("torch.distributed")
        clock = self._clock
        if clock.group is not None or distributed is None or not distributed.is_available():
            return

        if not distributed.is_initialized():
            return

        group = distributed.group.WORLD
        clock.group = group
        self._report(InfoKind.GROUP, group_size=distributed.get_world_size(), backends=_backends(distributed))
        if distributed.get_world_size() > 1:
            # Private, so optional; it raises until the first collective of the group.
            clock.join_group(_without_errors(getattr(group, "_get_sequence_number_for_group", None)))

        if self._on_group is not None:
            self._on_group(None)

    def report_mesh(self) -> None:
        """Report this rank's place in the device mesh, by which a verdict names a pipeline stage or a replica."""
        from traceml.instrument.groups.group_snapshots import mesh_coordinates

        coordinates = mesh_coordinates()
        if coordinates:
            self._report(InfoKind.MESH, coordinates=coordinates)

    def _drop(self) -> None:
        clock = self._clock
        clock.group = clock.sequence = None
        clock.is_grouped = False
        clock.plan_step()

    @uncounted
    def _joining(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def announce(args: Any, kwargs: Any) -> None:
            passed = signature.bind_partial(*args, **kwargs).arguments
            rank, size = int(passed.get("rank", -1)), int(passed.get("world_size", -1))
            if self._on_group is not None and 0 <= rank < size > 1:
                self._on_group((rank, size))

        def join(*args: Any, **kwargs: Any) -> Any:
            if self._clock.thread:
                with fail_open(_log, "instrument", "the rank is not known before the group exists", once=True):
                    announce(args, kwargs)

            return original(*args, **kwargs)

        return self._then(join, self.find)

    @uncounted
    def _dropping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        from traceml.inspection.gloo_threads import await_gloo_threads

        def drop(*args: Any, **kwargs: Any) -> Any:
            with fail_open(_log, "instrument", "gloo's threads are not awaited", once=True):
                await_gloo_threads()

            return original(*args, **kwargs)

        return self._then(drop, self._drop)

    @uncounted
    def _then(self, original: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._clock.thread:
                self._guard(after)

            return result

        return call


def _backends(distributed: Any) -> str:
    """Return the backend for each device; of a group that torch has no configuration of, an empty text."""
    try:
        return str(distributed.get_backend_config())
    except Exception:  # noqa: BLE001 - by the version of torch
        return ""


def _without_errors(read: Callable[[], int] | None) -> Callable[[], int] | None:
    if read is None:
        return None

    def number() -> int:
        try:
            return read()
        except RuntimeError:  # the group is destroyed, or its backend has no counter
            return 0

    return number


def patch_join(patches: Patches, clock: DividedStep, report: InfoSender) -> None:
    """Report the step that has the wait at the end of each `with Join(...)`."""

    def report_step(_join: Any) -> None:
        if clock.is_training_thread():
            report(InfoKind.JOINED, step=clock.step)

    patches.follow(sys.modules[MODULE].Join, "__exit__", report_step)
