"""Handle of the processes that write the reports of ended runs; a forked one continues here.

Process: aggregator, started by `traceml serve`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from traceml.errors import TraceMLError
from traceml.formatting import left_text
from traceml.helper_programs import change_command_line, helper_program
from traceml.process_ends import end_of_status
from traceml.run_folder import report_command
from traceml.supervise.processes import REPORT_LIMIT_S, spawn

__all__ = ["BESIDE_RUNS", "ReportProcess"]

BESIDE_RUNS = 5
"""Nice value while other training continues. At 19, where all cores are in use, reports would take minutes."""

_log = logging.getLogger("traceml")


class ReportProcess:
    """Handle of the processes that write the reports of ended runs, one run at a time.

    Such a process may die, hang or use much memory: the aggregator and its other runs do not notice.
    """

    def __init__(self, nice: int = BESIDE_RUNS) -> None:
        self._nice = nice
        self._prepared: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def fork(self) -> None:
        """Prepare as `prepare` does, by a fork of this process: it has loaded nearly all that a report needs.

        Call it before this process starts threads.

        Raises:
            OSError: the system is out of processes or memory.
        """
        self._prepared = subprocess.Popen(
            [sys.executable],  # never executed: the fork continues as the other process
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # as for `_start`
            preexec_fn=_become_report_process(self._nice),  # noqa: PLW1509 - no other thread holds a lock
        )

    def prepare(self) -> None:
        """Start the process of the next report now: it loads its modules, and waits. This shortens the end of a run.

        Raises:
            OSError: the system is out of processes or memory.
        """
        if self._prepared is None:
            self._prepared = self._start()

    def write(self, run_dir: Path, page: Path | None = None) -> Path:
        """Write `report.json` and `report.html` of a run, or its page alone; return the path.

        Args:
            page: where only the page is to be written.

        Raises:
            TraceMLError: there is no report; the text says why, and what to do.
            OSError: the process cannot be started.
        """
        with self._one_at_a_time:
            process, self._prepared = self._prepared or self._start(), None
            request = json.dumps({"run_dir": str(run_dir), "page": None if page is None else str(page)})
            with process:
                answer = _answer(process, f"{request}\n".encode())

        if (path := answer.get("path")) is None:
            raise TraceMLError(f"{answer['error'].rstrip('.')}. `{report_command(run_dir)}` makes it again.")

        return Path(path)

    def _start(self) -> subprocess.Popen[bytes]:
        return spawn(
            _command(self._nice),
            environ=os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            own_session=True,  # an interrupt at the terminal ends the runs, whose reports are then to be written
        )

    def close(self) -> None:
        """End the process that waits, if there is one; one that works finishes."""
        process, self._prepared = self._prepared, None
        if process is not None:
            with process:
                process.communicate()


def _command(nice: int) -> list[str]:
    return helper_program("traceml.display.report_main", str(nice))


def _become_report_process(nice: int) -> Callable[[], None]:
    """Return what a fork does between its start and its end: standard input and output are pipes to its parent."""

    def become() -> None:
        # Sockets and locks of the parent, and a pipe on whose end it waits.
        for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
            if number > 2:
                with contextlib.suppress(OSError):  # that of the list itself
                    os.close(number)

        try:
            change_command_line(_command(nice))
            from traceml.display.report_main import work

            with open(0, closefd=False) as requests, open(1, "w", closefd=False) as answers:
                work(nice, requests, answers)
        except BaseException:  # noqa: BLE001 - an exception must not continue in the parent's code
            _log.exception("a report could not be made")
            os._exit(1)

        os._exit(0)

    return become


def _answer(process: subprocess.Popen[bytes], request: bytes) -> dict[str, str]:
    """Return the answer of a process, or why there is none."""
    try:
        answer, _ = process.communicate(request, REPORT_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"error": f"its process took more than {left_text(REPORT_LIMIT_S)}"}

    try:
        return dict(json.loads(answer))
    except ValueError:
        return {"error": f"its process {_end_of(process)} (details are in the log)"}


def _end_of(process: subprocess.Popen[bytes]) -> str:
    status = process.wait()
    why = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
    return f"{end_of_status(status)}{why}"
