"""`traceml runs`: the runs in the folder of runs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from traceml.cli.number_range import NumberRange
from traceml.cli.parsing import parse
from traceml.errors import UsageError
from traceml.formatting import bytes_text, duration_text, printable, rate_text
from traceml.runs.find import RunInfo, list_runs, prune
from traceml.settings import load

__all__ = ["main"]


@dataclass(frozen=True)
class RunsOptions:
    """List the runs in the folder of runs, newest first, or remove old ones."""

    prune: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Remove all but the newest runs, except running ones. --keep, or the setting keep_runs, is the number to keep."""
    keep: Annotated[int | None, NumberRange(least=0), tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """With --prune: the number of runs to keep."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Print the list as JSON and nothing else."""
    runs_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the runs (default: the setting runs_dir)."""


def main(argv: list[str]) -> int:
    """List runs, or remove old ones."""
    options = parse(RunsOptions, argv, prog="traceml runs")
    config = load() if options.runs_dir is None else load(runs_dir=options.runs_dir)
    if options.keep is not None and not options.prune:
        raise UsageError("--keep belongs to --prune")

    infos = prune(config.runs_dir, _keep(options, config.keep_runs)) if options.prune else list_runs(config.runs_dir)

    if options.json:
        print(json.dumps([{**asdict(info), "path": str(info.path.resolve())} for info in infos], indent=2))
    elif options.prune:
        _print_removed(infos)
    elif infos:
        _print_list(infos)
    else:
        print(f"No runs in {config.runs_dir}. Make one with: traceml run SCRIPT")

    return 0


def _keep(options: RunsOptions, setting: int | None) -> int:
    keep = options.keep if options.keep is not None else setting
    if keep is None:
        raise UsageError("--prune needs the number of runs to keep: --keep N, or TRACEML_KEEP_RUNS=N")

    return keep


def _print_removed(infos: Sequence[RunInfo]) -> None:
    for info in infos:
        print(f"removed {printable(info.id)}")

    freed = bytes_text(sum(info.size_bytes for info in infos))
    print(f"{len(infos)} run{'' if len(infos) == 1 else 's'} removed, {freed} freed" if infos else "Nothing to remove")


def _print_list(infos: Sequence[RunInfo]) -> None:
    console = Console(highlight=False)
    width = max(len(printable(info.id)) for info in infos)
    head = f"{'run':<{width}}  {'state':<8}  {'verdict':<17}  {'ranks':>5}  {'samples/s':>9}  {'took':>7}  {'size':>8}"
    console.print(Text(head, style="dim"), soft_wrap=True)
    for info in infos:
        console.print(_line(info, width), soft_wrap=True)


def _line(info: RunInfo, width: int) -> Text:
    took = info.duration_s
    if took is None and info.started is not None and info.state == "running":
        took = time.time() - info.started

    line = Text(f"{printable(info.id):<{width}}  ")
    line.append(
        f"{printable(info.state):<8}", style="red" if info.state in ("failed", "hung", "lost", "damaged") else ""
    )
    line.append(f"  {printable(info.verdict or '-'):<17}  {info.world_size:>5}")
    line.append(f"  {rate_text(info.samples_per_second):>9}  {duration_text(took):>7}")
    return line.append(f"  {bytes_text(info.size_bytes):>8}")
