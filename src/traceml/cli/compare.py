"""`traceml compare A B`: what got slower, by how much, and whether the change is significant."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from traceml.cli.number_range import NumberRange
from traceml.cli.parsing import parse
from traceml.cli.report import runs_dir_of
from traceml.database.store.store_file import STORE_NAME
from traceml.errors import StoreError, UsageError
from traceml.renderers.text.comparison import change_text, compared_card
from traceml.renderers.text.viewport import Viewport
from traceml.runs.comparison.compare import compare_runs
from traceml.runs.comparison.comparison_types import Comparison
from traceml.runs.find import find_run

__all__ = ["main"]

EXIT_GATE = 1
EXIT_CANNOT_TELL = 3


@dataclass(frozen=True)
class CompareOptions:
    """Report what got slower from run A to run B, by how much, and whether the change is significant.

    The test takes the autocorrelation of step times into account: see docs/report.md.
    """

    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A", help_behavior_hint="")]
    """The baseline run: its folder, its id, the last four characters of its id, or its report.json."""
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B", help_behavior_hint="")]
    """The run to compare with it."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Print the comparison as JSON and nothing else."""
    fail_over: Annotated[
        float | None, NumberRange(float, least=0), tyro.conf.arg(metavar="PCT", help_behavior_hint="")
    ] = None
    """Exit with 1 when steps of B take more than PCT percent longer and the change is significant."""
    runs_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the runs (default: the setting runs_dir)."""


def main(argv: list[str]) -> int:
    """Print a comparison; return 0, 1 when B is slower than allowed, 3 when that is unknown."""
    options = parse(CompareOptions, argv, prog="traceml compare")
    comparison = _compared(*(_found(run, options.runs_dir) for run in (options.a, options.b)))
    if options.json:
        print(comparison.to_json())
    else:
        console = Console(highlight=False)
        console.print(compared_card(comparison, Viewport.of(console)), soft_wrap=True)

    return 0 if options.fail_over is None else _gate(comparison, options.fail_over)


def _found(run: str, runs_dir: str | None) -> Path:
    """Return a run's folder, or its report where that is all there is, as on a build server."""
    path = Path(run)
    if path.suffix != ".json" or not path.is_file():
        return find_run(run, runs_dir_of(runs_dir))

    return path.parent if (path.parent / STORE_NAME).is_file() else path


def _compared(a: Path, b: Path) -> Comparison:
    if a == b:
        raise UsageError(f"A and B are the same run, {a.name}")

    try:
        return compare_runs(a, b)
    except StoreError as error:
        raise StoreError(f"cannot compare {a.name} and {b.name}: {error}") from error


def _gate(comparison: Comparison, percent: float) -> int:
    if not comparison.comparable:
        why = "; ".join(comparison.obstacles) or "there are too few independent steps"
        print(f"traceml compare: --fail-over cannot be decided: {why}", file=sys.stderr)
        return EXIT_CANNOT_TELL

    mean = comparison.step_time.mean
    if comparison.outcome != "slower" or 100 * (mean.change or 0.0) <= percent:
        return 0

    change = change_text(mean.change)
    print(f"traceml compare: step time {change}, over {percent:g} % and significant (--fail-over)", file=sys.stderr)
    return EXIT_GATE
