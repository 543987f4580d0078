"""What a backend, a framework and a collector must offer; the built-in ones and third parties' are the same.

A backend lives in a delivery process of its own, one per run and backend, and is called from one thread. It may block
and it may raise: its rows wait in the store. What it raises decides what happens next:

- `BackendUnauthorizedError`: no more than one probe per `max_backoff`, with the key read anew;
- `BackendBusyError`: the same again after `retry_after_s`;
- `BackendRefusedError`: these rows will never be taken; they are tried one by one, and those that fail are counted;
- `ImportError`, `AttributeError`: the library is missing or broken; said once;
- anything else: the same again, with growing waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from traceml.track.plugins.metric import Metric

if TYPE_CHECKING:
    from traceml.track.rank.orchestrator import Orchestrator

__all__ = ["BackendInterface", "CollectorInterface", "FrameworkInterface"]


class BackendInterface(ABC):
    """Takes one run's rows to one tracker.

    The order of calls: `resume` (only after a restart), `start_experiment`, then any of the `log_` methods, `flush` and
    `mark` after each batch, at last `end_experiment`. After `flush` has returned, what was given survives the death of
    this process, so the caller may forget it.

    A delivery process can be killed after the tracker got a batch and before that was noted; the batch comes again.
    A backend doubles nothing when it is `idempotent`, or when `resume` cuts off what the tracker got after `mark`, or
    when `resume` asks for everything from the beginning, because the run can only be written anew.
    """

    idempotent: ClassVar[bool] = False
    """Whether giving a tracker the same row again (same name, value, step and timestamp) changes nothing."""

    @property
    def target(self) -> str:
        """Where the rows go, for people: an address or a path, without credentials."""
        return type(self).__name__

    @property
    def is_local(self) -> bool:
        """Whether everything stays on this machine; what is not is refused under `local_only`."""
        return False

    @property
    def url(self) -> str | None:
        """Where a person looks at the run, once it has started; None where there is no such place."""
        return None

    @abstractmethod
    def start_experiment(self, name: str, project: str) -> str:
        """Start or continue the run, and return the tracker's id of it."""

    @abstractmethod
    def log_metric(self, name: str, value: float, step: int) -> None:
        """Give one value to the tracker; NaN and infinities are values."""

    def log_metrics(self, rows: Sequence[Metric]) -> Sequence[tuple[Metric, Exception]] | None:
        """Give a batch to the tracker, in the order of the store, each row with a step.

        Overridden wherever the tracker has a way to take many, or keeps timestamps: this default has neither.

        Returns:
            the rows that it refuses and why, when it took the others: these then do not come again.
        """
        from traceml.track.delivery.retry_policy import FailureKind, classify

        refused: list[tuple[Metric, Exception]] = []
        for row in rows:
            try:
                self.log_metric(row.name, row.value, row.step or 0)
            except Exception as error:
                if classify(error).kind is not FailureKind.REFUSED:
                    raise

                refused.append((row, error))

        if refused and len(refused) == len(rows):
            raise refused[-1][1]  # not the rows, perhaps: delivery finds out

        return refused

    @abstractmethod
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Give parameters, keys and plain values; the same key may come again with another value."""

    @abstractmethod
    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Give a file under a name, by default its own."""

    @abstractmethod
    def end_experiment(self) -> None:
        """Finish the run; `flush` is included. Nothing is called after it."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Give a text; by default it becomes a parameter `name/step`."""
        self.log_params({f"{name}/{step}": text})

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Give an image, a file as the user's call left it (PNG); by default it becomes an artifact."""
        self.log_artifact(str(path), f"{name}/{step}{path.suffix}")

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Give a histogram: `len(edges) == len(counts) + 1`; by default it becomes a text of JSON."""
        import json

        self.log_text(name, json.dumps({"counts": list(counts), "edges": list(edges)}), step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Give tags; by default they are parameters `tags/…`."""
        self.log_params({f"tags/{key}": value for key, value in tags.items()})

    def end_state(self, state: str) -> None:  # noqa: B027 - a tracker without states has nothing to do
        """Tell how the training ended, before `end_experiment`: finished, failed, hung, or lost."""

    def flush(self) -> None:  # noqa: B027 - most trackers are done when a call returns
        """Return when everything given so far would survive the death of this process."""

    def mark(self) -> dict[str, Any]:
        """Return where the tracker's side stands: small, JSON; it is kept beside the cursor.

        Asked for right after `start_experiment`, and after each `flush`.
        """
        return {}

    def resume(self, mark: Mapping[str, Any]) -> bool:  # noqa: ARG002 - an idempotent backend needs only the run's id
        """Continue where `mark` was taken, and cut off what came after it; called before `start_experiment`.

        Called after a death only, so not for a run that was ended by `end_experiment`.

        Returns:
            True to go on from the cursor kept with the mark; False to be given the whole run from its first row.
        """
        return True


class FrameworkInterface(ABC):
    """Captures what a framework's own logging calls say, in the training process.

    The original is called first and its result returned; what capture itself does never raises into the training.
    """

    @abstractmethod
    def patch(self, orchestrator: Orchestrator) -> None:
        """Start capturing into `orchestrator`; a framework that is not imported yet is waited for, not imported."""

    @abstractmethod
    def unpatch(self) -> None:
        """Put everything back as it was."""


class CollectorInterface(ABC):
    """Reads something about the run: once, or every `interval` seconds."""

    interval: float | None = None
    """Seconds between two readings; None reads once, at the start."""

    @abstractmethod
    def collect(self) -> list[Metric | dict[str, Any]]:
        """Return values (as `Metric`) and facts (as dictionaries of parameters)."""
