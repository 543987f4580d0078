"""The start of a traced job: the line that says where its run is stored, on standard error."""

from __future__ import annotations

import sys
from pathlib import Path

from traceml.transport.run_line import run_line

__all__ = ["print_start"]


def print_start(run_dir: Path, *, live: bool = True) -> None:
    """Print where a run is stored; standard output belongs to the script.

    Args:
        run_dir: the run's folder.
        live: whether to say how to watch the run; not where its page was just named.
    """
    sys.stderr.write(run_line("tracing", run_dir, live=live))
    sys.stderr.flush()
