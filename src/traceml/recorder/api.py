"""What a script calls. Without a running recorder every call does nothing, in well under a microsecond."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar, overload

from traceml.errors import TraceMLError

if TYPE_CHECKING:
    from traceml.instrument import Instrumentation
    from traceml.recorder.exits import ExitWatch
    from traceml.recorder.recorder import Recorder
    from traceml.settings import Config

__all__ = ["Recorder", "init", "is_enabled", "phase", "shutdown", "trace", "trace_data", "trace_step"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger("traceml")
_recorder: Recorder | None = None
_running: Instrumentation | None = (
    None  # the instrumentation of the running recorder: one look tells the calls below what to do
)
_watch: ExitWatch | None = None
_forked_from: Recorder | None = None  # in a forked child: its parent's recorder, by which a `log_*` call finds the run
on_change: list[Callable[[bool], None]] = []
"""Called when the recorder of this process is another, or none any more; with True in a forked child."""
_lock = threading.Lock()
_hooked = False


class _Nothing:
    """A context manager that does nothing; one object serves all calls."""

    __slots__ = ()

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None


_NOTHING = _Nothing()


def init(**arguments: Any) -> Recorder:
    """Start tracing in this process: connect to the aggregator and start the recorder's thread.

    Calling it again returns the recorder that runs, whatever the arguments; `enabled=False` stops it.

    Args:
        arguments: settings by name, over those of environment and files; `docs/settings.md` lists them.

    Returns:
        The recorder; a disabled one when tracing is turned off.

    Raises:
        SettingsError: an unknown setting or a bad value.
        AggregatorUnavailableError: no aggregator answered within `connect_timeout`; with `on_missing="warn"` a warning.
        AggregatorRefusedError: it answered and refused; with `on_missing="warn"` a warning.
    """
    from traceml import settings

    config = settings.load(**arguments)
    with _lock:
        if _recorder is not None and _recorder.enabled and _recorder.tracing and config.enabled:
            return _recorder

    if not config.enabled:
        shutdown()

    return start(config)


def start(config: Config, *, wait: bool = True, tracing: bool = True) -> Recorder:
    """Start a recorder with settings that are loaded already; see `init`.

    Args:
        config: the settings.
        wait: connect now; else the recorder's thread connects when it can.
        tracing: also put the hooks in place; else what the user logs is all there is.
    """
    global _recorder, _running
    from traceml.recorder.identity import spawned_from
    from traceml.recorder.recorder import Recorder

    if tracing and _recorder is not None and _recorder.is_child:  # it logged for its parent; now it is a rank
        shutdown()

    with _lock:
        if _recorder is not None and _recorder.enabled:
            if tracing and not _recorder.tracing:
                _recorder.trace()
                _running = _recorder.instrumentation

            return _recorder

        if config.sources["log_level"] != "default":  # else the level is the user's, who may have set one
            _log.setLevel(config.log_level.upper())

        parent = None if tracing else _forked_from
        spawned = spawned_from() if not tracing and parent is None else None
        _recorder = recorder = Recorder(config, parent=parent, spawned=spawned)
        if config.enabled and not _is_helper_process():
            try:
                recorder.start(wait=wait, tracing=tracing)
                _running = recorder.instrumentation
                _hook_process(watch=not recorder.is_child)
            except TraceMLError:
                raise
            except Exception as error:  # noqa: BLE001 - fail open: a mistake of ours is no reason for a job to end
                _log.warning("tracing could not be started: %r", error, exc_info=error)

        _tell_change()

    if not recorder.is_child and recorder.enabled and (config.backend or config.collectors):
        _begin_tracking(recorder)

    return recorder


def _begin_tracking(recorder: Recorder) -> None:
    """Have tracking begin; by name, as its room stands above this one and most jobs do without it."""
    from importlib import import_module

    try:
        import_module("traceml.track.rank.capturing").begin(recorder)
    except Exception as error:  # noqa: BLE001 - fail open
        _log.warning("tracking could not be started: %r", error, exc_info=error)


def current() -> Recorder | None:
    """Return this process's recorder, whether or not it runs; None before the first."""
    return _recorder


def recorder_for_logging(*, again: bool = False) -> Recorder | None:
    """Return the recorder that runs; before any `init`, start one that only logs. None when nothing is to be recorded.

    In a forked child of a process that records it belongs to the same run.

    Args:
        again: start one also after a `shutdown`: somebody begins something.

    Raises:
        SettingsError: the settings are wrong, and somebody begins something; else that is a warning.
    """
    global _recorder
    recorder = _recorder
    if recorder is not None and (recorder.enabled or not (again and recorder.is_over)):
        return recorder if recorder.enabled else None

    if _is_helper_process() or sys.is_finalizing():
        return None

    from traceml import settings

    try:
        known = recorder or _forked_from
        config = known.config if known is not None else settings.load(local=True, **_settings_of_parent())
        recorder = start(config, wait=False, tracing=False)
    except TraceMLError as error:
        if again:
            raise

        from traceml.recorder.recorder import Recorder

        _log.warning("nothing is recorded: %s", error)
        _recorder = Recorder(settings.Config(enabled=False))
        return None

    return recorder if recorder.enabled else None


def shutdown() -> None:
    """Stop tracing: send what is left, within 5 s, and take all hooks out. Also done when the process ends."""
    _stop("failed" if _recorder is not None and _recorder.failed else "finished")


