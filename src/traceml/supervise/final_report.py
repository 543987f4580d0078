"""The end of a traced job: the verdict card on standard error, and a copy of the report where requested."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, cast

from traceml.errors import TraceMLError
from traceml.fail_open import fail_open
from traceml.run_folder import (
    AGGREGATOR_LOG,
    REPORT_NAME,
    aggregator_words,
    moved_text,
    report_command,
    unwritable_text,
)

__all__ = ["load_card", "print_final_report"]

_ASKING_S = 0.002  # the request goes out first

_log = logging.getLogger("traceml")
_UNFINISHED = """\
{program}: this run is not stored completely; {log} may give the reason{words}
"""
_LEFT_IN_MEMORY = """\
What could be saved of the rest stays in memory files for an hour, logged values for a week: `traceml serve --runs-dir \
{runs}` stores it.
"""


def load_card() -> None:
    """Import the card's modules on a thread: this takes a tenth of a second.

    Call it when the ranks have said bye, or else just before the aggregator is asked to complete the run. Not earlier:
    the supervisor stays small while the job runs. Not later: each answer of the aggregator would wait for the import
    to release the lock. Calling it again has no effect. Where no thread can be started, the card imports them itself.
    """
    with suppress(RuntimeError):  # `ulimit -u`, or a limit of the cgroup
        threading.Thread(target=_import_card, name="traceml-card", daemon=True).start()


def _import_card() -> None:
    time.sleep(_ASKING_S)
    import_module("traceml.renderers.text.card")
    import_module("traceml.display.other_trainings")  # asked after the card is printed


def print_final_report(
    run_dir: Path, *, finished: bool, program: str, report: Path | None = None, quiet: bool = False, file: TextIO
) -> None:
    """Print the verdict card of a finished run. If the report cannot be made, print why; raise nothing.

    Args:
        finished: whether the run is complete on disk.
        program: name of the program in messages.
        report: path for a copy of the report: the page if the name ends in .html, else the JSON.
        quiet: print no card, only what went wrong.
        file: target; standard output belongs to the script.
    """
    target = cast("TextIO", _Lossy(file))
    if not quiet:
        target.write("\n")  # the script may not have ended its last line, and nobody can be asked

    with fail_open(_log, "supervise", "the verdict cannot be shown"):  # for lack of memory, for example
        _print_report(run_dir, program, report, target, finished=finished, quiet=quiet)

    if not finished and run_dir.is_dir():
        from traceml.database.flight.flight_owner import has_left_flights
        from traceml.formatting import printable, shell_quoted

        last = printable(aggregator_words(run_dir))
        words = f"; its last line is\n  {last}" if last else "."
        target.write(_UNFINISHED.format(program=program, log=run_dir / AGGREGATOR_LOG, words=words))
        if has_left_flights(run_dir):
            target.write(_LEFT_IN_MEMORY.format(runs=shell_quoted(str(run_dir.parent))))


def _print_report(
    run_dir: Path, program: str, report: Path | None, file: TextIO, *, finished: bool, quiet: bool
) -> None:
    from traceml.formatting import printable
    from traceml.renderers.text.card import print_card

    try:
        path = run_dir / REPORT_NAME
        if not finished or not path.exists():
            from traceml.display.report_files import write_reports  # loads what reads a store: a quarter of a second

            path = write_reports(run_dir)

        if not quiet:
            print_card(path, file=file)
    except (TraceMLError, OSError) as error:  # the job's own result matters more
        why = _reason(run_dir, error)
        file.write(printable(f"{program}: no report of this run: {why}", lines=True) + "\n")
    else:
        if not quiet:
            _print_others(run_dir, program, file)

        if report is not None:
            _copy_report(path, report, program, file)


def _reason(run_dir: Path, error: Exception) -> str:
    """Return why there is no report, and what to do."""
    if not run_dir.is_dir():
        return moved_text(run_dir)

    if isinstance(error, TraceMLError) or not isinstance(error, OSError):
        return str(error)

    from traceml.formatting import shell_quoted

    unwritable, sync = unwritable_text(run_dir, "its folder", error), f"traceml sync {shell_quoted(str(run_dir))}"
    return f"{unwritable}. `{report_command(run_dir)}` shows it; then `{sync}` delivers to trackers what they lack."


class _Lossy:
    """A text stream that drops what cannot be written, as to a closed terminal: the job's status counts."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> None:
        """Write the text if it can be."""
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        """Write what is buffered if it can be."""
        with suppress(OSError):
            self._file.flush()


def _print_others(run_dir: Path, program: str, file: TextIO) -> None:
    """Print which other trainings the script has started, if any: the card is that of one run."""
    from traceml.display.other_trainings import other_trainings
    from traceml.formatting import printable

    with fail_open(_log, "supervise", "other trainings of the script are not named"):
        if others := other_trainings(run_dir):
            file.write(printable(f"{program}: {others}", lines=True) + "\n")


def _copy_report(written: Path, report: Path, program: str, file: TextIO) -> None:
    import shutil

    from traceml.display.report_files import write_page

    try:
        if report.suffix.lower() in (".html", ".htm"):
            write_page(written.parent, report)
        else:
            shutil.copyfile(written, report)
    except (TraceMLError, OSError) as error:  # as above
        file.write(f"{program}: cannot write {report}: {error}\n")
