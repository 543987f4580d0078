"""`traceml profile`: the operators of a running job, or the sampled lines of a run as a flame graph."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from traceml.cli.assistants.json_documents import OperatorRecord, ProfileDocument, ProfiledRankRecord, UnprofiledRank
from traceml.cli.jobs.profile_client import ProfileClient, ProfileRequest, RankWindow
from traceml.cli.jobs.running_job import aggregator_of, running_job
from traceml.cli.notices import spinner
from traceml.cli.options.number_range import NumberRange
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.cli.report import current_report
from traceml.database.profile_states import MAX_PROFILE_STEPS, ProfileState
from traceml.database.store.reader import StoreReader
from traceml.errors import TraceMLError, UsageError
from traceml.fail_open import writing
from traceml.formatting import bytes_text, capitalized, count_text, plural, printable, ranks_text
from traceml.renderers.html.flame_page import flame_page
from traceml.renderers.text.profile_tables import operator_lines, slowdown_line
from traceml.run_folder import STORE_NAME
from traceml.runs.export.flame_graph import speedscope
from traceml.runs.export.operator_trace import ProfiledRank, ProfileFile, steps_stored, write_profile
from traceml.runs.export.top_operators import OperatorTotal
from traceml.runs.find import find_run
from traceml.runs.report.line_shares import lines_by_phase
from traceml.settings import PROFILE_AFTER_S, Config

__all__ = ["main", "parse_ranks", "profiled_text"]


_LIMIT_S, _ROWS_S = 120.0, 5.0
_PACKED = (".json", ".json.gz")
_RANKS = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_MAX_RANKS = 100_000


@dataclass(frozen=True)
class ProfileOptions(RunsDirOptions):
    """Profile the next steps of a running job: the operators of each rank, in one file for Perfetto.

    The script needs no change. With --cpu: draw the sampled lines of a run as a flame graph.
    """

    run: Annotated[str | None, Positional("[RUN|ADDRESS]")] = None
    """A run's folder, id or name, or host:port of an aggregator on this host (default: the newest running job,
    or run)."""
    ranks: Annotated[str | None, Metavar("RANKS")] = None
    """Ranks to profile: 0,3 or 0-3 (default: all of up to 8 ranks, otherwise the first 8)."""
    steps: Annotated[int, NumberRange(maximum=MAX_PROFILE_STEPS), Metavar("N")] = 5
    """Number of steps (default: 5)."""
    timeout: Annotated[float, NumberRange(float, minimum=0, above=True), Metavar("S")] = _LIMIT_S
    """Seconds in which the steps have to end (default: 120)."""
    limit_mb: Annotated[int, NumberRange(maximum=4096), Metavar("MB")] = 256
    """Largest trace of a rank, in megabytes (default: 256)."""
    stacks: bool = False
    """Record Python functions too, which slows the steps down further."""
    cpu: bool = False
    """Write the lines that were sampled so far as a flame graph; needs no running job."""
    on_finding: bool = False
    """Let the aggregator profile automatically, once, when computation has been the verdict for a minute."""
    output: Annotated[str | None, Metavar("FILE", "-o")] = None
    """FILE.json or FILE.json.gz; with --cpu FILE.html (a page) or FILE.json (for speedscope.app)."""
    json: bool = False
    """Print one JSON document and nothing else."""


def main(argv: list[str]) -> int:
    """Profile a run."""
    options = parse(ProfileOptions, argv, prog="traceml profile")
    config = options.config
    if options.on_finding:
        return _on_finding(options, config)

    return _flame_graph(options, config) if options.cpu else _operators(options, config)


def _operators(options: ProfileOptions, config: Config) -> int:
    """Profile ranks of a running job, and write one file of their traces."""
    request = ProfileRequest(
        parse_ranks(options.ranks), options.steps, options.timeout, options.limit_mb << 20, options.stacks
    )
    if options.output and not options.output.endswith(_PACKED):
        raise UsageError(f"-o {options.output}: a profile is FILE.json or FILE.json.gz")

    run_dir = running_job(options.run, config, only_there=options.runs_dir is not None)
    path = Path(options.output or f"{run_dir.name}.profile.json.gz")
    with closing(aggregator_of(run_dir, config, "profile")) as connection, StoreReader(run_dir / STORE_NAME) as reader:
        with spinner("Profiling") as show:
            hosts = {stream.rank: stream.host for stream in reader.streams() if stream.is_rank}
            client = ProfileClient(connection, hosts, lambda windows: show(_progress_text(windows)))
            traces = client.profile(request)

        failed = [each for each in client.windows.values() if each.state != ProfileState.RECORDED]
        if not traces:
            raise TraceMLError("no rank was profiled. " + "; ".join(f"rank {each.rank}: {each.why}" for each in failed))

        _await_rows(reader, traces)
        with writing(path, "Name another file: -o FILE"):
            written = write_profile(path, reader, traces)

    if options.json:
        print(json.dumps(msgspec.to_builtins(_document(run_dir.name, written, traces, failed))))
    else:
        _print(written, traces, failed, client)

    return 0


def _on_finding(options: ProfileOptions, config: Config) -> int:
    """Let the aggregator of a running job profile it when its verdict is computation."""
    if options != ProfileOptions(options.run, on_finding=True, json=options.json, runs_dir=options.runs_dir):
        raise UsageError("--on-finding chooses ranks, steps and file automatically")

    run_dir = running_job(options.run, config, only_there=options.runs_dir is not None)
    with closing(aggregator_of(run_dir, config, "profile")) as connection:
        path = connection.request("profile_later", {"after_s": PROFILE_AFTER_S})["path"]

    if options.json:
        print(json.dumps({"run": run_dir.name, "file": path}))
    else:
        print(f"Run {run_dir.name} is profiled once computation has been its verdict for {PROFILE_AFTER_S} s: {path}")

    return 0


def parse_ranks(text: str | None) -> tuple[int, ...] | None:
    """Return the ranks of `0,3` or `0-3,7`; None for None.

    Raises:
        UsageError: it is not such a list.
    """
    if text is None:
        return None

    ranks: list[int] = []
    for part in text.split(","):
        found = _RANKS.fullmatch(part.strip())
        if found is None or int(found[2] or found[1]) - int(found[1]) not in range(_MAX_RANKS):
            raise UsageError(f"--ranks {text}: ranks are given as 0,3 or 0-3")

        ranks += range(int(found[1]), int(found[2] or found[1]) + 1)

    return tuple(ranks)


def _await_rows(reader: StoreReader, traces: list[ProfiledRank]) -> None:
    """Wait until the profiled steps are stored: they are drawn above the operators."""
    deadline_s = time.monotonic() + _ROWS_S
    while not steps_stored(reader, traces) and time.monotonic() < deadline_s:
        time.sleep(0.1)


def _progress_text(windows: Iterable[RankWindow]) -> str:
    states = Counter(each.state for each in windows)
    return f"Profiling: {', '.join(f'{n} {state}' for state, n in states.items())}"


def _print(written: ProfileFile, traces: list[ProfiledRank], failed: list[RankWindow], client: ProfileClient) -> None:
    for line in operator_lines(written.operators):
        print(line)

    print()
    if note := slowdown_line(written.slowdown):
        print(note)

    if client.spread:
        listed = "; ".join(f"rank {each.rank}: {_steps_text(each)}" for each in traces)
        print(f"The ranks disagree on the step: {listed}.")

    if client.left_out:
        print(f"{plural(client.left_out, 'further rank')} not profiled: choose others with --ranks.")

    for each in failed:
        print(printable(f"traceml profile: rank {each.rank} was not profiled: {each.why}"), file=sys.stderr)

    size = bytes_text(written.path.stat().st_size)
    print(f"{profiled_text(traces)}: {written.path} ({size}). Open it at https://ui.perfetto.dev")


def profiled_text(traces: Sequence[ProfiledRank]) -> str:
    """Return `Ranks 0-3, steps 10-14`; without the steps where they are not those of all."""
    ranks = capitalized(ranks_text(each.rank for each in traces))
    steps = {_steps_text(each) for each in traces}
    return f"{ranks}, {steps.pop()}" if len(steps) == 1 else ranks


def _steps_text(each: ProfiledRank) -> str:
    first, last = count_text(each.first_step), count_text(each.first_step + each.steps - 1)
    return f"steps {first}-{last}" if each.steps > 1 else f"step {last}"


def _document(run: str, written: ProfileFile, traces: list[ProfiledRank], failed: list[RankWindow]) -> ProfileDocument:
    """Return a profile as the document `traceml.profile/1`."""
    return ProfileDocument(
        run=run,
        file=str(written.path),
        ranks=[
            ProfiledRankRecord(
                rank=each.rank,
                host=each.host,
                first_step=each.first_step,
                steps=each.steps,
                slowdown=written.slowdown.get(each.rank),
            )
            for each in traces
        ],
        missing=[UnprofiledRank(rank=each.rank, why=each.why) for each in failed],
        operators=[_operator(name, total, written.operators.steps) for name, total in written.operators.ordered()],
    )


def _operator(name: str, total: OperatorTotal, steps: int) -> OperatorRecord:
    file, line, function = total.place or (None, None, None)
    per_step = 1 / max(steps, 1)
    return OperatorRecord(
        name=name,
        calls_per_step=total.calls * per_step,
        self_cpu_ms=total.self_ns * per_step / 1e6,
        device_ms=total.device_ns * per_step / 1e6,
        file=file,
        line=line,
        function=function,
    )


def _flame_graph(options: ProfileOptions, config: Config) -> int:
    """Write the flame graph of a run's sampled lines."""
    if options.output and not options.output.endswith((".html", ".json")):
        raise UsageError(f"-o {options.output}: a flame graph is FILE.html (a page) or FILE.json (for speedscope.app)")

    meant = ProfileOptions(options.run, cpu=True, output=options.output, json=options.json, runs_dir=options.runs_dir)
    if options != meant:
        raise UsageError(
            "--cpu draws all samples of all ranks: it takes no --ranks, --steps, --timeout, --limit-mb, --stacks"
        )

    run_dir = find_run(options.run, config.runs_dir)
    path = Path(options.output or f"{run_dir.name}.flame.html")
    report = current_report(run_dir)
    samples = sum(each.samples for each in lines_by_phase(report))
    if not samples:
        raise TraceMLError(f"no lines of run {run_dir.name} were sampled: it was too short, or `stack_interval` is 0")

    text = flame_page(report) if path.suffix == ".html" else json.dumps(speedscope(report))
    with writing(path, "Name a file that can be written: -o FILE"):
        path.write_text(text, encoding="utf-8")

    if options.json:
        print(json.dumps({"run": run_dir.name, "file": str(path), "samples": samples}))
    else:
        viewer = "a browser" if path.suffix == ".html" else "https://www.speedscope.app"
        print(f"{path}: flame graph of {plural(samples, 'sample')}. Open it in {viewer}")

    return 0
