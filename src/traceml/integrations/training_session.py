"""Start of a recorder for a framework's training, its end, and the verdict.

A recorder that `traceml.init()` or `traceml run` started is used and left running.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from traceml import settings
from traceml.recorder.current import current_recorder
from traceml.recorder.exits import status_of
from traceml.recorder.lifecycle import note_exit, shutdown
from traceml.session.startup import init
from traceml.track.rank import capturing

__all__ = ["TrainingSession", "show_verdict"]

_log = logging.getLogger("traceml")

# The aggregator writes the report half a second after the last rank has left.
_REPORT_WAIT_S = 10.0
_SHOW_S = 60.0
# Defaults with which one line suffices, and a missing aggregator does not end a training.
_DEFAULTS = {"local": True, "on_missing": "warn"}


class TrainingSession:
    """Recorder of one training; plain data, so that callbacks can be copied and pickled.

    Args:
        arguments: settings by name, as for `traceml.init`.
        report: show the verdict when a training ends whose recorder was started here.

    Raises:
        SettingsError: an unknown setting or a bad value.
    """

    def __init__(self, arguments: dict[str, Any], *, report: bool = True) -> None:
        settings.load(**arguments)  # a mistake is reported here, not when training has begun
        self._arguments = arguments
        self._report = report
        self._own = 0  # id of the recorder that was started here

    def begin(self) -> Any:
        """Start tracing, unless it runs, and capture what frameworks log.

        Returns:
            the recorder's `Instrumentation`; None when tracing is disabled.
        """
        running = current_recorder()
        if running is not None and not running.config.enabled:
            return None

        if running is None or not running.enabled:
            recorder = init(**self._wanted())
            self._own = id(recorder) if recorder.enabled else 0
        elif not running.tracing:
            init(**self._wanted())

        recorder_now = current_recorder()
        if recorder_now is None or not recorder_now.enabled:
            return None

        capturing.start(collect=False)
        return recorder_now.instrumentation

    def end(self, error: BaseException | None = None, *, show: bool = True) -> None:
        """Stop the recorder that was started here: remove all hooks, send all rows, show the verdict on rank 0.

        Args:
            error: the exception that ended the training.
            show: False where another process shows the verdict.
        """
        recorder, own, self._own = current_recorder(), self._own, 0
        if recorder is None or id(recorder) != own or not recorder.enabled:
            return

        if error is not None:
            note_exit(error, status_of(error))

        rank = recorder.rank_identity.rank
        run_dir = recorder.run_dir
        shutdown()
        if show and self._report and rank == 0 and run_dir and not isinstance(error, KeyboardInterrupt):
            show_verdict(run_dir)

    def _wanted(self) -> dict[str, Any]:
        sources = settings.load(**self._arguments).sources
        return {name: value for name, value in _DEFAULTS.items() if sources[name] == "default"} | self._arguments


def show_verdict(run_dir: Path) -> None:
    """Write the verdict of an ended run to standard error; another process creates it, so this one loads nothing."""
    if not run_dir.is_dir():  # the aggregator runs on another host
        _log.info("the report will be in %s on the host of the aggregator", run_dir)
        return

    report = run_dir / "report.json"
    until_s = time.monotonic() + _REPORT_WAIT_S
    while not report.exists() and time.monotonic() < until_s:
        time.sleep(0.02)

    try:
        done = subprocess.run(
            [sys.executable, "-m", "traceml", "report", str(run_dir)],
            env=_environ(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SHOW_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as failure:
        message = getattr(failure, "stderr", None) or failure
        _log.warning("the verdict cannot be shown: %s. See `traceml report %s`.", str(message).strip(), run_dir)
        return

    sys.stderr.write(done.stdout)
    sys.stderr.flush()


def _environ() -> dict[str, str]:
    """Return an environment in which the report is formatted for this process's terminal."""
    environ = dict(os.environ)
    if sys.stderr.isatty():
        environ.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
        if "NO_COLOR" not in environ:
            environ["FORCE_COLOR"] = "1"

    return environ
