"""Debug log of the launch protocol: state changes of hosts, messages by name, and why an agent was judged lost.

This module opens the log. Its lines are written where the events are, by the logger `traceml.launch`: what the launch
waits for, every 5 s, in `job.job` (`_tick`), with each host's state from `job.job_host` (`activity`); changes of the
states in `job.job_state` and `job.channel_loop`; messages in `shared.channel`; lost agents in `hosts.agent_connection`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from traceml.errors import AgentFailedError, LaunchTimeoutError
from traceml.launch.launcher.logs.log_handlers import level_of

__all__ = ["debug_log"]

_STDERR = "standard error"
_FILE_NAME = "launch-debug.log"
_LAYOUT = "%(asctime)s.%(msecs)03d %(levelname)s %(message)s"
_log = logging.getLogger("traceml.launch")


@contextlib.contextmanager
def debug_log(log_folder: Callable[[], Path | None]) -> Iterator[None]:
    """Write the debug log while a launch runs, if `TRACEML_LOG_LEVEL` is `debug`; an error names its path.

    Args:
        log_folder: returns the folder of the launch's log files; None: standard error.
    """
    level = level_of(os.environ)
    if level is None or level > logging.DEBUG:
        with _note_on_failure("TRACEML_LOG_LEVEL=debug writes a log of the launch protocol.", LaunchTimeoutError):
            yield

        return

    # warnings are shown as without this log: a logger that has a handler of its own is not given logging's last one
    shown = None if _log.hasHandlers() else logging.lastResort
    handler, where = _open(log_folder())
    handler.setFormatter(logging.Formatter(_LAYOUT, datefmt="%Y-%m-%d %H:%M:%S"))
    sys.stderr.write(f"traceml: the launch protocol is logged to {where}\n")
    before = _log.level
    handlers = [handler] if shown is None or where == _STDERR else [handler, shown]
    for each in handlers:
        _log.addHandler(each)

    _log.setLevel(logging.DEBUG)
    try:
        with _note_on_failure(f"Log of the launch protocol: {where}", LaunchTimeoutError, AgentFailedError):
            yield
    finally:
        _log.setLevel(before)
        for each in handlers:
            _log.removeHandler(each)

        handler.close()


def _open(folder: Path | None) -> tuple[logging.Handler, str]:
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _FILE_NAME
            return logging.FileHandler(path, encoding="utf-8"), str(path)

    return logging.StreamHandler(), _STDERR


@contextlib.contextmanager
def _note_on_failure(note: str, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        error.add_note(note)
        raise
