"""Lightning 2.x, as `lightning` or `pytorch_lightning`: `Trainer(callbacks=[TraceMLCallback()])` or
`Trainer(logger=TraceMLLogger())`.

Steps and phases are detected as in any script that uses Lightning. This adds the start and end of a training.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType, new_class
from typing import Any, Self, TypeVar

from traceml.integrations.training_session import TrainingSession
from traceml.recorder.current_recorder import current_recorder
from traceml.track.rank.experiment import Orchestrator
from traceml.track.rank.frameworks.framework_capture import is_captured
from traceml.track.rank.log_calls import log_metrics, log_params

__all__ = ["TraceMLCallback", "TraceMLLogger"]

# Lightning profiles each call of a callback's hook, 2 us each, unless the hook is None.
_PER_STEP = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
Part = TypeVar("Part", bound="LightningPart")
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class LightningPart:
    """Callback or logger, whose instances are also those of Lightning. Its arguments are described by those classes."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Return an instance that is also one of Lightning's class."""
        return _create(cls, tuple(package.__name__ for package in lightning_packages(cls.__name__)))

    def __init__(self, *, report: bool = True, **settings: Any) -> None:
        self.session = TrainingSession(settings, report=report)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle for the processes of `ddp_spawn`, where the class is created again."""
        kind = type(self)
        packages = tuple(name for name in _PACKAGES if name in sys.modules and issubclass(kind, self.base_of(name)))
        return _create, (getattr(kind, "traceml_class", kind), packages), self.__dict__

    @staticmethod
    def base_of(package: str) -> type[Any]:
        """Return the class of a Lightning package to derive from."""
        raise NotImplementedError

    @classmethod
    def unused(cls) -> dict[str, None]:
        """Return attributes of Lightning's class that are None here."""
        return {}


def lightning_packages(needed_by: str) -> list[ModuleType]:
    """Return the packages that are imported, else the first that is installed.

    Args:
        needed_by: name of our class, for the error.

    Raises:
        ImportError: Lightning is not installed.
    """
    found = [sys.modules[name] for name in _PACKAGES if hasattr(sys.modules.get(name), "Callback")]
    if found:
        return found

    for name in _PACKAGES:
        try:
            return [import_module(name)]
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise

    raise ImportError(f"{needed_by} needs Lightning: pip install lightning")


def _create(kind: type[Part], packages: tuple[str, ...]) -> Part:
    missing = tuple(base for base in map(kind.base_of, packages) if not issubclass(kind, base))
    return object.__new__(_class(kind, missing) if missing else kind)  # type: ignore[arg-type]


@cache
def _class(kind: type[Any], bases: tuple[type[Any], ...]) -> type[Any]:
    """Return a class of the same name that also derives from Lightning's."""
    attributes = {"__module__": kind.__module__, "__doc__": kind.__doc__, "traceml_class": kind, **kind.unused()}
    return new_class(kind.__name__, (kind, *bases), exec_body=lambda namespace: namespace.update(attributes))


class TraceMLCallback(LightningPart):
    """Traces each `fit()` and shows the verdict at its end, on rank 0.

    It derives from the `Callback` of each Lightning package that the script has imported. Where tracing already runs,
    by `traceml.init()` or `traceml run`, that recorder stays, and prints its own verdict.

    Examples:
        >>> trainer = lightning.Trainer(max_epochs=3, callbacks=[TraceMLCallback()])
        >>> trainer.fit(model, loader)

    Args:
        report: show the verdict.
        settings: as for `traceml.init`; `local=True` and `on_missing="warn"` unless set here or elsewhere.

    Raises:
        SettingsError: an unknown setting or a bad value.
        ImportError: Lightning is not installed.
    """

    @staticmethod
    def base_of(package: str) -> type[Any]:
        """Return Lightning's class of callbacks."""
        base: type[Any] = import_module(package).Callback
        return base

    @classmethod
    def unused(cls) -> dict[str, None]:
        """Return the hooks of each step that the class does not have."""
        return {name: None for name in _PER_STEP if not hasattr(cls, name)}

    def on_fit_start(self, _trainer: Any, _module: Any) -> None:
        """Begin: the process group, the model and the optimizers exist."""
        self.session.begin()

    def on_exception(self, _trainer: Any, _module: Any, exception: BaseException) -> None:
        """End; `fit` raises the exception."""
        self.session.end(exception)

    def teardown(self, _trainer: Any, _module: Any, stage: str) -> None:
        """End, after everything else of `fit`."""
        if stage == "fit":
            self.session.end()


class TraceMLLogger(LightningPart):
    """Lightning's logger of the name `traceml`: traces each `fit()`, and shows the verdict at its end, on rank 0.

    It derives from the `Logger` of each Lightning package that the script has imported. Where tracing already runs, by
    `traceml.init()`, `traceml run` or `TraceMLCallback`, that recorder stays, and prints its own verdict.
    Arguments and errors are those of `TraceMLCallback`.

    Examples:
        >>> trainer = lightning.Trainer(max_epochs=3, logger=TraceMLLogger(run_name="baseline"))
        >>> trainer.fit(model, loader)
    """

    @staticmethod
    def base_of(package: str) -> type[Any]:
        """Return Lightning's class of loggers."""
        base: type[Any] = import_module(f"{package}.loggers").Logger
        return base

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
        self.session.begin()
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
