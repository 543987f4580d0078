"""The two things that a recorded script prints on standard error: where its run is stored, and at the end the verdict.

`traceml run` and `launch` print both themselves. `quiet=True` prints neither.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.fail_open import fail_open
from traceml.formatting import printable
from traceml.own_programs import own_program
from traceml.recorder.lifecycle import on_end
from traceml.transport.run_line import run_line, short_path

if TYPE_CHECKING:
    from traceml.recorder.recorder import Recorder

__all__ = ["announce", "await_report", "dismiss", "show_verdict"]

_log = logging.getLogger("traceml")

_ANNOUNCED = "TRACEML_ANNOUNCED"
# The aggregator writes the report half a second after the last rank has left.
_REPORT_WAIT_S = 10.0
_SHOW_S = 60.0
_due: tuple[Path, Recorder] | None = None  # the run whose verdict is due at the end


def announce(recorder: Recorder, run_dir: Path) -> None:
    """Print where the run is stored, and register its verdict for the end of this process.

    Only the first process of rank 0 does, and not where a launcher does.

    Args:
        recorder: of this process.
        run_dir: the run's folder.
    """
    global _due
    with fail_open(_log, "session", "the run's folder cannot be announced", once=True):
        config, is_first = recorder.config, os.environ.get(_ANNOUNCED) != str(run_dir)
        if config.quiet or config.supervised or recorder.is_child or recorder.rank_identity.rank or not is_first:
            return

        os.environ[_ANNOUNCED] = str(run_dir)  # for children that join this run
        _due = run_dir, recorder
        on_end(_show_at_end)
        if _is_same(run_dir.parent, config.runs_dir):  # else a warning has named the folder
            does = "tracing" if recorder.tracing else "recording"
            _write(run_line(does, run_dir))


def dismiss(run_dir: Path) -> None:
    """Print no verdict of this run when the process ends."""
    global _due
    if _due is not None and _due[0] == run_dir:
        _due = None


def show_verdict(run_dir: Path) -> None:
    """Print the verdict of an ended run; another process creates it, so this one loads nothing.

    Args:
        run_dir: the run's folder.
    """
    dismiss(run_dir)
    if not run_dir.is_dir():  # the aggregator runs on another host
        _log.info("the report will be in %s on the host of the aggregator", run_dir)
        return

    await_report(run_dir)
    try:
        done = subprocess.run(
            own_program("traceml", "report", str(run_dir)),
            env=_environ(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SHOW_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as failure:
        message = getattr(failure, "stderr", None) or failure
        _log.warning("the verdict cannot be shown: %s. See `traceml report %s`.", str(message).strip(), run_dir)
        return

    _write(done.stdout)


def await_report(run_dir: Path) -> None:
    """Wait until the aggregator has written the report of an ended run, for at most 10 s."""
    until_s = time.monotonic() + _REPORT_WAIT_S
    while not (run_dir / "report.json").exists() and time.monotonic() < until_s:
        time.sleep(0.02)


def _show_at_end() -> None:
    """Show the verdict that is due, unless a warning has said that not all rows are stored."""
    if _due is None or not _due[1].all_stored:
        return

    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:  # nobody reads what a closed session prints
        return

    run_dir, recorder = _due
    own = recorder.rank_identity
    if recorder.failed and own.world_size > 1:  # the launcher ends the other ranks when this one has left
        _print(
            f"traceml: rank {own.rank} failed; `traceml report {short_path(run_dir)}` says why when the job has ended"
        )
        return

    try:
        show_verdict(run_dir)
    except KeyboardInterrupt:
        _print(f"traceml: `traceml report {short_path(run_dir)}` shows the verdict")


def _is_same(folder: Path, other: Path) -> bool:
    try:
        return folder.samefile(other)
    except OSError:  # one of them is on another host, or does not exist
        return False


def _print(line: str) -> None:
    _write(printable(line) + "\n")


def _write(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _environ() -> dict[str, str]:
    """Return an environment in which the report is formatted for this process's terminal."""
    environ = {key: value for key, value in os.environ.items() if key != "TRACEML"}
    if sys.stderr.isatty():
        environ.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
        if "NO_COLOR" not in environ:
            environ["FORCE_COLOR"] = "1"

    return environ
