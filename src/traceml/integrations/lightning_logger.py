"""Lightning's `Trainer(logger=TraceMLLogger())`: traces, and takes what loggers are given, for both import names."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType, new_class
from typing import Any

from traceml.integrations.training_session import TrainingSession
from traceml.recorder.current import current_recorder
from traceml.track.rank.experiment import Orchestrator, log_metrics, log_params
from traceml.track.rank.frameworks.framework_capture import is_captured

__all__ = ["PACKAGES", "STEPS", "TraceMLLogger", "lightning_packages", "owner_of"]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
STEPS = ("training_step", "validation_step")


class TraceMLLogger:
    """Lightning's logger of the name `traceml`: traces each `fit()`, and shows the verdict at its end, on rank 0.

    It derives from the `Logger` of each Lightning package that the script has imported. Where tracing already runs, by
    `traceml.init()`, `traceml run` or `TraceMLCallback`, that recorder continues and shows its own verdict.

    Args:
        report: show the verdict.
        settings: as for `traceml.init`; `local=True` and `on_missing="warn"` unless set here or elsewhere.

    Raises:
        SettingsError: an unknown setting or a bad value.
        ImportError: Lightning is not installed.
    """

    def __new__(cls, *_: Any, **__: Any) -> TraceMLLogger:
        """Return an instance that is also a `Logger` of Lightning."""
        return _create(cls, tuple(package.__name__ for package in lightning_packages("TraceMLLogger")))

    def __init__(self, *, report: bool = True, **settings: Any) -> None:
        self.session = TrainingSession(settings, report=report)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle for the processes of `ddp_spawn`, where the class is created again."""
        kind = type(self)
        packages = tuple(name for name in PACKAGES if name in sys.modules and issubclass(kind, _base(name)))
        return _create, (getattr(kind, "traceml_class", kind), packages), self.__dict__

    @property
    def name(self) -> str:
        """Name of the logger: Lightning's checkpoints are in `traceml/<run id>/checkpoints`."""
        return "traceml"

    @property
    def version(self) -> str:
        """Id of the run; empty while it has none."""
        recorder = current_recorder()
        return recorder.run_dir.name if recorder is not None and recorder.run_dir is not None else ""

    @property
    def experiment(self) -> Orchestrator:
        """Front for values of any kind, such as images. Lightning reads it on each rank when a training is set up."""
        hooks = self.session.begin()
        if hooks is not None:
            for package in lightning_packages("TraceMLLogger"):
                _time_classes(hooks, package)

        return Orchestrator()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values, unless the capture of Lightning logs them: it takes all that goes through the trainer."""
        if not is_captured():
            log_metrics(metrics, step)

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace | None, *_: Any, **__: Any) -> None:
        """Log hyperparameters, unless the capture of Lightning logs them."""
        if params and not is_captured():
            log_params(vars(params) if isinstance(params, Namespace) else params)

    def finalize(self, status: str) -> None:
        """End the run, after everything else of `fit`.

        Args:
            status: success, or failed while the exception is handled.
        """
        self.session.end(sys.exc_info()[1] if status != "success" else None)


def lightning_packages(needed_by: str) -> list[ModuleType]:
    """Return the packages that are imported, else the first that is installed.

    Args:
        needed_by: name of our class, for the error.

    Raises:
        ImportError: Lightning is not installed.
    """
    found = [sys.modules[name] for name in PACKAGES if hasattr(sys.modules.get(name), "Callback")]
    if found:
        return found

    for name in PACKAGES:
        try:
            return [import_module(name)]
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise

    raise ImportError(f"{needed_by} needs Lightning: pip install lightning")


def owner_of(kind: type[Any], name: str) -> type[Any]:
    """Return the class that defines a method of a class."""
    return next((base for base in kind.__mro__ if name in vars(base)), kind)


def _time_classes(hooks: Any, package: ModuleType) -> None:
    """Time calls of the model's steps, and saving, where a logger has no trainer to ask for its strategy."""
    strategy = import_module(f"{package.__name__}.strategies").Strategy
    for name in STEPS:
        hooks.time_forward(strategy, name, lambda owner: owner.lightning_module)

    hooks.time_saving(owner_of(package.Trainer, "save_checkpoint"), "save_checkpoint")


def _base(package: str) -> type[Any]:
    base: type[Any] = import_module(f"{package}.loggers").Logger
    return base


def _create(kind: type[TraceMLLogger], packages: tuple[str, ...]) -> TraceMLLogger:
    missing = tuple(base for base in map(_base, packages) if not issubclass(kind, base))
    return object.__new__(_class(kind, missing) if missing else kind)  # type: ignore[arg-type]


@cache
def _class(kind: type[TraceMLLogger], bases: tuple[type[Any], ...]) -> type[TraceMLLogger]:
    """Return a class of the same name that also derives from Lightning's."""
    attributes = {"__module__": kind.__module__, "__doc__": kind.__doc__, "traceml_class": kind}
    return new_class(kind.__name__, (kind, *bases), exec_body=lambda namespace: namespace.update(attributes))
