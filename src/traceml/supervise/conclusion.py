"""What a traced job leaves its user with: the verdict on standard error, and the report where it was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TextIO

from traceml.errors import TraceMLError

__all__ = ["conclude"]

_UNFINISHED = """\
{program}: not all of this run is stored; {log} may say why.
What its ranks left in memory stays for an hour: `traceml serve --runs-dir {runs}` stores it and writes the report.
"""


def conclude(run_dir: Path, *, finished: bool, program: str, report: Path | None = None, file: TextIO) -> None:
    """Print the verdict card of a run that is over. A report that cannot be made is told, and raises nothing.

    Args:
        run_dir: the run's folder.
        finished: whether the aggregator has finished the run on disk.
        program: what to call ourselves in messages.
        report: where else to put the report: the page where the name ends in .html, else the JSON.
        file: where to print; standard output belongs to the script.
    """
    # imported at the end: while the job runs, its supervisor stays small
    from traceml.display.report_files import write_reports
    from traceml.renderers.text.card import print_card

    try:
        path = run_dir / "report.json"
        if not finished or not path.exists():
            path = write_reports(run_dir)

        print_card(path, file=file)
    except (TraceMLError, OSError) as error:  # the job has run, and its result is what the caller waits for
        file.write(f"{program}: no report of this run: {error}\n")
    else:
        if report is not None:
            _put(path, report, program, file)

    if not finished and run_dir.is_dir():
        file.write(_UNFINISHED.format(program=program, log=run_dir / "logs" / "aggregator.log", runs=run_dir.parent))


def _put(written: Path, report: Path, program: str, file: TextIO) -> None:
    from traceml.display.report_files import write_page

    try:
        if report.suffix.lower() in (".html", ".htm"):
            write_page(written.parent, report)
        else:
            shutil.copyfile(written, report)
    except (TraceMLError, OSError) as error:  # as above
        file.write(f"{program}: cannot write {report}: {error}\n")
