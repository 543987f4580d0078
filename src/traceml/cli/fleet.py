"""`traceml fleet`: a run next to its model's history, and hosts that are often slow."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from traceml.cli.notices import print_left_out, spinner
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.formatting import plural
from traceml.runs.fleet.fleet_dataset import DATASET_NAME, FleetDataset, FleetUpdate

__all__ = ["main"]


@dataclass(frozen=True)
class FleetOptions(RunsDirOptions):
    """Show a run next to earlier runs of its model, and the hosts that were slow in most of their last jobs.

    Runs are read from a dataset: Parquet files with a row for each run, host, rank and phase.

    With the setting fleet_dir, each run is added at its end; --update adds those of a folder.
    """

    run: Annotated[str | None, Positional("[RUN]")] = None
    """The run: its id or name, or the last four characters of its id (default: the newest run)."""
    update: bool = False
    """First add the ended runs that the dataset does not have yet."""
    where: Annotated[tuple[str, ...], Metavar("CONDITIONS", one_each=True)] = ()
    """Only runs that meet all of these: 'project=vision hosts~gpu-04 !state=failed'. Names: id, name, project, month,
    script, model, ranks, hosts, batch_size, steps, step_ms, state, verdict, and other facts of the dataset."""
    json: bool = False
    """Print the result as JSON and nothing else."""
    dataset: Annotated[str | None, Metavar("DIR")] = None
    """Folder of the dataset (default: the setting fleet_dir, without it `fleet` in the folder of runs)."""
    dask: Annotated[str | None, Metavar("ADDRESS")] = None
    """Read the dataset on the workers of this Dask scheduler; they need it under the same path."""


def main(argv: list[str]) -> int:
    """Print what the fleet's dataset shows."""
    options = parse(FleetOptions, argv, prog="traceml fleet")
    config = options.config
    dataset = FleetDataset(_folder(options, config.fleet_dir, config.runs_dir))
    if options.update:
        _print_update(dataset.update(config.runs_dir))

    from traceml.runs.fleet.fleet_overview import fleet_document

    with spinner("Reading") as show:
        document = fleet_document(
            dataset,
            options.run,
            " ".join(options.where),
            options.dask,
            lambda done, files: show(f"Reading: {done:,} of {files:,} files"),
        )

    if options.json:
        print(document.to_json())
        return 0

    from traceml.renderers.text.fleet_lines import fleet_lines
    from traceml.renderers.text.viewport import Viewport, plain_console

    console = plain_console()
    for line in fleet_lines(document, Viewport.of(console)):
        console.print(line, soft_wrap=True)

    return 0


def _folder(options: FleetOptions, fleet_dir: Path | None, runs_dir: Path) -> Path:
    if options.dataset is not None:
        return Path(options.dataset)

    return runs_dir / DATASET_NAME if fleet_dir is None or options.runs_dir is not None else fleet_dir


def _print_update(done: FleetUpdate) -> None:
    """Report an update on standard error: standard output may be JSON."""
    parts = [
        f"{plural(done.added, 'run')} added",
        f"{done.known:,} known" if done.known else "",
        f"{done.running:,} still running" if done.running else "",
        f"{done.relayed:,} left to their center" if done.relayed else "",
        f"{done.without_steps:,} without steps" if done.without_steps else "",
    ]
    print(f"traceml fleet: {', '.join(filter(None, parts))}", file=sys.stderr)
    print_left_out("traceml fleet", done.damage)
