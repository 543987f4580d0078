"""Jobs that stand still, made of snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tests.diagnosis.fabricated import Job, window_of
from traceml.database.schema import PROCESS, STEPS
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, GroupSnapshot, RankSnapshot
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.hangs.hang import hang

S = 1_000_000_000
QUIET_S = 75.0
LAST_NS = 100 * S
NOW_NS = LAST_NS + int(QUIET_S * S)
TORCH = "/venv/lib/python3.11/site-packages/torch"
ENGINE = FrameSnapshot(file=f"{TORCH}/autograd/graph.py", line=800, function="_engine_run_backward")


def line(number: int, function: str = "main", file: str = "/home/me/train.py") -> FrameSnapshot:
    """Return a frame of the user's code."""
    return FrameSnapshot(file=file, line=number, function=function, is_user=True)


def call(name: str) -> FrameSnapshot:
    """Return the frame of a function of torch.distributed."""
    return FrameSnapshot(file=f"{TORCH}/distributed/distributed_c10d.py", line=2800, function=name)


def group(number: int, operation: str, *, flying: bool = True, **known: Any) -> GroupSnapshot:
    """Return the newest collective of the default group of two ranks."""
    return GroupSnapshot(**{"members": (0, 1), "number": number, "operation": operation, "in_flight": flying, **known})


def snapshot(rank: int, *frames: FrameSnapshot, **known: Any) -> RankSnapshot:
    """Return a snapshot of a rank that has stood still for 75 s in step 40."""
    usual = {"step": 40, "in_step": True, "phase": "other", "answered": "recorder", "process_state": "S"}
    return RankSnapshot(**{"at_ns": NOW_NS, "rank": rank, "quiet_s": QUIET_S, "frames": frames, "cpu_share": 0.0,
                       **usual, **known})  # fmt: skip


def in_backward(rank: int, at: int = 28, number: int = 15, **known: Any) -> RankSnapshot:
    """Return a snapshot of a rank that waits for its gradients' all_reduce."""
    groups = (group(number, "all_reduce", sizes=(2372,)),)
    return snapshot(
        rank, ENGINE, line(at), **{"phase": "backward", "wchan": "futex_do_wait", "groups": groups, **known}
    )


def facts(
    snapshots: Iterable[RankSnapshot],
    *exits: RankExit,
    ranks: int = 2,
    state: str = "running",
    steps: int = 40,
    silent: tuple[int, ...] = (),
    absent: tuple[int, ...] = (),
    rows: bool = True,
    samples_s: int = 1,
    was_aborted: bool = False,
    calls: Callable[[int, int], int] | None = None,
    returned: tuple[int, ...] = (),
    ran_script: bool = False,
    names: dict[int, dict[int, str]] | None = None,
    **process: Any,
) -> JobFacts:
    """Return the facts of a job: each rank has steps of 0.1 s until 75 s ago, and then those snapshots.

    Args:
        snapshots: what was seen.
        exits: ranks that have ended.
        ranks: ranks of the job.
        state: state of the run.
        steps: steps of each rank.
        silent: ranks whose recorder sends nothing.
        absent: ranks that have never sent anything.
        rows: whether steps were seen at all.
        samples_s: seconds of samples before the end, one each second.
        was_aborted: whether it was ended because it hung.
        returned: ranks whose launched function has returned, after all of these steps.
        ran_script: whether it was a script.
        calls: returns the column `bits` of a rank's step.
        names: texts of each rank by id.
        process: what the ranks tell about their settings.
    """
    builder = JobFactsBuilder(ranks)
    builder.state = state
    builder.names.update(names or {})
    for rank in sorted(set(range(ranks)) - set(absent)):
        builder.host(rank, "node1")
        builder.info(rank, {"kind": "process", "t_ns": LAST_NS - 50 * S, **process})
        if rows:
            taken = np.zeros(steps, STEPS.dtype)
            taken["step"] = np.arange(steps)
            taken["bits"] = list(map(calls or (lambda _rank, _step: 0), [rank] * steps, range(steps)))
            taken["t_end_ns"] = LAST_NS - (np.arange(steps)[::-1] * S // 10)
            builder.progress.steps(np.full(steps, rank), taken)

        samples = np.zeros(1 + samples_s, PROCESS.dtype)
        last_ns = LAST_NS + S if rank in silent else NOW_NS
        samples["t_ns"], samples["step"] = last_ns - np.arange(samples_s, -1, -1) * S, steps
        if not any(ended.rank == rank and ended.state == "finished" for ended in exits):
            builder.process_rows(rank, samples)

    for rank in returned:
        builder.info(rank, {"kind": "returned", "t_ns": LAST_NS, "last_step": steps - 1, "script": ran_script})

    for each in snapshots:
        builder.info(each.rank, each.to_info())

    for ended in exits:
        builder.exit(ended)

    builder.progress.was_aborted = was_aborted
    return builder.build([steps - 1] * ranks)


def found(*snapshots: RankSnapshot, **job: Any) -> Finding | None:
    """Return the finding about a job with these snapshots."""
    return judged(facts(snapshots, *job.pop("exits", ()), **job))


def judged(job: JobFacts) -> Finding | None:
    """Return the finding about a job whose steps take some 15 ms."""
    return hang(window_of(Job(ranks=2)), job)
