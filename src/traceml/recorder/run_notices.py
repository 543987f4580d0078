"""The two things that a recorded script prints on standard error: where its run is stored, and at the end the verdict.

`traceml run` and `launch` print both themselves. `quiet=True` prints neither.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.clock import own_time as time
from traceml.fail_open import fail_open, is_terminal, print_notice
from traceml.formatting import printable
from traceml.helper_programs import helper_program, without_debugger
from traceml.inspection.script_time import is_interactive
from traceml.recorder.lifecycle import on_end, on_shutdown
from traceml.run_folder import REPORT_NAME, moved_text, report_command
from traceml.transport.run_line import run_line, short_path

if TYPE_CHECKING:
    from traceml.recorder.recorder import Recorder
    from traceml.recorder.recorder_facts import RecorderEnd

__all__ = ["announce", "await_report", "dismiss", "show_verdict"]

_log = logging.getLogger("traceml")

_ANNOUNCED = "TRACEML_ANNOUNCED"
# The aggregator writes the report within a second after the last rank has left.
_REPORT_WAIT_S = 10.0
_SHOW_S = 60.0
_MAX_SHOWN = 10  # each takes most of a second
_due: list[tuple[Path, RecorderEnd]] = []  # the runs whose verdicts are due, in the order of their starts
_here: set[Path] = set()  # folders of runs that are on this host


def announce(recorder: Recorder, run_dir: Path) -> None:
    """Print where the run is stored, and register its verdict for the end of this process.

    Only the first process of rank 0 does, and not where a launcher does. The first rank of another host prints where it
    is stored by an aggregator of its host: that run lacks the other ranks, and a verdict would be of these only.
    """
    with fail_open(_log, "session", "the run's folder cannot be announced", once=True):
        config, is_first = recorder.config, os.environ.get(_ANNOUNCED) != str(run_dir)
        if config.quiet or config.supervised or recorder.is_child or not is_first:
            return

        if recorder.rank_identity.rank:
            if _is_first_of_host() and not config.address_given:
                print_notice(run_line("tracing the ranks of this host in", run_dir))

            return

        os.environ[_ANNOUNCED] = str(run_dir)  # for children that join this run
        _due.append((run_dir, recorder.end))
        if run_dir.is_dir():
            _here.add(run_dir)

        on_end(_show_at_end)
        on_shutdown(_show_to_user)
        if _is_same(run_dir.parent, config.runs_dir):  # else a warning has named the folder
            does = "tracing" if recorder.will_trace else "recording"
            print_notice(run_line(does, run_dir))


def _is_first_of_host() -> bool:
    """Whether this process is the first rank of one of several hosts, by the variables of its launcher."""
    local_rank, on_host, world = map(os.environ.get, ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return local_rank == "0" and on_host is not None and on_host != world


def dismiss(run_dir: Path) -> None:
    """Print no verdict of this run when the process ends."""
    _due[:] = [each for each in _due if each[0] != run_dir]


def show_verdict(run_dir: Path, *, stored_late: bool = False) -> None:
    """Print the verdict of an ended run; another process creates it, so this one loads nothing.

    Args:
        stored_late: whether a slow aggregator has rows of the run still to store; its report is then the first one.
    """
    dismiss(run_dir)
    if run_dir in _here and not run_dir.is_dir():
        _print(f"traceml: no report of this run: {moved_text(run_dir)}")
        return

    if not run_dir.is_dir():  # the aggregator runs on another host
        _log.info("the report will be in %s on the host of the aggregator", run_dir)
        return

    if not await_report(run_dir) and stored_late:
        command = report_command(short_path(run_dir))
        _print(f"traceml: the run is not stored completely yet; `{command}` shows the verdict later")
        return

    # That of the stream, not of the locale: a script may have set that one, and this process alone would follow it.
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    try:
        with without_debugger():
            done = subprocess.run(
                helper_program("traceml", "report", str(run_dir)),
                env=_environ(encoding), stdin=subprocess.DEVNULL, capture_output=True, encoding=encoding,
                errors="backslashreplace", timeout=_SHOW_S, check=True,
            )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as failure:
        message = getattr(failure, "stderr", None) or failure
        _log.warning("the verdict cannot be shown: %s. See `%s`.", str(message).strip(), report_command(run_dir))
        return

    print_notice(done.stdout.removesuffix("\n"))


def await_report(run_dir: Path) -> bool:
    """Wait until the aggregator has written the report of an ended run, for at most 10 s; return whether it has."""
    until_s = time.monotonic() + _REPORT_WAIT_S
    while not (is_written := (run_dir / REPORT_NAME).exists()) and time.monotonic() < until_s:
        time.sleep(0.02)

    return is_written


def _show_at_end() -> None:
    """Show the verdicts that are due, each run's unless a warning has said that not all of its rows are stored."""
    if is_interactive():  # nobody reads what a closed session prints
        return

    due = _due[-_MAX_SHOWN:]
    if len(_due) > len(due):
        _print(f"traceml: the last {len(due)} of {len(_due)} verdicts; `traceml runs` has all")

    try:
        for run_dir, end in due:
            _show_ended(run_dir, end)
    except KeyboardInterrupt:
        _print(f"traceml: `{report_command(short_path(run_dir))}` shows the verdict")


def _show_ended(run_dir: Path, end: RecorderEnd) -> None:
    own = end.rank_identity
    if not end.all_stored and not end.is_stored_late:
        return

    if end.failed and own.world_size > 1:  # the launcher ends the other ranks when this one has left
        command = report_command(short_path(run_dir))
        _print(f"traceml: rank {own.rank} failed; `{command}` says why once the job has ended")
    else:
        show_verdict(run_dir, stored_late=end.is_stored_late)


def _show_to_user() -> None:
    """Show the run that `shutdown` has ended to somebody who works in a notebook or an interactive session."""
    if not is_interactive() or not _due:
        return

    with fail_open(_log, "session", "the run cannot be shown"):
        run_dir, end = _due[-1]
        dismiss(run_dir)
        if end.viewer is not None and end.all_stored and end.rank_identity.world_size == 1 and run_dir.is_dir():
            await_report(run_dir)
            end.viewer(run_dir)


def _is_same(folder: Path, other: Path) -> bool:
    try:
        return folder.samefile(other)
    except OSError:  # one of them is on another host, or does not exist
        return False


def _print(line: str) -> None:
    print_notice(printable(line))


def _environ(encoding: str) -> dict[str, str]:
    """Return an environment in which the report is formatted for this process's terminal."""
    environ = {key: value for key, value in os.environ.items() if key != "TRACEML"}
    environ["PYTHONIOENCODING"] = encoding
    if is_terminal(sys.stderr):
        environ.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
        if "NO_COLOR" not in environ:
            environ["FORCE_COLOR"] = "1"

    return environ