def is_enabled() -> bool:
    """Whether this process is being traced."""
    return _recorder is not None and _recorder.enabled


def phase(name: str) -> AbstractContextManager[Any]:
    """Return a context manager that times a part of the step as a phase of its own.

    Args:
        name: what to call it; use few different names.
    """
    running = _running
    return _NOTHING if running is None else running.phase(name)


def trace_step(model: Any = None, optimizer: Any = None) -> AbstractContextManager[Any]:
    """Return a context manager that bounds one training step.

    The first use turns off the inference of steps; the time between two blocks belongs to the later one.

    Args:
        model: what is trained, to be timed from its first call on.
        optimizer: what trains it.
    """
    running = _running
    return _NOTHING if running is None else running.trace_step(model, optimizer)


def trace_data(loader: Iterable[T]) -> Iterable[T]:
    """Return the iterable with its waiting times recorded; for what is no torch DataLoader.

    Args:
        loader: anything that gives batches.
    """
    running = _running
    return loader if running is None else running.trace_data(loader)


@overload
def trace(function: F, /) -> F: ...
@overload
def trace(name: str | None = None, /) -> Callable[[F], F]: ...
def trace(function: Any = None, /) -> Any:
    """Make a function a phase of its own: `@traceml.trace`, or `@traceml.trace("name")`.

    Args:
        function: the function, or the phase's name; by default the function's name.
    """
    if function is None or isinstance(function, str):
        return lambda decorated: _traced(decorated, function or decorated.__name__)

    return _traced(function, function.__name__)


def _traced(function: F, name: str) -> F:
    from traceml.instrument.user import traced

    return traced(function, lambda: phase(name))


def __getattr__(name: str) -> Any:
    if name != "Recorder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from traceml.recorder.recorder import Recorder

    return Recorder


# --- the process around the recorder ---------------------------------------------------------------------------------


def _stop(reason: str) -> None:
    global _running
    with _lock:
        recorder, watch = _recorder, _watch
        _running = None

    if recorder is not None:
        recorder.prepare_stop()

    _tell_change()
    if watch is not None:
        watch.uninstall()
    if recorder is not None:
        try:
            recorder.stop(reason)
        except Exception as error:  # noqa: BLE001 - fail open: the flight file keeps what was not sent
            _log.warning("tracing did not end well: %r", error, exc_info=error)


def _settings_of_parent() -> dict[str, Any]:
    """Return where the process records that has spawned this one, as settings; empty where none has."""
    from traceml.recorder.identity import spawned_from

    spawned = spawned_from()
    return spawned.settings if spawned is not None else {}


def _is_helper_process() -> bool:
    """Whether this is a spawned child that only imports the main script again, to find the function it has to run.

    `multiprocessing` marks that moment; a data-loader worker whose script calls `init` without a guard must not become
    a second rank.
    """
    process = sys.modules.get("multiprocessing.process")
    return process is not None and bool(getattr(process.current_process(), "_inheriting", False))


def _tell_change(*, forked: bool = False) -> None:
    for listener in on_change:
        listener(forked)


def _hook_process(*, watch: bool) -> None:
    """See the end of this process (with `watch` also how it ends), and its forks."""
    global _hooked, _watch
    if watch:
        from traceml.recorder.exits import ExitWatch

        _watch = ExitWatch(note_exit)
        _watch.install()

    # A process that multiprocessing has forked ends without atexit, but runs these.
    util = sys.modules.get("multiprocessing.util")
    if util is not None and util._exiting is False:
        util.Finalize(None, _at_exit, exitpriority=0)

    if not _hooked:
        _hooked = True
        atexit.register(_at_exit)
        os.register_at_fork(after_in_child=_after_fork)


def note_exit(error: BaseException | None, status: int) -> None:
    """Record how this process ends; the first word counts."""
    if _recorder is not None:
        try:
            _recorder.note_exit(error, status)
        except Exception as failure:  # noqa: BLE001 - fail open: the user's own error is what must come through
            _log.warning("the end of this process could not be recorded: %r", failure)


def _at_exit() -> None:
    recorder = _recorder
    if recorder is None or not recorder.enabled or recorder.pid != os.getpid():
        return

    if not recorder.exit_told:
        error = sys.exc_info()[1] or (_watch.last_error() if _watch is not None else None)
        from traceml.recorder.exits import status_of

        note_exit(error, 0 if error is None else status_of(error))

    try:
        _stop("failed" if recorder.failed else "finished")
    except KeyboardInterrupt:
        _log.warning("interrupted while the last rows were sent; they stay in the flight file")


def _after_fork() -> None:
    """Make everything a no-op in a forked child: a data-loader worker is no rank. What it logs is its parent's."""
    global _running, _recorder, _watch, _lock, _forked_from
    _lock = threading.Lock()  # the parent's may have been held
    recorder, _recorder, _running = _recorder, None, None
    _tell_change(forked=True)
    watch, _watch = _watch, None
    if watch is not None:
        watch.uninstall()
    if recorder is not None:
        _forked_from = recorder if recorder.enabled else None
        try:
            recorder.forget()
        except Exception as error:  # noqa: BLE001 - fail open: the child's work goes on
            _log.warning("a forked child could not leave the recorder: %r", error)
