"""Wait until trackers have what was logged: `traceml.flush` and `traceml.sync`."""

from __future__ import annotations

import logging
import math
import os
import subprocess
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.clock import own_time as time
from traceml.coerce import path_text, seconds_to_wait
from traceml.errors import SettingsError, TraceMLError
from traceml.helper_programs import helper_program, without_debugger
from traceml.recorder.current_recorder import current_recorder
from traceml.recorder.sending.dialing import dial_as_client
from traceml.track.rank.active_experiment import loggers
from traceml.track.rank.logger import deferred_values
from traceml.track.tracker_state import DeliveryPhase, TrackerState

if TYPE_CHECKING:
    from traceml.recorder.recorder import Recorder

__all__ = ["flush", "sync"]

_POLL_S = 0.05
_ASK_S = 0.2  # between questions to an aggregator on another host
_DIAL_S = 5.0
_States = Callable[[], list[TrackerState]]

_log = logging.getLogger("traceml")


def flush(timeout: float | None = 30.0, experiment: int | None = None) -> bool:
    """Wait until the trackers have confirmed what this process has logged; return whether they have.

    Without a tracker, until it is stored. After `traceml.shutdown()`, until the trackers' runs have ended too. Rows
    that a tracker refuses are not waited for; the report counts them.

    Examples:
        >>> traceml.log_metric("loss", 0.5)
        >>> is_delivered = traceml.flush(timeout=20)

    Args:
        timeout: longest wait in seconds; None waits until all is delivered, except to trackers that are broken.
        experiment: number of the experiment whose trackers count; by default all that this process logs to.

    Raises:
        ArgumentTypeError: `timeout` is no number.
    """
    recorder, timeout = current_recorder(), seconds_to_wait(timeout)
    if recorder is None or not (recorder.enabled or recorder.is_over):
        return True

    until_s = None if timeout is None else time.monotonic() + timeout
    if recorder.enabled and not _is_stored(recorder, until_s):
        return False

    backends = loggers.backends(experiment)
    if not backends:
        return True
    if recorder.run_dir is None:
        return False

    try:
        with _tracker_states(recorder, recorder.run_dir, backends) as states:
            return _await_trackers(recorder, states, until_s)
    except (TraceMLError, OSError) as error:  # OSError: the connection to the other host broke, or timed out
        _log.warning(
            "flush: the run is stored on another host, whose aggregator does not report what trackers have: %s", error
        )
        return False


def sync(run: str | os.PathLike[str] | None = None, timeout: float | None = None) -> bool:
    """Upload what trackers are still missing, as the command `traceml sync` does; return whether they have everything.

    Examples:
        >>> has_everything = traceml.sync(timeout=20)

    Args:
        run: folder or id of a run; it waits while another process records the run. By default the run of this
            process, and without one all that have ended in the runs folder; when tracing is off, none.
        timeout: longest wait in seconds; what is left then stays in the run, for another call.

    Raises:
        ArgumentTypeError: `run` is no text or path, or `timeout` no number.
    """
    recorder, timeout = current_recorder(), seconds_to_wait(timeout)
    if run is not None:
        run = path_text(run, "a run")

    if recorder is not None and recorder.enabled and (run is None or _is_own(run, recorder)):
        return flush(timeout)
    if run is None and not _is_tracing_enabled(recorder):
        return True
    if run is None and recorder is not None:
        run = recorder.run_dir

    command = helper_program("traceml", "sync", *([] if run is None else [str(run), "--wait"]))
    if recorder is not None:
        command += ["--runs-dir", str(recorder.config.runs_dir)]

    try:
        with without_debugger():
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="backslashreplace",
                timeout=timeout, check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False

    if done.returncode:
        complaint = " ".join((done.stderr or done.stdout).split())
        _log.warning("traceml sync: %s", complaint.removeprefix("traceml sync: "))

    return done.returncode == 0


def _is_own(run: str, recorder: Recorder) -> bool:
    """Whether a folder or id is that of the run that this process records: the command would wait for its end."""
    own = recorder.run_dir
    named = (Path(run), recorder.config.runs_dir / run)
    return own is not None and any(path.resolve() == own.resolve() for path in named)


def _is_tracing_enabled(recorder: Recorder | None) -> bool:
    """Whether the settings in force let this process trace, now or until its recorder was stopped."""
    if recorder is not None:
        return recorder.config.enabled

    from traceml import settings

    try:
        return settings.load().enabled
    except SettingsError:  # the command tells of it
        return True


def _is_stored(recorder: Recorder, until_s: float | None) -> bool:
    """Wait until everything logged so far is in the run's store; return whether it is."""
    while deferred_values():
        if _left_s(until_s) <= 0:
            return False

        time.sleep(_POLL_S)

    return recorder.wait_for_files(_left_s(until_s)) and recorder.wait_until_stored(_left_s(until_s))


@contextmanager
def _tracker_states(recorder: Recorder, run_dir: Path, backends: Collection[str]) -> Iterator[_States]:
    """Yield a function that reads the trackers' states: from the run's folder, else from its aggregator."""
    if run_dir.is_dir():
        yield lambda: [TrackerState.load(run_dir, backend) for backend in backends]
        return

    with closing(dial_as_client(recorder.config, run_dir.name, timeout_s=_DIAL_S)) as connection:

        def ask() -> list[TrackerState]:
            time.sleep(_ASK_S)
            found = connection.request("trackers", {"backends": list(backends)})["trackers"]
            return [
                TrackerState(each["backend"], DeliveryPhase(each["phase"]), reached=each["reached"]) for each in found
            ]

        yield ask


def _await_trackers(recorder: Recorder, read: _States, until_s: float | None) -> bool:
    """Wait until every tracker has the rows logged so far, or only broken ones have not; return whether all do."""
    # A stopped recorder has no tables to count in; its trackers are done when they have ended their runs.
    wanted = recorder.logged_rows if recorder.enabled else None
    while True:
        missing = [state for state in read() if not _has(state, recorder.stream, wanted)]
        if not missing:
            return True
        if all(state.phase is DeliveryPhase.BROKEN for state in missing) or _left_s(until_s) <= 0:
            return False

        time.sleep(_POLL_S)


def _has(state: TrackerState, stream: int | None, wanted: dict[str, int] | None) -> bool:
    if wanted is None:
        return state.phase is DeliveryPhase.DONE

    reached = state.reached.get(str(stream), {})
    return all(reached.get(table, 0) >= rows for table, rows in wanted.items())


def _left_s(until_s: float | None) -> float:
    return math.inf if until_s is None else until_s - time.monotonic()
