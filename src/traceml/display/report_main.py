"""Process that writes a run's reports: `python -m traceml.display.report_main NICE`, or a fork of the aggregator.

It loads its modules, then waits on standard input for one request, and answers it on standard output, both JSON. It is
a process of its own because a report needs memory and time: neither its end nor its memory concerns other runs.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from pathlib import Path
from typing import IO

from traceml.errors import TraceMLError
from traceml.helper_programs import exit_process, lower_priority

__all__ = ["work"]

_KILLED_FIRST = "1000"


def work(nice: int, requests: IO[str], answers: IO[str]) -> None:
    """Write what the first request asks for, and answer it; return without one when the aggregator has ended.

    Args:
        nice: nice value of this process.
    """
    # A scheduler sends it to all processes of a job, whose report this one makes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lower_priority(nice)
    _be_killed_first()
    gc.disable()  # the process ends with the report
    import numpy.ma  # noqa: F401 - numpy's functions of sets import it when first called

    import traceml.display.report_files  # noqa: F401 - needed at once when it is asked for

    if request := requests.readline():
        answers.write(json.dumps(_write(**json.loads(request))) + "\n")
        answers.flush()


def _write(run_dir: str, page: str | None) -> dict[str, str]:
    """Write both reports of a run, or its page alone; return the path or the error."""
    from traceml.display.report_files import write_page, write_reports

    try:
        if page is None:
            return {"path": str(write_reports(Path(run_dir)))}

        write_page(Path(run_dir), Path(page))
    except (TraceMLError, OSError) as error:
        return {"error": str(error)}

    return {"path": page}


def _be_killed_first() -> None:
    """Offer this process to the system when memory runs out: a report can be made again, a training cannot."""
    try:
        Path("/proc/self/oom_score_adj").write_text(_KILLED_FIRST)
    except OSError:  # not allowed here
        pass


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.stdin, sys.stdout)
    exit_process(0)
