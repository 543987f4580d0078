"""`traceml compare A B`: what got slower, by how much, and whether the change is significant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from traceml.cli import EXIT_GATE
from traceml.cli.options.number_range import NumberRange
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.errors import StoreError, UsageError
from traceml.renderers.text.compared_runs import compared_runs
from traceml.renderers.text.comparison import change_text, compared_card, judged_time_words
from traceml.renderers.text.comparison_markdown import comparison_markdown, comparisons_markdown
from traceml.renderers.text.viewport import Viewport, plain_console
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.baseline import find_baseline, find_compared
from traceml.runs.comparison.compare import compare_sides
from traceml.runs.comparison.compared_run import ComparedRun, read_compared
from traceml.runs.comparison.comparison_types import Comparison, Comparisons, run_letter

__all__ = ["main"]

EXIT_UNDECIDED = 3


@dataclass(frozen=True)
class CompareOptions(RunsDirOptions):
    """Report what got slower from run A to run B, by how much, and whether the change is significant.

    With more than two runs, each is compared with the first, or with --baseline.

    The test takes the autocorrelation of step times into account: see docs/report.md.
    """

    runs: Annotated[tuple[str, ...], Positional("RUN...")] = ()
    """Runs: folders, ids, names, the last four characters of ids, or report.json files. The first is the baseline."""
    baseline: Annotated[str | None, Metavar("A")] = None
    """Compare with this run: as above, a tag or a run name (the newest counts), or last-healthy: the newest earlier
    run of the project, with as many ranks, that finished without a warning. Without runs, the latest is compared."""
    json: bool = False
    """Print the comparison as JSON and nothing else."""
    md: bool = False
    """Print it as Markdown, for a pull request."""
    fail_over: Annotated[float | None, NumberRange(float, minimum=0), Metavar("PCT")] = None
    """Exit with 1 when steps take more than PCT percent longer than the baseline's and the change is significant."""


def main(argv: list[str]) -> int:
    """Print a comparison; return 0, 1 when a run is slower than allowed, 3 when that is unknown."""
    options = parse(CompareOptions, argv, prog="traceml compare")
    if options.json and options.md:
        raise UsageError("--json and --md cannot be combined")

    first, *others = _chosen(options)
    side = _read(first)
    sides = [side if other == first else _read(other) for other in others]
    found = [compare_sides(side, other, run_letter(number)) for number, other in enumerate(sides, 1)]
    _print(found, options)
    return 0 if options.fail_over is None else _gate(found, options.fail_over)


def _chosen(options: CompareOptions) -> list[Path]:
    """Return the baseline and the runs that are compared with it."""
    runs_dir = options.config.runs_dir
    if options.baseline is None and len(options.runs) < 2:
        raise UsageError("name two runs, or one run and --baseline RUN: traceml compare A B")

    wanted: Sequence[str | None] = options.runs or (None,)
    runs = [find_compared(run, runs_dir) for run in wanted]
    if options.baseline is not None:
        runs.insert(0, find_baseline(options.baseline, runs, runs_dir))

    if runs[0] in runs[1:]:
        baseline, other = "the baseline" if options.baseline else "A", run_letter(runs.index(runs[0], 1))
        found = f"{baseline} and {other} are the same run, {runs[0].name}"
        if options.fail_over is not None:
            raise UsageError(f"{found}: --fail-over has nothing to judge")

        print(f"traceml compare: {found}", file=sys.stderr)

    return runs


def _read(run: Path) -> ComparedRun:
    try:
        side = read_compared(run)
    except StoreError as error:
        raise StoreError(f"cannot compare {run.name}: {error}") from error

    if side.store_problem:
        text = f"{run.name}: {STORE_NAME} {side.store_problem}; {REPORT_NAME} is compared"
        print(f"traceml compare: {text}", file=sys.stderr)

    return side


def _print(found: list[Comparison], options: CompareOptions) -> None:
    several = Comparisons(baseline=found[0].a.id, comparisons=found) if len(found) > 1 else None
    if options.json:
        print((several or found[0]).to_json())
    elif options.md:
        print(comparisons_markdown(several) if several else comparison_markdown(found[0]), end="")
    else:
        console = plain_console()
        viewport = Viewport.of(console)
        shown = compared_runs(several, viewport) if several else compared_card(found[0], viewport)
        console.print(shown, soft_wrap=True)


def _gate(found: list[Comparison], percent: float) -> int:
    """Return 1 if any run is slower than allowed, else 3 if that is unknown of any; say of which."""
    slower = [each for each in found if each.outcome == "slower" and 100 * (each.judged.change or 0.0) > percent]
    for each in slower:
        change = f"{judged_time_words(each)} {change_text(each.judged.change)}"
        what = f"{change}, over {percent:g} % and significant (--fail-over)"
        print(f"traceml compare: {each.b.id}: {what}", file=sys.stderr)

    unknown = [each for each in found if not each.comparable]
    for each in unknown:
        why = "; ".join(each.obstacles) or "there are too few independent steps; let both runs make more"
        print(f"traceml compare: {each.b.id}: --fail-over cannot be decided: {why}", file=sys.stderr)

    return EXIT_GATE if slower else EXIT_UNDECIDED if unknown else 0
