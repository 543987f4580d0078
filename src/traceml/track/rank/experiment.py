"""Users' logging calls: `Experiment`, and `log_*` for the active experiment or the run's own."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from traceml import settings
from traceml.errors import UsageError
from traceml.recorder.identity import script_name
from traceml.recorder.lifecycle import recorder_for_logging
from traceml.recorder.logger import Logger
from traceml.track import wandb_sweep
from traceml.track.rank import capturing, media
from traceml.track.rank.active_experiment import loggers
from traceml.track.rank.announcement import announcement, check_backends, default_backends, refuse_secrets

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "Experiment",
    "get_active_experiment",
    "log_artifact",
    "log_histogram",
    "log_image",
    "log_metric",
    "log_metrics",
    "log_params",
    "log_text",
    "start_logging",
    "stop_logging",
]

_log = logging.getLogger("traceml")


class Experiment:
    """One experiment at the trackers: values logged inside `with` belong to it. All ranks of a job share it.

    An experiment that begins inside another one is its child. Logging never waits for a tracker, and never raises
    because a tracker fails.

    Args:
        name: its name; by default the run's name.
        project: the project at the trackers; by default the setting `project`.
        backend: the tracker or trackers; by default the setting `backend`, else `mlflow` where it is installed.
        tags: names with values, or names alone.
        parent: id of the parent experiment; by default the active one.
        resume: id of an experiment or a run to continue, at the trackers that have it.
        config: parameters, logged at the start.
        options: options per tracker; they override those of the settings.

    Raises:
        PluginError: there is no such tracker, or it has no such option; raised when the experiment begins.
        SettingsError: the settings are wrong.
        UsageError: an option holds a secret; the text says where it belongs.
    """

    def __init__(
        self,
        name: str | None = None,
        project: str | None = None,
        backend: str | Sequence[str] | None = None,
        tags: Mapping[str, Any] | Sequence[str] | None = None,
        parent: str | Experiment | None = None,
        resume: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.name = name
        self.project = project
        self.backends = _names(backend)
        self.tags = dict(tags) if isinstance(tags, Mapping) else dict.fromkeys(tags or (), "")
        self.config: dict[str, Any] = dict(config or {})
        """Parameters at the start; under a sweep agent, those that the sweep chose."""
        self.parent = parent.id if isinstance(parent, Experiment) else parent
        self.resume = resume
        self.iteration: int | None = None
        """Step of values that are logged without one; None for the training step, else a counter per name."""
        self.id: str = ""
        """Id by which others refer to it; set when it begins."""
        self._options = {backend: dict(values) for backend, values in (options or {}).items()}
        refuse_secrets(self._options)
        self._logger = Logger()
        self._is_active = False

    def __repr__(self) -> str:
        return f"Experiment({self.name!r}, id={self.id!r})"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end("finished" if kind is None else "failed")

    def start(self) -> Self:
        """Begin: announce it to the trackers and make it the active experiment. `with` does this too."""
        if self._is_active:
            return self

        self.config |= wandb_sweep.parameters()
        recorder = recorder_for_logging(again=True)
        if recorder is not None:
            check_backends(self.backends or tuple(self._options), self._options_over(recorder.config))

        config = recorder.config if recorder is not None else settings.Config(enabled=False)
        self.name = self.name or config.run_name or script_name()
        if self.parent is None and _open:
            self.parent = _open[-1].id

        ordinal = _begun.get(self.name, 0)
        _begun[self.name] = ordinal + 1
        text = f"{recorder.job if recorder is not None else ''}\n{self.name}\n{ordinal}"
        self.id = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
        # The same on all ranks, even before they agree on the job.
        key = hashlib.blake2b(f"{self.name}\n{ordinal}".encode(errors="replace"), digest_size=7).digest()
        self._logger = Logger(int.from_bytes(key) | 1, self._row)
        self._is_active = True
        _open.append(self)
        loggers.activate(self._logger)
        self._logger.begin()
        loggers.settle()
        if self.config:
            self.log_params(self.config)

        capturing.start()
        return self

    def end(self, state: str = "finished") -> None:
        """End it: trackers close their run when all is delivered. `with` does this too.

        Args:
            state: `finished` or `failed`.
        """
        if not self._is_active:
            return

        self._is_active = False
        media.wait(self._logger)
        self._logger.row("end", state=state, values=self._logger.values)
        _open.remove(self)
        loggers.deactivate(self._logger)
        if not _open:
            capturing.pause()

    def stop(self) -> None:
        """End it; Tracelet's name for `end`."""
        self.end()

    def log_metric(self, name: str, value: Any, step: int | None = None) -> None:
        """Log one value; see `traceml.log_metric`."""
        self._logger.metric(name, value, self.iteration if step is None else step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several values at one step."""
        for name, value in metrics.items():
            self.log_metric(name, value, step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters."""
        self._logger.row("params", params=dict(params))

    def log_hyperparameter(self, name: str, value: Any) -> None:
        """Log one parameter."""
        self.log_params({name: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        self._logger.row("tags", tags={str(key): str(value) for key, value in tags.items()})

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Log a file, or the files of a folder; see `traceml.log_artifact`."""
        media.artifact(self._logger, path, name)

    def log_file_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Log a file under a folder at the tracker; Tracelet's form of `log_artifact`."""
        self.log_artifact(path, f"{artifact_path}/{Path(path).name}" if artifact_path else None)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Log a text."""
        media.text(self._logger, name, text, self.iteration if step is None else step)

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        """Log an image; see `traceml.log_image`."""
        media.image(self._logger, name, image, self.iteration if step is None else step)

    def log_histogram(self, name: str, values: Any, step: int | None = None, *, bins: int = 64) -> None:
        """Log the distribution of values; see `traceml.log_histogram`."""
        media.histogram(self._logger, name, values, self.iteration if step is None else step, bins=bins)

    def set_iteration(self, iteration: int | None) -> None:
        """Set the step of values that are logged without one."""
        self.iteration = iteration

    def _row(self, config: settings.Config) -> dict[str, Any]:
        """Return the announcement for delivery, with the settings of the current recorder."""
        return {
            "id": self.id, "name": self.name, "project": self.project or config.project,
            "tags": {str(key): str(value) for key, value in self.tags.items()}, "parent": self.parent,
            "resume": self.resume, "params": self.config,
        } | announcement(
            config, self.backends or default_backends(config), self._options_over(config)
        )  # fmt: skip

    def _options_over(self, config: settings.Config) -> dict[str, dict[str, Any]]:
        """Return the options of each tracker: those of the settings, overridden by this experiment's."""
        configured, own = config.backend_options, self._options
        return {name: {**configured.get(name, {}), **own.get(name, {})} for name in {*configured, *own}}


# Experiments that have begun and not ended, the innermost last.
_open: list[Experiment] = []
_begun: dict[str, int] = {}  # how many experiments of a name have begun


def get_active_experiment() -> Experiment | None:
    """Return the innermost experiment that has begun and not ended; None where there is none."""
    return _open[-1] if _open else None


def log_metric(name: str, value: Any, step: int | None = None) -> None:
    """Log one value.

    Args:
        name: any text.
        value: a number, or an object that holds one: a tensor, a numpy scalar, a bool. Any other is logged as a text.
        step: the step; by default the current training step, else a counter per name.
    """
    loggers.active.metric(name, value, step)


def log_metrics(metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Log several values at one step.

    Args:
        metrics: name -> value; see `log_metric`.
        step: their step.
    """
    logger = loggers.active
    for name, value in metrics.items():
        logger.metric(name, value, step)


def log_params(params: Mapping[str, Any]) -> None:
    """Log parameters of this run.

    Args:
        params: name -> value; maps may be nested.
    """
    loggers.active.row("params", params=dict(params))


def log_artifact(path: str | os.PathLike[str], name: str | None = None) -> None:
    """Log a file, or the files of a folder. It may be deleted right after, but not be rewritten in place.

    Args:
        path: the file. It is opened now and copied by a background thread.
        name: its name; by default the name of the file.

    Raises:
        OSError: it cannot be opened.
    """
    media.artifact(loggers.active, path, name)


def log_text(name: str, text: str, step: int | None = None) -> None:
    """Log a text.

    Args:
        name: any text.
        text: the text.
        step: its step; by default as for `log_metric`.
    """
    media.text(loggers.active, name, text, step)


def log_image(name: str, image: Any, step: int | None = None) -> None:
    """Log an image.

    Args:
        name: any text.
        image: an array or tensor (height, width), (height, width, channels) or (channels, height, width), of bytes or
            of floats in 0..1; a PIL image; a matplotlib figure; a PNG or JPEG file's path or bytes.
        step: its step; by default as for `log_metric`.
    """
    media.image(loggers.active, name, image, step)


def log_histogram(name: str, values: Any, step: int | None = None, *, bins: int = 64) -> None:
    """Log the distribution of values.

    Args:
        name: any text.
        values: numbers: an array, a tensor, a list.
        step: its step; by default as for `log_metric`.
        bins: number of intervals of equal width.
    """
    media.histogram(loggers.active, name, values, step, bins=bins)


def start_logging(
    exp_name: str | None = None,
    project: str | None = None,
    backend: str | Sequence[str] | None = None,
    api_key: str | None = None,
    backend_url: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Experiment:
    """Begin an experiment that lasts until `stop_logging` or the end of the process.

    Args:
        exp_name: name of the experiment.
        project: the project at the trackers.
        backend: the tracker or trackers.
        api_key: refused: keys come from the environment or a file, never from a script.
        backend_url: the tracker's address, or the path that it writes to.
        config: parameters.

    Raises:
        UsageError: a key was given, or an address without a tracker; the text says what to do.
    """
    from traceml.track.plugins.plugin_registry import backend_metadata, known_backends

    names = _names(backend)
    if api_key is not None:
        known = [metadata.key_variable for name in names if (metadata := backend_metadata(name)) is not None]
        variable = next(filter(None, known), "the tracker's own variable")
        raise UsageError(
            f"api_key: keys are not taken from scripts. Set {variable} in the environment, or name a file of mode 0600 "
            "by `api_key_file` under [tool.traceml.backends.<name>]"
        )

    options = {}
    if backend_url is not None:
        addresses = {name: metadata.address_option for name, metadata in known_backends().items()}
        option = addresses.get(names[0]) if len(names) == 1 else None
        if option is None:
            able = ", ".join(name for name, address in addresses.items() if address)
            raise UsageError(f"backend_url goes with one backend of {able}, not with {', '.join(names) or 'none'}")

        options = {names[0]: {option: backend_url}}

    return Experiment(exp_name, project, names or None, config=config, options=options).start()


def stop_logging() -> None:
    """End every open experiment, the inner ones first."""
    while _open:
        _open[-1].end()


def _names(backend: str | Sequence[str] | None) -> tuple[str, ...]:
    if backend is None:
        return ()

    return tuple(name.strip() for name in backend.split(",")) if isinstance(backend, str) else tuple(backend)
