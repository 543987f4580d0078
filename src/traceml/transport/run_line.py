"""Lines about a run in the output of its job: where it is stored, and that it is stuck."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traceml.fail_open import print_notice
from traceml.formatting import printable
from traceml.run_folder import report_command
from traceml.transport import auth

__all__ = ["print_start", "run_line", "short_path", "stuck_line"]


def print_start(run_dir: Path, *, live: bool = True) -> None:
    """Print the line of a traced job on standard error; standard output belongs to the script.

    Args:
        live: whether to say how to watch the run; not where its page was just named.
    """
    print_notice(run_line("tracing", run_dir, live=live))


def run_line(does: str, run_dir: Path, *, live: bool = True) -> str:
    """Return the line.

    Args:
        does: `tracing`, `recording`, or what of the run.
    """
    page = auth.find_page(str(run_dir.parent)) if live else None
    view = f"http://127.0.0.1:{page.port}/run/{run_dir.name}" if page is not None else "`traceml top`"
    watch = f"; live: {view}" if live else ""
    return printable(f"traceml: {does} this run; results in {short_path(run_dir)}{watch}")


def stuck_line(facts: Mapping[str, Any]) -> str:
    """Return the line of a job that is stuck, or continues.

    Args:
        facts: `kind` and `headline` of the verdict, absent if the job continues; `run_dir`.
    """
    command = report_command(short_path(Path(str(facts.get("run_dir")))))
    if "headline" not in facts:
        return printable(f"traceml: the job continues; `{command}` says what it waited for")

    return printable(f"traceml: {facts.get('kind')}: {facts['headline']}; `{command}` says why and what to do")


def short_path(run_dir: Path) -> str:
    """Return the folder relative to the working directory, if it is inside."""
    try:
        return str(run_dir.relative_to(Path.cwd()))
    except (ValueError, OSError):  # outside, or the working directory was removed
        return str(run_dir)
