"""Base of the framework captures: wait for a framework's import, log each value once, never fail the training.

A framework's loggers call each other: Lightning's TensorBoard logger calls `SummaryWriter.add_scalar`. The outermost
captured call logs the value; calls inside it log nothing.
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

from traceml.fail_open import fail_open
from traceml.instrument.import_hook import PostImportHook
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.track.plugins.interfaces import FrameworkInterface, OrchestratorInterface
from traceml.track.plugins.metric import Metric

__all__ = ["FrameworkCapture", "is_captured"]

_log = logging.getLogger("traceml")
_depth = threading.local()

T = TypeVar("T")


def is_captured() -> bool:
    """Whether this thread is inside a call whose values a capture logs."""
    return bool(getattr(_depth, "value", 0))


class FrameworkCapture(FrameworkInterface):
    """Base of the built-in captures: names modules, and patches each as soon as it is imported."""

    kind = 0
    """Source of the values: a number of `MetricKind`."""

    def __init__(self) -> None:
        self._patches = Patches()
        self._watch: PostImportHook | None = None
        self._orchestrator: OrchestratorInterface | None = None

    @abstractmethod
    def targets(self) -> Mapping[str, Callable[[ModuleType], None]]:
        """Return module -> function that patches it, through `self._patches`."""

    def patch(self, orchestrator: OrchestratorInterface) -> None:
        """Start capturing into `orchestrator`; modules that are not imported yet are patched at their import."""
        if self._orchestrator is not None:
            return

        self._orchestrator = orchestrator
        targets = self.targets()
        self._watch = PostImportHook({module: partial(self._apply, module) for module in targets})
        self._watch.install()

    def unpatch(self) -> None:
        """Restore everything; a patch that somebody else has wrapped stays and passes calls through."""
        self._orchestrator = None
        if self._watch is not None:
            self._watch.uninstall()
            self._watch = None

        self._patches.restore()

    def _apply(self, module: str) -> None:
        with fail_open(_log, "track", f"{module} cannot be captured in this version"):
            self.targets()[module](sys.modules[module])

    @uncounted
    def around(
        self,
        owner: Any,
        name: str,
        before: Callable[..., T],
        after: Callable[[OrchestratorInterface, T], None],
        *,
        is_number: bool = True,
    ) -> None:
        """Log calls of `owner.name`: `before` reads the arguments, the original runs, then `after` logs the values.

        Args:
            owner: a class or a module.
            name: its function.
            before: called with the call's arguments; returns the values, copied where they may change.
            after: called when the original has returned, unless another captured call made this one.
            is_number: False for images and histograms, which are left out in a run without trackers.
        """
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            orchestrator = self._orchestrator
            if orchestrator is None or is_captured():
                return original(*args, **kwargs)

            if not is_number and getattr(orchestrator, "numbers_only", False):
                return original(*args, **kwargs)

            values: Any = None
            failure: Exception | None = None
            try:
                values = before(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the original may refuse the call too: then it is no failure
                failure = error.with_traceback(None)  # which would keep this frame, and the values in it

            _depth.value = 1
            try:
                result = original(*args, **kwargs)
            finally:
                _depth.value = 0

            with self.guard(name):
                if failure is not None:
                    raise failure

                after(orchestrator, values)

            return result

        self._patches.wrap(owner, name, call)

    def values(self, orchestrator: OrchestratorInterface, call: tuple[Mapping[str, Any], int | None]) -> None:
        """Log values at a step; values of a nested map are named `outer/inner`."""
        values, step = call
        for name, value in values.items():
            if isinstance(value, Mapping):
                self.values(orchestrator, ({f"{name}/{key}": item for key, item in value.items()}, step))
            else:
                orchestrator.route_metric(Metric(str(name), value, step, kind=self.kind))

    @staticmethod
    def params(orchestrator: OrchestratorInterface, params: Mapping[str, Any]) -> None:
        """Log parameters, if there are any."""
        if params:
            orchestrator.log_params(params)

    @staticmethod
    def guard(name: str) -> fail_open:
        """Return the guard of what captures a call of a function; its first failure is logged."""
        return fail_open(_log, "track", f"a call of {name} was not captured", once=True)
