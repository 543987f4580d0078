"""Capture of Lightning, under both of its import names: `self.log`, loggers called directly, Fabric.

`LightningModule.log` is not enough: Lightning decides there which values belong to the step and which are aggregates of
the epoch. All values that it logs go through one method of the trainer, on every rank, also without a logger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from traceml.database.schema import MetricKind
from traceml.track.plugins.interfaces import OrchestratorInterface
from traceml.track.plugins.plugin_metadata import PluginMetadata
from traceml.track.rank.frameworks.framework_capture import FrameworkCapture

__all__ = ["LightningCapture"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_FABRICS = ("lightning.fabric", "lightning_fabric")


class LightningCapture(FrameworkCapture):
    """Captures a trainer's values and hyperparameters, and Fabric's values."""

    metadata = PluginMetadata(name="lightning", version="1", description="Lightning's trainer, loggers and Fabric")
    kind = MetricKind.LIGHTNING

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, tuple[int | None, int]] = {}  # name -> step and logger of its last value

    def targets(self) -> Mapping[str, Callable[[ModuleType], None]]:
        """Return the modules of both import names."""
        found: dict[str, Callable[[ModuleType], None]] = {}
        for package in _PACKAGES:
            connector = f"{package}.trainer.connectors.logger_connector.logger_connector"
            found[connector] = self._patch_connector
            found[f"{package}.trainer.trainer"] = self._patch_trainer
            found[f"{package}.loggers"] = self._patch_loggers
        for package in _FABRICS:
            found[f"{package}.fabric"] = self._patch_fabric

        return found

    def _patch_connector(self, module: ModuleType) -> None:
        self.around(module._LoggerConnector, "log_metrics", _logged_by_trainer, self._from_trainer)

    def _patch_trainer(self, module: ModuleType) -> None:
        # The function as the trainer's module imports it.
        self.around(module, "_log_hyperparams", _hyperparameters, self.params)

    def _patch_fabric(self, module: ModuleType) -> None:
        self.around(module.Fabric, "log_dict", _logged_by_fabric, self.values)

    def _patch_loggers(self, module: ModuleType) -> None:
        # Some of the trainer's loggers derive from Fabric's.
        bases = [base for base in module.Logger.__mro__ if base.__name__ == "Logger"]
        for logger in {logger for base in bases for logger in _with_own(base, "log_metrics")}:
            self.around(logger, "log_metrics", _logged_directly, self._from_logger)

    def _from_trainer(self, orchestrator: OrchestratorInterface, call: tuple[Any, dict[str, Any], int | None]) -> None:
        trainer, values, step = call
        if not values:
            return

        if step is None:
            own = values.pop("step", None)
            if own is None:
                values.setdefault("epoch", trainer.current_epoch)
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
            else:
                step = int(own)

        self.values(orchestrator, (values, step))

    def _from_logger(self, orchestrator: OrchestratorInterface, call: tuple[int, dict[str, Any], int | None]) -> None:
        """Log what the user gave a logger; the same value given to several loggers is logged once."""
        logger, values, step = call
        new = {}
        for name, value in values.items():
            last = self._last.get(name)
            if last is None or last[0] != step or last[1] == logger:
                self._last[name] = (step, logger)
                new[name] = value

        self.values(orchestrator, (new, step))


def _logged_by_trainer(connector: Any, metrics: Any, step: int | None = None) -> tuple[Any, dict[str, Any], int | None]:
    return connector.trainer, dict(metrics), step


def _logged_by_fabric(_fabric: Any, metrics: Any, step: int | None = None) -> tuple[dict[str, Any], int | None]:
    return dict(metrics), step


def _logged_directly(logger: Any, metrics: Any, step: int | None = None) -> tuple[int, dict[str, Any], int | None]:
    return id(logger), dict(metrics), step


def _hyperparameters(trainer: Any) -> dict[str, Any]:
    """Return what `save_hyperparameters` saved of the module and its data."""
    found: dict[str, Any] = {}
    for part in (trainer.lightning_module, trainer.datamodule):
        if getattr(part, "_log_hyperparams", False):  # save_hyperparameters(logger=False) is not for loggers
            found |= {str(key): value for key, value in part.hparams_initial.items() if key != "_class_path"}

    return found


def _with_own(base: Any, name: str) -> Iterator[Any]:
    """Yield the classes below `base` that define `name` themselves."""
    for child in base.__subclasses__():
        if name in vars(child):
            yield child

        yield from _with_own(child, name)
