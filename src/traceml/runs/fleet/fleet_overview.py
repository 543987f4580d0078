"""The document of `traceml fleet`: a run next to its history, slow hosts, and what the figures cover."""

from __future__ import annotations

from collections.abc import Sequence

from traceml.errors import RunNotFoundError
from traceml.formatting import percent_text, plural
from traceml.runs.fleet.fleet_dataset import FleetDataset
from traceml.runs.fleet.fleet_runs import FleetRun, Progress, read_runs
from traceml.runs.fleet.fleet_types import FleetDocument, HostJudgment, RunHistory
from traceml.runs.fleet.phase_history import LAST_RUNS, MIN_RUNS, run_history
from traceml.runs.fleet.slow_hosts import LAST_JOBS, MAX_CHANCE, MIN_EXCESS, MIN_JOBS, MIN_STEPS, judge_hosts
from traceml.runs.run_query import select_runs

__all__ = ["fleet_document"]


def fleet_document(
    dataset: FleetDataset,
    run: str | None = None,
    where: str | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> FleetDocument:
    """Return what the dataset has about a run, and about the hosts.

    Args:
        run: id of a run, or its beginning or end; None for the newest one.
        where: conditions that the runs must meet, as `select_runs` takes them.
        progress: called from time to time with the number of files that were read, and of all.

    Raises:
        RunNotFoundError: the dataset has no such run, several of them, or none at all.
        UsageError: the conditions cannot be understood, or a package is missing.
    """
    files = dataset.files()
    if not files:
        raise RunNotFoundError(
            f"no dataset in {dataset.folder}: `traceml fleet --update` makes it from ended runs that have steps"
        )

    read = read_runs(files, dask, progress)
    runs = select_runs(read.runs, where) if where else read.runs
    if not runs and read.runs:
        raise RunNotFoundError(f"none of the {plural(len(read.runs), 'run')} in {dataset.folder} meets --where {where}")

    history = run_history(_chosen(runs, run), runs) if runs else None
    hosts = judge_hosts(runs)
    started = [each.started for each in runs if each.started is not None]
    return FleetDocument(
        dataset=str(dataset.folder),
        runs=len(runs),
        first_started=min(started, default=None),
        last_started=max(started, default=None),
        history=history,
        hosts=hosts,
        covers=[*_history_covers(history), *_hosts_cover(hosts)],
        damage=read.damage,
    )


def _chosen(runs: Sequence[FleetRun], wanted: str | None) -> FleetRun:
    if wanted is None:
        return runs[-1]

    found = (
        [each for each in runs if each.run == wanted]
        or [each for each in runs if wanted and (each.run.startswith(wanted) or each.run.endswith(wanted))]
        or [each for each in runs if each.name == wanted]
    )
    if len({each.run for each in found}) == 1:
        return found[-1]

    if found:
        raise RunNotFoundError(f"{wanted!r} matches {len(found)} runs of the dataset. Give the id, or more of it.")

    raise RunNotFoundError(
        f"no run {wanted!r} in the dataset. `traceml fleet --update` adds ended runs that have steps and are missing."
    )


def _history_covers(history: RunHistory | None) -> list[str]:
    if history is None:
        return []

    if not history.phases:
        return [f"A run of {MIN_STEPS} steps or more is compared with {MIN_RUNS} earlier ones or more."]

    sentence = (
        f"History: at most the last {LAST_RUNS} earlier runs with the same project, script, model (its type, device, "
        f"wrapper and compilation, too), batch size and number of ranks, and {MIN_STEPS} steps or more. Their median "
        "and median deviation decide what is usual: about one healthy run in a thousand is beyond it by chance, in "
        "each phase."
    )
    return [sentence]


def _hosts_cover(hosts: HostJudgment) -> list[str]:
    if not hosts.jobs:
        why = "there is none. A host with rank 0 alone is left out."
        return [f"Hosts are compared within jobs on two or more hosts with {MIN_STEPS} steps or more: {why}"]

    jobs = (
        f"Hosts: {plural(hosts.jobs, 'job')} on two or more hosts with {MIN_STEPS} steps or more; "
        f"{plural(hosts.left_out, 'other run')} left out. {hosts.judged} of {plural(hosts.hosts, 'host')} had "
        f"{MIN_JOBS} such jobs or more; of each the last {LAST_JOBS} count."
    )
    rule = (
        "A host's work is that of its slowest rank, without waiting for others, and without rank 0, which also logs "
        "and saves. A host is listed if it was among the slowest eighth of the job's hosts in more than half of its "
        f"jobs, at least {percent_text(MIN_EXCESS)} beyond the others in the median job, and so often that chance "
        f"puts any host on the list less than once in {1 / MAX_CHANCE:.0f} lists."
    )
    limit = "Where hosts do different work, as the stages of a pipeline do, the list shows those with more work."
    return [jobs, rule, limit]
