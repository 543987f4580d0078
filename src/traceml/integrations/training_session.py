"""Start of a recorder for a framework's training, its end, and the verdict.

A recorder that `traceml.init()` or `traceml run` started is used and left running.
"""

from __future__ import annotations

from typing import Any

from traceml import settings
from traceml.recorder.current_recorder import current_recorder
from traceml.recorder.exits import status_of
from traceml.recorder.lifecycle import note_exit, shutdown
from traceml.recorder.run_notices import dismiss, show_verdict
from traceml.session.startup import load_forgiving, start
from traceml.track.rank import capture_lifecycle

__all__ = ["TrainingSession"]


class TrainingSession:
    """Recorder of one training; plain data, so that callbacks can be copied and pickled.

    Args:
        arguments: settings by name, as for `traceml.init`.
        report: show the verdict when a training ends whose recorder was started here.
        ends_process: whether the process does nothing else, and ends without its exit handlers: then a recorder that
            `traceml run` started is stopped, too.

    Raises:
        SettingsError: an unknown setting or a bad value.
    """

    def __init__(self, arguments: dict[str, Any], *, report: bool = True, ends_process: bool = False) -> None:
        settings.load(**arguments)  # a mistake is reported here, not when training has begun
        self._arguments = arguments
        self._report, self._ends_process = report, ends_process
        self._own = 0  # id of the recorder that was started here

    def begin(self, **defaults: Any) -> Any:
        """Start tracing, unless it runs, and capture what frameworks log.

        Args:
            defaults: settings that the framework knows, where neither the arguments nor the user's settings have them.

        Returns:
            the recorder's `Instrumentation`; None when tracing is disabled.
        """
        running = current_recorder()
        if running is not None and not running.config.enabled:
            return None

        sources = settings.load(**self._arguments).sources
        arguments = {name: each for name, each in defaults.items() if sources[name] == "default"} | self._arguments
        if running is None or not running.enabled or running.is_deferred:
            shutdown()  # a deferred one has stored nothing
            recorder = start(load_forgiving(arguments))
            self._own = id(recorder) if recorder.enabled else 0
        elif not running.tracing:
            start(load_forgiving(arguments))

        recorder_now = current_recorder()
        if recorder_now is None or not recorder_now.enabled:
            return None

        capture_lifecycle.start(collect=False)
        return recorder_now.instrumentation

    def end(self, error: BaseException | None = None, *, show: bool = True) -> None:
        """Stop the recorder that was started here: remove all hooks, send all rows, show its verdict on rank 0.

        Args:
            error: the exception that ended the training.
            show: False if another process shows the verdict.
        """
        recorder, own, self._own = current_recorder(), self._own, 0
        is_own = id(recorder) == own
        if recorder is None or not (is_own or self._ends_process) or not recorder.enabled:
            return

        if error is not None:
            note_exit(error, status_of(error))

        rank = recorder.rank_identity.rank
        run_dir = recorder.run_dir
        if run_dir is not None and is_own:
            dismiss(run_dir)  # it is shown below

        shutdown()
        if (
            run_dir is not None
            and is_own
            and show
            and self._report
            and not recorder.config.quiet
            and rank == 0
            and not isinstance(error, KeyboardInterrupt)
        ):
            show_verdict(run_dir, stored_late=recorder.end.is_stored_late)
