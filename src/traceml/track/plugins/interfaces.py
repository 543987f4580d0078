"""Interfaces of backends, frameworks and collectors; the built-in ones and third parties' use the same.

A backend runs in a delivery process of its own, one per run and tracker, and is called from one thread. It may block
and it may raise: its rows wait in the store. The exception decides what happens next:

- `BackendUnauthorizedError`: at most one probe per `max_backoff`, with the key read again;
- `BackendBusyError`: the same call again after `retry_after_s`;
- `BackendRefusedError`: these rows will never be accepted; they are tried one by one, and those that fail are counted;
- `ImportError`, `AttributeError`: the library is missing or broken; reported once;
- anything else: the same call again, with growing waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from traceml.track.plugins.failure_kinds import FailureKind, classify
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = ["BackendInterface", "CollectorInterface", "FrameworkInterface", "OrchestratorInterface"]


class OrchestratorInterface(Protocol):
    """Calls by which a framework's capture logs values; `traceml.Orchestrator` has them."""

    def route_metric(self, metric: Metric) -> None:
        """Log a value."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters."""

    def log_text(self, name: str, text: str, step: int | None = None, timestamp: float | None = None) -> None:
        """Log text."""

    def log_image(self, name: str, image: Any, step: int | None = None, timestamp: float | None = None) -> None:
        """Log an image."""

    def log_histogram(
        self,
        name: str,
        counts: Sequence[float],
        edges: Sequence[float],
        step: int | None = None,
        timestamp: float | None = None,
    ) -> None:
        """Log a histogram."""


