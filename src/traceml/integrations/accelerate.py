"""Accelerate: `Accelerator(log_with="traceml")`, or `log_with=TraceMLTracker("project")`.

Accelerate's loops need no adapter to be traced. The tracker starts tracing at `init_trackers`, on all ranks, logs what
`accelerator.log` is given, and shows the verdict at `end_training`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from traceml.integrations.training_session import TrainingSession
from traceml.recorder.current_recorder import current_recorder
from traceml.track.rank.log_calls import log_image, log_metrics, log_params

__all__ = ["TraceMLTracker", "trace_all_ranks"]


class TraceMLTracker(GeneralTracker):  # type: ignore[misc]
    """Accelerate's tracker of the name `traceml`.

    Where tracing already runs, by `traceml.init()` or `traceml run`, that recorder stays, and prints its own verdict.

    Examples:
        >>> accelerator = Accelerator(log_with=TraceMLTracker("vision", run_name="baseline"))
        >>> accelerator.init_trackers("vision", config={"lr": 0.1})

    Args:
        project: project of the run at trackers, as given to `init_trackers`.
        report: show the verdict when the training ends.
        settings: as for `traceml.init`; `local=True` and `on_missing="warn"` unless set here or elsewhere.

    Raises:
        SettingsError: an unknown setting or a bad value.
    """

    name: ClassVar[str] = "traceml"
    requires_logging_directory: ClassVar[bool] = False

    def __init__(self, project: str = "", *, report: bool = True, **settings: Any) -> None:
        super().__init__()
        self.session = TrainingSession(settings, report=report)
        self._project = project

    @property
    def tracker(self) -> Any:
        """The recorder; None before `init_trackers`."""
        return current_recorder()

    def start(self) -> None:
        """Start tracing."""
        self.session.begin(**({"project": self._project} if self._project else {}))

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Log the configuration given to `init_trackers` as parameters."""
        if _is_first_rank():
            log_params(values)

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Log values; without a step at the current training step."""
        if _is_first_rank():
            log_metrics(values, step)

    def log_images(self, values: Mapping[str, Sequence[Any]], step: int | None = None, **_: Any) -> None:
        """Log images; the second of a name is `name/1`."""
        if _is_first_rank():
            for name, images in values.items():
                for number, image in enumerate(images):
                    log_image(f"{name}/{number}" if number else name, image, step)

    def finish(self) -> None:
        """Stop tracing, and show the verdict on rank 0."""
        self.session.end()


def trace_all_ranks() -> None:
    """Let the next `init_trackers` start tracing on all ranks; Accelerate creates trackers on the first alone."""
    original = Accelerator.init_trackers
    if getattr(original, "_traceml_all_ranks", False):
        return

    @functools.wraps(original)
    def init_trackers(
        self: Any, project_name: str, config: Any = None, init_kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        original(self, project_name, config, init_kwargs)
        Accelerator.init_trackers = original
        if not self.is_main_process and TraceMLTracker.name in map(str, self.log_with):
            tracker = TraceMLTracker(project_name, **(init_kwargs or {}).get(TraceMLTracker.name, {}))
            tracker.start()
            self.trackers.append(tracker)  # for `end_training`

    init_trackers._traceml_all_ranks = True  # type: ignore[attr-defined]
    Accelerator.init_trackers = init_trackers


def _is_first_rank() -> bool:
    recorder = current_recorder()
    return recorder is None or recorder.rank_identity.rank == 0
