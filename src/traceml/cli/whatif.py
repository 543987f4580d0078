"""`traceml whatif`: what stragglers cost a hybrid-parallel job."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.formatting import printable

__all__ = ["main"]


@dataclass(frozen=True)
class WhatifOptions:
    """Simulate a hybrid-parallel job without its stragglers, from a trace of its operations.

    Shows how much longer a step takes than if all operations of a kind took the same time.

    The same is shown by kind of operation, data-parallel rank, pipeline stage and worker.

    docs/whatif.md describes the columns of the trace.
    """

    trace: Annotated[Path, Positional("TRACE.parquet")]
    """Parquet file with a row for each operation."""
    meta: Annotated[Path, Metavar("META.yaml")]
    """YAML file with dp_size, pp_size, tp_size, vpp_size and world_size of the job."""
    json: bool = False
    """Print the result as JSON and nothing else."""
    heatmap: Annotated[Path | None, Metavar("FILE.png")] = None
    """Write a picture of the workers' slowdowns."""
    timeline: Annotated[Path | None, Metavar("FILE.json")] = None
    """Write ten steps as recorded and without stragglers, for ui.perfetto.dev."""


def main(argv: list[str]) -> int:
    """Print what stragglers cost a job."""
    options = parse(WhatifOptions, argv, prog="traceml whatif")

    import msgspec

    from traceml.whatif.simulation import Simulator
    from traceml.whatif.straggler_cost import explain_job
    from traceml.whatif.trace_loading import layout_differences, load_job, unknown_kinds

    job = load_job(options.trace, options.meta)
    for difference in layout_differences(job):
        print(f"traceml whatif: {options.meta} says {difference}", file=sys.stderr)

    if unknown := unknown_kinds(job):
        what = f"{options.trace} has operations of unknown kinds, which delay no others: {', '.join(unknown)}"
        print(f"traceml whatif: {printable(what)}", file=sys.stderr)

    simulator = Simulator(job)
    result = explain_job(simulator)
    if options.heatmap is not None:
        from traceml.whatif.heatmap import draw_heatmap

        draw_heatmap(result, options.heatmap)

    if options.timeline is not None:
        from traceml.whatif.ideal_timeline import write_timeline

        count = write_timeline(simulator, options.timeline)
        print(f"{count:,} operations written to {options.timeline}", file=sys.stderr)

    if options.json:
        print(json.dumps(msgspec.to_builtins(result, str_keys=True), indent=2, allow_nan=False))
    else:
        from traceml.renderers.text.viewport import Viewport, plain_console
        from traceml.renderers.text.whatif import what_if_lines

        console = plain_console()
        for line in what_if_lines(result, Viewport.of(console)):
            console.print(line, soft_wrap=True)

    return 0
