"""An experiment of the user: what is logged inside it belongs to it."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from traceml.database.states import RunStatus
from traceml.errors import ArgumentTypeError, UsageError
from traceml.instrument.dynamo import uncompiled
from traceml.recorder.current_recorder import current_recorder, on_change
from traceml.recorder.exits import status_of
from traceml.recorder.identity import script_name
from traceml.settings import Config
from traceml.track import wandb_sweep
from traceml.track.rank import capture_lifecycle, delivery_wait, media
from traceml.track.rank.active_experiment import loggers
from traceml.track.rank.announcement import (
    PER_EXPERIMENT,
    announcement,
    check_backends,
    choose_trackers,
    refuse_secrets,
)
from traceml.track.rank.logged_values import items_of, params_of
from traceml.track.rank.logger import Logger
from traceml.track.rank.logging_recorder import recorder_for_logging
from traceml.track.rank.orchestrator import Orchestrator

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Experiment", "Orchestrator", "names_of", "open_experiments"]

_ENDS = (RunStatus.FINISHED, RunStatus.STOPPED, RunStatus.FAILED)
_STATES = {
    0: RunStatus.FINISHED,
    128 + signal.SIGINT: RunStatus.STOPPED,
    128 + signal.SIGTERM: RunStatus.STOPPED,
}  # by exit status; of all others failed


class Experiment:
    """One experiment at the trackers: values logged inside `with` belong to it. All ranks of a job share it.

    Without `with` it begins at its first `log_*` call, and lasts until `end` or the end of the process. An experiment
    that begins inside the `with` of another one is its child. Logging never waits for a tracker, and never raises
    because a tracker fails.

    Examples:
        >>> with traceml.Experiment("baseline", backend="jsonl") as experiment:
        ...     experiment.log_params({"lr": 0.1})
        ...     experiment.log_metric("loss", 0.5, step=1)

    Args:
        name: its name; by default the run's name.
        project: the project at the trackers; by default the setting `project`, else the one that a tracker's own
            environment variable names.
        backend: the tracker or trackers, none where empty; by default the setting `backend`, else `mlflow` where it
            is installed.
        tags: names with values, or names alone.
        parent: id of the parent experiment; by default the active one.
        resume: id of an experiment or a run to continue, at the trackers that have it.
        config: parameters, logged at the start.
        options: options per tracker; they override those of the settings.
        settings: settings of tracking for this experiment, over those in force.

    Raises:
        PluginError: there is no such tracker, or it has no such option; raised when the experiment begins.
        SettingsError: the settings are wrong.
        ArgumentTypeError: `resume` is no id, `backend` no name, or another argument has the wrong type.
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
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.project = project
        self.backends = names_of(backend)
        self.tags = _tags_of(tags or ())
        self.config: dict[str, Any] = params_of(config or {}, "Experiment(config=...)") | wandb_sweep.parameters()
        """Parameters at the start; under a sweep agent, those that the sweep chose."""
        self._parent = parent if isinstance(parent, Experiment) else None
        self.parent = parent.id if isinstance(parent, Experiment) else parent
        """Id of the parent experiment, if there is one; set when it begins."""
        self.resume = _id_to_resume(resume)
        self.iteration: int | None = None
        """Step of values that are logged without one; None for the training step, else a counter per name."""
        self.id: str = ""
        """Id by which others refer to it; set when it begins."""
        given = params_of(options or {}, "Experiment(options=...)").items()
        self._options = {
            backend: params_of(values, f"Experiment(options={{{backend!r}: ...}})") for backend, values in given
        }
        refuse_secrets(self._options)
        self._settings = params_of(settings or {}, "Experiment(settings=...)")
        self._logger: Logger | None = None  # from its first begin on, also after its end
        self._is_active = False
        self._block_thread: int | None = None  # that runs its `with`

    def __repr__(self) -> str:
        return f"Experiment({self.name!r}, id={self.id!r})"

    def __enter__(self) -> Self:
        self._block_thread = threading.get_ident()
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(_state_after(error))

    def start(self) -> Self:
        """Begin: announce it to the trackers and make it the active experiment. `with` and `log_*` do this too."""
        with _lock:
            if not self._is_active:
                self._begin()

        return self

    def _begin(self) -> None:
        of_recorder = {name: value for name, value in self._settings.items() if name not in PER_EXPERIMENT}
        recorder = recorder_for_logging(again=True, arguments=of_recorder)
        config = self._config_over(recorder.config if recorder is not None else Config(enabled=False))
        if recorder is not None:
            chosen = choose_trackers(config, self.backends, self._options)
            check_backends(self.backends or tuple(self._options), chosen.options)
            refuse_secrets(chosen.options)  # before it is active
            if recorder.rank_identity.rank == 0:
                chosen.say()

        self.name = self.name or config.run_name or script_name()
        if self._parent is not None:
            self._parent._begun_logger()
            self.parent = self._parent.id
        elif self.parent is None:
            self.parent = _enclosing()

        ordinal = _begun.get(self.name, 0)
        _begun[self.name] = ordinal + 1
        text = f"{recorder.job if recorder is not None else ''}\n{self.name}\n{ordinal}"
        self.id = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
        # The same on all ranks, even before they agree on the job.
        key = hashlib.blake2b(f"{self.name}\n{ordinal}".encode(errors="replace"), digest_size=7).digest()
        self._logger = Logger(int.from_bytes(key) | 1, self._row)
        self._is_active = True
        open_experiments.append(self)
        loggers.activate(self._logger)
        self._logger.begin()
        loggers.settle()
        if self.config:
            self.log_params(self.config)

        capture_lifecycle.start(config if recorder is not None else None)

    def end(self, state: str = RunStatus.FINISHED.value) -> None:
        """End it: trackers close their run when all is delivered. `with` does this too.

        `traceml.shutdown()` has ended it with the run, in the state of the run.

        Args:
            state: `finished`, `stopped` or `failed`.

        Raises:
            UsageError: another state; the experiment continues.
        """
        if not self._is_active:
            return

        if state not in _ENDS:
            known = ", ".join(repr(each.value) for each in _ENDS)
            raise UsageError(f"an experiment ends as one of {known}, not as {state!r:.100}")

        self._is_active = False
        logger = self._begun_logger()
        recorder = current_recorder()
        if recorder is None or not recorder.is_over:
            media.wait(logger)
            logger.row("end", state=str(state), values=logger.values)

        open_experiments.remove(self)
        loggers.deactivate(logger)
        if not open_experiments or recorder is None:
            capture_lifecycle.pause()
        else:
            capture_lifecycle.start(open_experiments[-1]._config_over(recorder.config))

    def stop(self) -> None:
        """End it; Tracelet's name for `end`."""
        self.end()

    def flush(self, timeout: float | None = 30.0) -> bool:
        """Wait until its trackers have confirmed what this process has logged; return whether they have.

        Args:
            timeout: longest wait in seconds; None waits until all is delivered, except to trackers that are broken.
        """
        return self._logger is None or delivery_wait.flush(timeout, self._logger.experiment)

    def _begun_logger(self) -> Logger:
        """Return its logger; begins the experiment if it never has."""
        with _lock:
            if self._logger is None:
                self._begin()

        assert self._logger is not None
        return self._logger

    @uncompiled
    def log_metric(self, name: str, value: Any, step: int | None = None, *, iteration: int | None = None) -> None:
        """Log one value; see `traceml.log_metric`. `iteration` is Tracelet's name for `step`."""
        logger = self._logger or self._begun_logger()
        if step is None:
            step = self.iteration if iteration is None else iteration

        append_usual = logger.append_usual
        if append_usual is None or not append_usual(name, value, step):
            logger.metric(name, value, step)

    @uncompiled
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several values at one step."""
        for name, value in items_of(metrics):
            self.log_metric(name, value, step)

    @uncompiled
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters."""
        logger = self._begun_logger()
        if logger.begin():
            logger.row("params", params=params_of(params))

    @uncompiled
    def log_hyperparameter(self, name: str, value: Any) -> None:
        """Log one parameter."""
        self.log_params({name: value})

    def set_tags(self, tags: Mapping[str, Any] | Sequence[str]) -> None:
        """Set tags: names with values, or names alone."""
        self._begun_logger().row("tags", tags=_tags_of(tags))

    @uncompiled
    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Log a file, or the files of a folder; see `traceml.log_artifact`."""
        media.artifact(self._begun_logger(), path, name)

    @uncompiled
    def log_file_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Log a file under a folder at the tracker; Tracelet's form of `log_artifact`."""
        self.log_artifact(path, f"{artifact_path}/{media.base_name(Path(path))}" if artifact_path else None)

    @uncompiled
    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Log text."""
        media.text(self._begun_logger(), name, text, self.iteration if step is None else step)

    @uncompiled
    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        """Log an image; see `traceml.log_image`."""
        media.image(self._begun_logger(), name, image, self.iteration if step is None else step)

    @uncompiled
    def log_histogram(self, name: str, values: Any, step: int | None = None, *, bins: int = 64) -> None:
        """Log the distribution of values; see `traceml.log_histogram`."""
        media.histogram(self._begun_logger(), name, values, self.iteration if step is None else step, bins=bins)

    def set_iteration(self, iteration: int | None) -> None:
        """Set the step of values that are logged without one."""
        self.iteration = iteration

    def _row(self, config: Config) -> dict[str, Any]:
        """Return the announcement for delivery, with the settings of the current recorder."""
        config = self._config_over(config)
        chosen = choose_trackers(config, self.backends, self._options)
        assert self._logger is not None
        loggers.note_backends(self._logger.experiment, chosen.backends)
        return {
            "id": self.id, "name": self.name,
            "tags": self.tags, "parent": self.parent,
            "resume": self.resume, "params": self.config,
        } | announcement(config, chosen.backends, chosen.options, self.project)  # fmt: skip

    def _config_over(self, config: Config) -> Config:
        """Return the settings in force with those of this experiment over them."""
        return config.over(**self._settings) if self._settings else config


open_experiments: list[Experiment] = []
"""Experiments that have begun and not ended, the innermost last."""
_lock = threading.RLock()  # of an experiment's begin
_begun: dict[str, int] = {}  # how many experiments of a name have begun


def _renew_lock(forked: bool) -> None:
    """Replace the lock in a forked child: another thread of the parent may have held it."""
    global _lock
    if forked:
        _lock = threading.RLock()


on_change(_renew_lock)
capture_lifecycle.follow_recorder()  # a logging call may start the recorder


def _enclosing() -> str | None:
    """Return the id of the innermost experiment whose `with` runs on this thread, else on the main thread, if any."""
    threads = threading.get_ident(), threading.main_thread().ident
    found = (each.id for thread in threads for each in reversed(open_experiments) if each._block_thread == thread)
    return next(found, None)


def _tags_of(tags: Any) -> dict[str, str]:
    """Return tags with their values, empty if they are names alone; a text is one name.

    Raises:
        ArgumentTypeError: they are neither.
    """
    if isinstance(tags, Mapping):
        return {str(name): str(value) for name, value in tags.items()}
    if not isinstance(tags, Iterable):
        kind = type(tags).__name__
        raise ArgumentTypeError(
            f"tags must be a dict of names and values, or a list of names, not {kind} {tags!r:.100}"
        )

    return dict.fromkeys(map(str, [tags] if isinstance(tags, str) else tags), "")


def _state_after(error: BaseException | None) -> str:
    """Return the state in which an exception, if any, ends an experiment, by the exit status as for the run."""
    status = 0 if error is None else status_of(error)
    return _STATES.get(status, RunStatus.FAILED).value


def names_of(backend: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the trackers in an argument: a list, or a text with commas; None if none was given.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if backend is None:
        return None

    given = backend.split(",") if isinstance(backend, str) else backend
    names = tuple(given) if isinstance(given, Iterable) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(
            f"backend must be a tracker's name or a list of names, not {type(backend).__name__} {backend!r:.100}. "
            "Register a plugin by traceml.register, and give its name, or give 'package:Class'."
        )

    return tuple(name.strip() for name in names if name.strip())


def _id_to_resume(wanted: Any) -> str | None:
    """Return the id of the run or experiment to continue; `resume=True` of another tracker names none.

    Raises:
        ArgumentTypeError: it is no text.
    """
    if wanted and not isinstance(wanted, str):
        kind = type(wanted).__name__
        raise ArgumentTypeError(f"resume must be the id of a run or of an experiment, not {kind} {wanted!r:.100}")

    return wanted or None
