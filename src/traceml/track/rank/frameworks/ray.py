"""Capture of Ray Train: what a worker passes to `ray.train.report`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from traceml.database.schema import MetricKind
from traceml.inspection.thread_frames import stack_frames
from traceml.track.plugins.plugin_metadata import PluginMetadata
from traceml.track.rank.frameworks.framework_capture import FrameworkCapture

__all__ = ["RayCapture"]

# Ray's callbacks report values that the framework has logged, which are captured there.
_CALLBACKS = ("ray.train.lightning.", "ray.train.huggingface.")


class RayCapture(FrameworkCapture):
    """Captures the functions behind `ray.train.report`, which scripts import by name."""

    metadata = PluginMetadata(name="ray", version="1", description="Ray Train's report()")
    kind = MetricKind.RAY

    def targets(self) -> Mapping[str, Callable[[ModuleType], None]]:
        """Return the modules of Ray Train's two versions."""
        return {
            "ray.train.v2._internal.execution.train_fn_utils": self._patch,
            "ray.train._internal.session": self._patch_session,
        }

    def _patch(self, module: ModuleType) -> None:
        for owner in (module.DistributedTrainFnUtils, module.LocalTrainFnUtils):
            self.around(owner, "report", _reported, self.values)

    def _patch_session(self, module: ModuleType) -> None:
        self.around(module._TrainSession, "report", _reported, self.values)


def _reported(_owner: Any, metrics: Mapping[str, Any], *_: Any, **__: Any) -> tuple[dict[str, Any], None]:
    return {} if _is_from_callback() else dict(metrics), None


def _is_from_callback() -> bool:
    return any(str(each.f_globals.get("__name__")).startswith(_CALLBACKS) for each in stack_frames(sys._getframe()))
