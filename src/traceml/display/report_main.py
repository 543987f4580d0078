"""Entry point of the process that writes a run's reports: `python -m traceml.display.report_main NICE`.

It loads its modules, then waits on standard input for one request, and answers it on standard output, both JSON. It is
a process of its own because a report needs memory and time: neither its end nor its memory concerns other runs.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from traceml.errors import TraceMLError
from traceml.priority import lower_priority

__all__ = ["main"]

_KILLED_FIRST = "1000"


def main() -> int:
    """Write what is asked for; return the exit status."""
    # A scheduler sends it to all processes of a job, whose report this one makes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lower_priority(int(sys.argv[1]))
    _be_killed_first()
    gc.disable()  # the process ends with the report
    import numpy.ma  # noqa: F401 - numpy's functions of sets import it when first called

    from traceml.display import report_files

    request = sys.stdin.readline()
    if not request:
        return 0  # the aggregator has ended, and wants nothing

    run_dir, page = Path(json.loads(request)["run_dir"]), json.loads(request)["page"]
    try:
        if page is None:
            _answer(path=str(report_files.write_reports(run_dir)))
        else:
            report_files.write_page(run_dir, Path(page))
            _answer(path=page)
    except (TraceMLError, OSError) as error:
        _answer(error=str(error))

    return 0


def _be_killed_first() -> None:
    """Offer this process to the system when memory runs out: a report can be made again, a training cannot."""
    try:
        Path("/proc/self/oom_score_adj").write_text(_KILLED_FIRST)
    except OSError:  # not allowed here
        pass


def _answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # the files are written, and somebody waits for this end: no module need be taken apart
