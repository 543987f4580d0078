"""`traceml stacks`: what each rank of a running job is doing now."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from traceml.cli.assistants.json_documents import StacksDocument
from traceml.cli.jobs.running_job import aggregator_of, running_job
from traceml.cli.options.parsing import Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.renderers.text.rank_stacks_text import MissingRank, StacksRank, stacks_text
from traceml.settings import Config

__all__ = ["ask_ranks", "main"]

_ANSWER_S = 15.0


@dataclass(frozen=True)
class StacksOptions(RunsDirOptions):
    """Show what each rank of a running job is doing: Python stack, step, phase, loader workers.

    Ranks with equal stacks are shown together. The job is not disturbed.
    """

    run: Annotated[str | None, Positional("[RUN|ADDRESS]")] = None
    """A run's folder, id or name, or host:port of an aggregator on this host (default: the newest running job)."""
    json: bool = False
    """Print one JSON document and nothing else."""


def main(argv: list[str]) -> int:
    """Ask the ranks of a job for their stacks, and print them."""
    options = parse(StacksOptions, argv, prog="traceml stacks")
    config = options.config
    run_dir = running_job(options.run, config, only_there=options.runs_dir is not None, of_other_nodes=True)
    found = ask_ranks(run_dir, config)
    if options.json:
        print(json.dumps(msgspec.to_builtins(found)))
    else:
        print(stacks_text(found.ranks, found.missing))

    return 0


def ask_ranks(run_dir: Path, config: Config) -> StacksDocument:
    """Ask the ranks of a running job for their stacks.

    Raises:
        TraceMLError: its aggregator cannot be asked.
    """
    with contextlib.closing(aggregator_of(run_dir, config, "stacks")) as connection:
        reply = connection.request("stacks", timeout_s=_ANSWER_S)

    missing = [MissingRank(each["rank"], str(each["host"]), str(each["why"])) for each in reply["missing"]]
    stacks = reply["stacks"]
    ranks = [StacksRank.from_row({**row, "frames": stacks[row["stack"]]}) for row in reply["ranks"]]
    return StacksDocument(run=run_dir.name, ranks=ranks, missing=missing)
