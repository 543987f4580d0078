"""Capture of frameworks' values in a run without trackers: for the run's own metrics.

The capture costs 15 ms of imports, so it is loaded when the script imports a framework.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from traceml.fail_open import fail_open
from traceml.instrument.import_hook import PostImportHook, is_imported

if TYPE_CHECKING:
    from traceml.recorder.recorder import Recorder

__all__ = ["MODULES", "watch_frameworks"]

MODULES = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboardX"),
    "lightning": ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"),
    "huggingface": ("transformers.trainer_callback",),
    "ray": ("ray.train",),
}
"""Modules that a script imports to use a framework; the modules that its capture patches are in them."""
_log = logging.getLogger("traceml")


def watch_frameworks(recorder: Recorder) -> None:
    """Capture the numbers of the frameworks of the settings, as soon as the script has imported one."""
    names = recorder.config.frameworks
    modules = {module for name in names for module in MODULES.get(name, ())}
    if any(map(is_imported, modules)) or not set(names) <= MODULES.keys():
        _capture()
        return

    watch = PostImportHook(dict.fromkeys(modules, _capture))
    watch.install()
    recorder.before_stop(watch.uninstall)


def _capture() -> None:
    with fail_open(_log, "track", "values that frameworks log are not captured"):
        from traceml.track.rank import capture_lifecycle

        capture_lifecycle.start(collect=False, numbers_only=True)
