"""What the captures share: waiting for a framework's import, one record per value, and never a failure of ours.

A framework's loggers call each other: Lightning's TensorBoard logger calls `SummaryWriter.add_scalar`. The outermost
captured call records; what it calls is its own work and records nothing.
"""

from __future__ import annotations

import logging
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from traceml.instrument.import_hook import PostImportHook
from traceml.instrument.patches import Patches
from traceml.track.plugins.interfaces import FrameworkInterface, OrchestratorInterface
from traceml.track.plugins.metric import Metric

__all__ = ["FrameworkCapture"]

_log = logging.getLogger("traceml")
_depth = threading.local()

T = TypeVar("T")


class FrameworkCapture(FrameworkInterface):
    """Base of the built-in captures: names modules, and patches each as soon as it has been imported."""

    kind = 0
    """Who logs: a number of `MetricKind`."""

    def __init__(self) -> None:
        self._patches = Patches()
        self._watch: PostImportHook | None = None
        self._orchestrator: OrchestratorInterface | None = None
        self._has_failed = False

    @abstractmethod
    def targets(self) -> Mapping[str, Callable[[ModuleType], None]]:
        """Return module -> what patches it, in `self._patches`."""

    def patch(self, orchestrator: OrchestratorInterface) -> None:
        """Start capturing into `orchestrator`; modules that are not imported yet are waited for."""
        if self._orchestrator is not None:
            return

        self._orchestrator = orchestrator
        targets = self.targets()
        for module in targets:
            if module in sys.modules:
                self._apply(module)

        self._watch = PostImportHook({module: partial(self._apply, module) for module in targets})
        self._watch.install()

    def unpatch(self) -> None:
        """Put everything back; where somebody has patched on top of ours, ours passes through from now on."""
        self._orchestrator = None
        if self._watch is not None:
            self._watch.uninstall()
            self._watch = None

        self._patches.restore()

    def _apply(self, module: str) -> None:
        try:
            self.targets()[module](sys.modules[module])
        except Exception as error:  # noqa: BLE001 - fail open: an unknown version of a framework still trains
            _log.warning("%s cannot be captured in this version: %r", module, error)

    def around(
        self, owner: Any, name: str, before: Callable[..., T], after: Callable[[OrchestratorInterface, T], None]
    ) -> None:
        """Have calls of `owner.name` recorded: what `before` takes from the arguments goes to `after` the original.

        Args:
            owner: a class or a module.
            name: its function.
            before: called with the call's arguments; what may change meanwhile must be copied here.
            after: called once the original has returned, unless it was called by another captured call.
        """
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            orchestrator = self._orchestrator
            if orchestrator is None or self.is_inside():
                return original(*args, **kwargs)

            taken: Any = None
            is_taken = False
            try:
                taken = before(*args, **kwargs)
                is_taken = True
            except Exception as error:  # noqa: BLE001 - fail open: the original says what is wrong with the call
                self._failed(name, error)

            _depth.value = 1
            try:
                result = original(*args, **kwargs)
            finally:
                _depth.value = 0

            if is_taken:
                try:
                    after(orchestrator, taken)
                except Exception as error:  # noqa: BLE001 - fail open
                    self._failed(name, error)

            return result

        self._patches.wrap(owner, name, call)

    def is_inside(self) -> bool:
        """Whether this thread is within a captured call, whose own work is not recorded."""
        return bool(getattr(_depth, "value", 0))

    def values(self, orchestrator: OrchestratorInterface, values: Mapping[str, Any], step: int | None) -> None:
        """Record values at a step; what lies in a map inside is named after both."""
        for name, value in values.items():
            if isinstance(value, Mapping):
                self.values(orchestrator, {f"{name}/{key}": item for key, item in value.items()}, step)
            else:
                orchestrator.route_metric(Metric(str(name), value, step, kind=self.kind))

    def _failed(self, name: str, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            _log.warning("a call of %s was not captured (said once): %r", name, error)