class BackendInterface(ABC):
    """Delivers one run's rows to one tracker.

    Order of calls: `resume` (only after a restart), `start_experiment`, then any of the `log_` methods, `flush` and
    `mark` after each batch, and last `end_experiment`. After `flush` has returned, what was given survives the death of
    this process, so the caller may forget it. When a batch fails, `resume` comes before it is given to the same object
    again.

    A delivery process can be killed after the tracker got a batch and before that was recorded; the batch then comes
    again. A backend duplicates nothing when it is `idempotent`, or when `resume` cuts off what the tracker got after
    `mark`, or when `resume` asks for the run from its first row, because it can only be written from the start.

    Examples:
        >>> class PrintBackend(traceml.BackendInterface):
        ...     def start_experiment(self, name, project):
        ...         return name
        ...
        ...     def log_metric(self, name, value, step):
        ...         print(name, value, step)
        ...
        ...     def log_params(self, params):
        ...         print(params)
        ...
        ...     def log_artifact(self, artifact_path, artifact_name=None):
        ...         print(artifact_path)
        ...
        ...     def end_experiment(self):
        ...         print("end")
        >>> PrintBackend().log_metric("loss", 0.5, 1)
        loss 0.5 1
    """

    metadata: ClassVar[PluginMetadata | None] = None
    """Name, options, library, address and credentials of the tracker. None: it is known by its import path alone."""
    idempotent: ClassVar[bool] = False
    """Whether sending the same row again (same name, value, step and timestamp) changes nothing at the tracker."""
    row_time: float | None = None
    """Epoch seconds at which the text, image or histogram of the current call was logged; None if unknown."""

    @property
    def target(self) -> str:
        """Address or path to which the rows go, for people, without credentials."""
        return type(self).__name__

    @property
    def is_local(self) -> bool:
        """Whether everything stays on this machine; under `local_only` any other backend is refused."""
        return False

    @property
    def url(self) -> str | None:
        """Page of the run for people, once it has started; None if there is none."""
        return None

    @abstractmethod
    def start_experiment(self, name: str, project: str) -> str:
        """Start or continue the run, and return the tracker's id for it."""

    @abstractmethod
    def log_metric(self, name: str, value: float, step: int) -> None:
        """Send one value; NaN and infinities are values."""

    def log_metrics(self, rows: Sequence[Metric]) -> Sequence[tuple[Metric, Exception]] | None:
        """Send a batch, in the order of the store, each row with a step.

        Override it where the tracker accepts many values per call or keeps timestamps: this default does neither.

        Returns:
            the rows that the tracker refuses and why, when it accepted the others: they are not sent again.
        """
        refused: list[tuple[Metric, Exception]] = []
        for row in rows:
            try:
                self.log_metric(row.name, row.value, row.step or 0)
            except Exception as error:
                if classify(error).kind is not FailureKind.REFUSED:
                    raise

                refused.append((row, error))

        if refused and len(refused) == len(rows):
            raise refused[-1][1]  # the rows may not be the cause: delivery finds out

        return refused

    @abstractmethod
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Send parameters, keys and plain values; the same key may come again with another value."""

    @abstractmethod
    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Send a file under a name, by default its own."""

    @abstractmethod
    def end_experiment(self) -> None:
        """Finish the run, including a `flush`. Nothing is called after it."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a text; by default as a parameter `name/step`."""
        self.log_params({f"{name}/{step}": text})

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image, a PNG file; by default as an artifact."""
        self.log_artifact(str(path), f"{name}/{step}{path.suffix}")

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Send a histogram: `len(edges) == len(counts) + 1`; by default as a text of JSON."""
        import json

        self.log_text(name, json.dumps({"counts": list(counts), "edges": list(edges)}), step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Send tags, each in place of its earlier value; by default as parameters `tags/…`."""
        self.log_params({f"tags/{key}": value for key, value in tags.items()})

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Send facts that collectors read, such as `system/host` and `git/commit`; by default as parameters.

        They are not tags: people filter by those.
        """
        self.log_params(facts)

    def end_time(self, timestamp: float) -> None:  # noqa: B027 - most trackers take the time of the call
        """Send the time at which the training ended, in epoch seconds, before `end_state`."""

    def end_state(self, state: str) -> None:  # noqa: B027 - a tracker without states has nothing to do
        """Send the state in which the training ended, before `end_experiment`.

        Args:
            state: finished, stopped (by Ctrl-C, or by its launcher), failed, hung, or lost (gone without a word).
        """

    def flush(self) -> None:  # noqa: B027 - most trackers are done when a call returns
        """Return when everything given so far survives the death of this process."""

    def mark(self) -> dict[str, Any]:
        """Return the position at the tracker: small, JSON; it is kept with the cursor.

        Called right after `start_experiment`, and after each `flush`.
        """
        return {}

    def resume(self, mark: Mapping[str, Any]) -> bool:  # noqa: ARG002 - an idempotent backend needs only the run's id
        """Continue at `mark`, and cut off what came after it.

        Called before `start_experiment` after a death, and before a batch is given again to an `idempotent` backend;
        never for a run that `end_experiment` ended.

        Returns:
            True to continue from the cursor kept with the mark; False to get the whole run from its first row.
        """
        return True


class FrameworkInterface(ABC):
    """Captures a framework's own logging calls, in the training process.

    The original is called first and its result returned; the capture itself never raises into the training.

    Examples:
        >>> class PrintCapture(traceml.FrameworkInterface):
        ...     def patch(self, orchestrator):
        ...         def log(values):
        ...             self.original(values)
        ...             for name, value in values.items():
        ...                 orchestrator.route_metric(traceml.Metric(name, value))
        ...
        ...         self.original, wandb.log = wandb.log, log
        ...
        ...     def unpatch(self):
        ...         wandb.log = self.original
        >>> capture = PrintCapture()
        >>> capture.patch(traceml.Orchestrator())
        >>> wandb.log({"loss": 0.5})
        {'loss': 0.5}
        >>> capture.unpatch()
    """

    metadata: ClassVar[PluginMetadata | None] = None
    """Name and description. None: it is known by its import path alone."""

    @abstractmethod
    def patch(self, orchestrator: OrchestratorInterface) -> None:
        """Start capturing into `orchestrator`; wait for a framework that is not imported yet, never import it."""

    @abstractmethod
    def unpatch(self) -> None:
        """Restore everything."""


class CollectorInterface(ABC):
    """Reads facts or values about the run: once, or every `interval` seconds.

    That of a script runs on a thread which takes no signals; a program that it starts takes none either but SIGKILL.

    Examples:
        >>> import os
        >>> class LoadAverage(traceml.CollectorInterface):
        ...     interval = 5.0
        ...
        ...     def collect(self):
        ...         return [traceml.Metric("load/1min", os.getloadavg()[0])]
        >>> [metric.name for metric in LoadAverage().collect()]
        ['load/1min']
    """

    metadata: ClassVar[PluginMetadata | None] = None
    """Name and description. None: it is known by its import path alone."""
    interval: float | None = None
    """Seconds between two readings; None reads once, at the start."""

    @abstractmethod
    def collect(self) -> list[Metric | dict[str, Any]]:
        """Return values (as `Metric`) and facts (as dictionaries of parameters)."""
