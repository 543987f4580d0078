"""Start and end of the recorder of this process, at its exit and in its forks too."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from traceml.errors import TraceMLError
from traceml.fail_open import fail_open
from traceml.fork_gate import fork_gate
from traceml.gc_pause import gc_pause
from traceml.inspection.loaded_modules import imports_main_again, loaded_module
from traceml.recorder.current_recorder import notify_change, notify_start, state
from traceml.settings import level_number
from traceml.trusted_files import fill_standard_descriptors

if TYPE_CHECKING:
    from pathlib import Path

    from traceml.recorder.exits import ExitWatch
    from traceml.recorder.recorder import Recorder
    from traceml.recorder.recording import Recording
    from traceml.settings import Config

__all__ = [
    "at_exit",
    "await_start",
    "in_fixed_folder",
    "note_exit",
    "note_return",
    "on_end",
    "on_shutdown",
    "shutdown",
    "start",
]

_log = logging.getLogger("traceml")
_START_S = 10.0  # longest wait for another thread's start: it may wait itself for the thread that waits for it
_lock = threading.RLock()  # a signal handler may come in between
_watch: ExitWatch | None = None
_hooked = False
_at_end: list[Callable[[], None]] = []
_at_shutdown: list[Callable[[], None]] = []


def start(
    config: Config,
    *,
    wait: bool = True,
    tracing: bool = True,
    defer_connect: bool = False,
    on_stored: Callable[[Recorder, Path], None] | None = None,
) -> Recorder:
    """Start a recorder, or return the one that runs.

    Args:
        wait: connect now; else the recorder's thread connects when it can.
        tracing: also install the hooks; else only logged values are recorded.
        defer_connect: connect only when this process trains or logs.
        on_stored: called with a new recorder and its run's folder when an aggregator has named it, on any thread.

    Raises:
        AggregatorUnavailableError: no aggregator answered within `connect_timeout`, and `on_missing` is `raise`.
        AggregatorRefusedError: it answered and refused, and `on_missing` is `raise`.
    """
    # Behind torch's import a search of all objects is due, which our imports would bring about.
    with fork_gate, gc_pause:
        from traceml.recorder.identity import spawned_from
        from traceml.recorder.recorder import Recorder

    if tracing and state.recorder is not None and state.recorder.is_child:  # it logged for its parent; now it is a rank
        shutdown()

    if state.starter == threading.get_ident():  # a signal handler has interrupted the start, which goes on after it
        return state.recorder or Recorder(config.replaced(enabled=False))

    with _lock, fork_gate:
        state.starter = threading.get_ident()
        try:
            running = state.recorder
            if running is not None and running.enabled:
                _continue(running, tracing=tracing)
                return running

            config = in_fixed_folder(config)
            _set_log_level(config)
            parent = state.parent.identity if state.parent is not None and not tracing else None
            spawned = spawned_from() if not tracing and parent is None else None
            state.recorder = recorder = Recorder(config, parent=parent, spawned=spawned)
            if on_stored is not None:
                recorder.on_stored = partial(on_stored, recorder)

            try:
                if config.enabled and not imports_main_again():
                    with fail_open(_log, "recorder", "tracing could not be started", reraise=TraceMLError):
                        fill_standard_descriptors()
                        recorder.start(wait=wait, tracing=tracing, defer_connect=defer_connect)
                        state.instrumentation = recorder.instrumentation
                        _hook_process(watch=not recorder.is_child)
            finally:
                notify_change()
        finally:
            state.starter = None

    if recorder.enabled:
        notify_start(recorder)

    return recorder


def _continue(running: Recorder, *, tracing: bool) -> None:
    """Let a recorder that runs trace, too, if that is asked for."""
    if tracing and not running.tracing:
        running.trace()
        state.instrumentation = running.instrumentation


def await_start() -> None:
    """Wait while another thread starts the recorder of this process; the thread itself does not wait."""
    recorder = state.recorder
    if recorder is None or state.starter in (None, threading.get_ident()) or recorder.pid != os.getpid():
        return

    if _lock.acquire(timeout=_START_S):
        _lock.release()


def in_fixed_folder(config: Config) -> Config:
    """Return settings with an absolute `runs_dir`: the script may change its folder before the recorder connects."""
    try:
        return config.replaced(runs_dir=config.runs_dir.absolute())
    except OSError:  # its folder was removed
        return config


def _set_log_level(config: Config) -> None:
    if config.sources["log_level"] == "default":  # keep the level that the user may have set
        return

    _log.setLevel(level_number(config.log_level))
    if _log.level < logging.WARNING and not _log.hasHandlers():  # Python itself shows warnings only
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _log.addHandler(handler)


def shutdown() -> None:
    """Stop tracing: send the remaining rows and remove all hooks. Also done when the process ends.

    Rows are sent within 5 s. In addition it waits up to 3 s for collectors that read once, 60 s while files are being
    copied, and 30 s for an aggregator that is being started.

    Examples:
        >>> traceml.shutdown()
        >>> traceml.is_enabled()
        False
    """
    _stop("failed" if state.recorder is not None and state.recorder.failed else "finished")
    for each in _at_shutdown:
        each()


def on_shutdown(function: Callable[[], None]) -> None:
    """Call `function` after each `shutdown` of this process; a second registration changes nothing."""
    if function not in _at_shutdown:
        _at_shutdown.append(function)


def on_end(function: Callable[[], None]) -> None:
    """Call `function` when this process ends, after the recorder has stopped; a second registration changes nothing."""
    if function not in _at_end:
        _at_end.append(function)


def note_exit(error: BaseException | None, status: int) -> None:
    """Record how this process ends; see `Recording.note_exit`."""
    _note("the end of this process could not be recorded", lambda own: own.note_exit(error, status))


def note_os_exit(error: BaseException | None, status: int) -> None:
    """Record that this process ends at once; see `Recording.note_os_exit`."""
    _note("the end of this process could not be recorded", lambda own: own.note_os_exit(error, status))


def note_exec(*, failed: bool) -> None:
    """Record that this process becomes another program, or that it did not; see `Recording.note_exec`."""
    _note("the end of the training could not be recorded", lambda own: own.note_exec(failed=failed))


def note_return(*, is_script: bool) -> None:
    """Record that the launched function or script of this process is over; see `Recording.note_return`."""
    _note("the return of the launched function could not be recorded", lambda own: own.note_return(is_script=is_script))


def note_launch() -> None:
    """Record that this process launches functions; see `Recording.note_launch`."""
    _note("a launch could not be recorded", lambda own: own.note_launch())


def note_idle(*, idle: bool) -> None:
    """Record that this process waits for another task, or has one; see `Recording.note_idle`."""
    _note("the end of a task could not be recorded", lambda own: own.note_idle(idle=idle))


def _note(failed: str, note: Callable[[Recording], None]) -> None:
    if (recording := _live_recording()) is not None:
        with fail_open(_log, "recorder", failed):
            note(recording)


def _live_recording() -> Recording | None:
    return state.recorder.live_recording if state.recorder is not None else None


def _stop(reason: str) -> None:
    with _lock:
        recorder, watch = state.recorder, _watch
        state.instrumentation = None

    if recorder is not None:
        recorder.prepare_stop()

    notify_change()
    if watch is not None:
        watch.uninstall()
    if recorder is not None:
        from traceml.inspection.script_time import note_end_of_run

        note_end_of_run()
        with fail_open(_log, "recorder", "tracing could not be ended properly"):  # the flight file keeps unsent rows
            recorder.stop(reason)


def _hook_process(*, watch: bool) -> None:
    """Register for the end of this process (with `watch` also for how it ends) and for its forks."""
    global _hooked, _watch
    if watch:
        from traceml.recorder.exits import ExitWatch

        _watch = ExitWatch(note_exit, note_exec, note_os_exit)
        _watch.install()

    # A process that multiprocessing has forked ends without atexit, but runs these.
    util = loaded_module("multiprocessing.util")
    if util is not None and not util.is_exiting():
        util.Finalize(None, at_exit, exitpriority=0)

    if not _hooked:
        _hooked = True
        atexit.register(at_exit)


def at_exit() -> None:
    """End the recorder with the process; may be called again, as a later function of `atexit` may start another."""
    _stop_at_exit()
    while _at_end:
        with fail_open(_log, "recorder", "a step at the end of the process failed"):
            _at_end.pop()()

    if _watch is not None and _watch.interrupted:
        from traceml.recorder.exits import end_by_interrupt

        end_by_interrupt()


def _stop_at_exit() -> None:
    recording = _live_recording()
    if recording is None:
        return

    if not recording.exit_noted:
        error = sys.exc_info()[1] or (_watch.last_error() if _watch is not None else None)
        from traceml.recorder.exits import status_of

        note_exit(error, 0 if error is None else status_of(error))

    try:
        _stop("failed" if recording.failed else "finished")
    except KeyboardInterrupt:
        _log.warning("interrupted while the last rows were sent; they stay in the flight file")


def _after_fork() -> None:
    """Make everything a no-op in a forked child: a data-loader worker is not a rank, and logs for its parent."""
    global _watch, _lock
    _lock = threading.RLock()  # the parent's may have been held
    is_starting, state.starter = state.starter is not None, None
    _at_end.clear()
    _at_shutdown.clear()
    recorder, state.recorder, state.instrumentation = state.recorder, None, None
    notify_change(forked=True)
    watch, _watch = _watch, None
    if watch is not None:
        watch.uninstall()
    if recorder is not None:
        state.parent = recorder if recorder.enabled or is_starting else None
        with fail_open(_log, "recorder", "a forked child could not leave the recorder"):
            recorder.forget()


os.register_at_fork(after_in_child=_after_fork)  # also where another thread forks during the first start
