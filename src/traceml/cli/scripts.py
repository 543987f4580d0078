"""What `run` and `launch` have in common: options of the run, and the script behind them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from traceml.errors import UsageError

__all__ = ["add_run_options", "check_report", "given", "script_words"]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the run is shown, named and kept."""
    own = parser.add_argument_group("traceml's options")
    views = ("auto", "terminal", "web", "none")
    own.add_argument("--live", choices=views, default="auto", help="live view; web tells its address (default: auto)")
    own.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write the report to FILE: a page if it ends in .html, else JSON",
    )
    own.add_argument("--run-name", metavar="NAME", help="part of the run's id (default: the script's name)")
    own.add_argument("--project", metavar="NAME", help="project the run belongs to")
    own.add_argument("--runs-dir", metavar="DIR", help="where runs are kept (default: traceml_runs)")
    own.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as for `python -m`")


def script_words(options: argparse.Namespace, *, example: str) -> list[str]:
    """Return the script and its arguments.

    Args:
        options: as parsed, with `script` and `module`.
        example: what to try where there is none.

    Raises:
        UsageError: there is no script, or what stands there is none.
    """
    target: list[str] = options.script
    if target and target[0] == "--":
        target = target[1:]

    if not target:
        raise UsageError(f"no script given. Try: {example}")

    if target[0].startswith("-"):
        raise UsageError(f"unknown option {target[0]}")

    if not options.module and not Path(target[0]).exists():
        raise UsageError(f"can't open file {target[0]!r}: no such file. For a module, use -m.")

    return target


def check_report(path: Path | None) -> None:
    """Say before hours of training that its report could not be put there.

    Raises:
        UsageError: it could not.
    """
    if path is None:
        return

    if path.is_dir():
        raise UsageError(f"--report: {path} is a folder; give the name of a file")

    if not path.absolute().parent.is_dir():
        raise UsageError(f"--report: there is no folder {path.parent}")

    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"--report: {path} cannot be written")


def given(**values: str | None) -> dict[str, str]:
    """Return the values that are not None."""
    return {key: value for key, value in values.items() if value is not None}
