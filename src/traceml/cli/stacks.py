"""`traceml stacks`: what each rank of a running job is doing now."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from traceml.cli.parsing import parse
from traceml.cli.running_job import running_job
from traceml.database.looks import RankLook
from traceml.database.store.reader import StoreReader
from traceml.database.store.store_file import STORE_NAME
from traceml.errors import TraceMLError
from traceml.renderers.text.rank_stacks_text import MissingRank, RankStack, stacks_text
from traceml.settings import Config, load
from traceml.transport import auth
from traceml.transport.client import Connection, connect
from traceml.transport.hello import Hello
from traceml.transport.runs_folder import address_of

__all__ = ["main"]

_CONNECT_S, _ANSWER_S = 5.0, 15.0


@dataclass(frozen=True)
class StacksOptions:
    """Show what each rank of a running job is doing: Python stack, step, phase, loader workers.

    Ranks with equal stacks are shown together. The job goes on undisturbed.
    """

    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RUN|ADDRESS]", help_behavior_hint="")] = (
        None
    )
    """A run's folder or id, or host:port of an aggregator on this host (default: the newest running job)."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Print one JSON document and nothing else."""
    runs_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the runs (default: the setting runs_dir)."""


def main(argv: list[str]) -> int:
    """Ask the ranks of a job for their stacks, and print them."""
    options = parse(StacksOptions, argv, prog="traceml stacks")
    config = load() if options.runs_dir is None else load(runs_dir=options.runs_dir)
    run_dir = running_job(options.run, config)
    with contextlib.closing(_aggregator_of(run_dir, config)) as connection:
        reply = connection.request("stacks", timeout_s=_ANSWER_S)

    ranks = _ranks(reply)
    missing = [MissingRank(each["rank"], str(each["host"]), str(each["why"])) for each in reply["missing"]]
    if options.json:
        found = [{"host": each.host, "pid": each.pid, **asdict(each.look)} for each in ranks]
        print(json.dumps({"run": run_dir.name, "ranks": found, "missing": [asdict(each) for each in missing]}))
    else:
        print(stacks_text(ranks, missing))

    return 0


def _aggregator_of(run_dir: Path, config: Config) -> Connection:
    """Connect to the aggregator that has a run open.

    Raises:
        TraceMLError: it runs on another host, or no longer, or does not answer.
    """
    with StoreReader(run_dir / STORE_NAME) as reader:
        facts = reader.meta().get("aggregator", {})

    host, pid = str(facts.get("host", "")), facts.get("pid")
    if host != socket.gethostname():
        raise TraceMLError(f"the aggregator of run {run_dir.name} runs on host {host}: run `traceml stacks` there")

    served = auth.published_by(pid) if isinstance(pid, int) else None
    if served is None:
        raise TraceMLError(
            f"the aggregator of run {run_dir.name} (pid {pid}) no longer runs, or belongs to another user. "
            f"The last state of the run: traceml report {run_dir.name}"
        )

    told = address_of(run_dir.parent, served.port)
    tls = config.tls or (told is not None and told.port == served.port and told.tls)
    hello = Hello(role="client", run=run_dir.name)
    return connect(_reachable(served.host), served.port, hello, served.token, timeout_s=_CONNECT_S, tls=tls)


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared only


def _ranks(reply: dict[str, Any]) -> list[RankStack]:
    stacks = reply["stacks"]
    return [
        RankStack(str(row["host"]), int(row["pid"]), RankLook.from_row({**row, "frames": stacks[row["stack"]]}))
        for row in reply["ranks"]
    ]
