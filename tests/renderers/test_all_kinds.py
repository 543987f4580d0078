"""Card of a finding of each kind: its sentences, as a terminal of 80 columns shows them.

After a change on purpose: `UPDATE_SNAPSHOTS=1 pytest tests/renderers/test_all_kinds.py`, then read the difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import MS, Job, adds, window_of
from tests.diagnosis.hangs import standing
from tests.diagnosis.memory.memories import (
    device_leak,
    full_device,
    full_host,
    growing_workers,
    leaking,
    uneven_devices,
)
from tests.diagnosis.memory.test_allocator_churn import emptied
from tests.diagnosis.rules.test_correctness import group_of_two, history
from tests.diagnosis.rules.test_data_imbalance import steps_of, uneven
from tests.diagnosis.rules.test_device_contention import SECONDS, shared
from tests.diagnosis.rules.test_device_faults import GOOD
from tests.diagnosis.rules.test_device_faults import facts as faulty
from tests.diagnosis.rules.test_gil_contention import found as locked
from tests.diagnosis.rules.test_gil_contention import monitor, samples
from tests.diagnosis.rules.test_throttled import THERMAL
from tests.diagnosis.rules.test_throttled import samples as hot_samples
from tests.diagnosis.rules.test_training_losses import NAN
from tests.diagnosis.rules.test_training_losses import history as losses_of
from tests.diagnosis.stalls.test_gc_pauses import collections
from tests.diagnosis.stalls.test_gc_pauses import history as collected
from tests.diagnosis.stalls.test_recompiles import compilations, long_forwards
from tests.diagnosis.stalls.test_stopped_ranks import pause
from tests.renderers.reports import report
from tests.renderers.test_snapshots import plain
from traceml.database.schema import EPOCHS, Compiled, Resource
from traceml.database.snapshots.rank_snapshot import RankSnapshot
from traceml.diagnosis.facts.ends import EndingSignal, LostWorker, RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.numerics import SkippedSteps
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.facts.trainings.models_and_loaders import EvaluationModeSteps, LoaderFacts, UnchangedParameters
from traceml.diagnosis.facts.wall_parts import Stop
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.renderers.text.card import card
from traceml.renderers.text.viewport import Viewport
from traceml.renderers.views import run_view

SNAPSHOT = Path(__file__).parent / "snapshots" / "kinds_80.txt"
ALONE = Job(ranks=1, steps=220, grouped=False)
PATH = "/home/me/projects/a-long-name/of-a-folder/experiments/train.py"
LINES = (
    *(SampledLine(0, part, PATH, 23, "update_metric", None, 80) for part in ("startup", "outside")),
    *(SampledLine(rank, "other", PATH, 23, "update_metric", None, 80) for rank in (0, 1)),
    *(SampledLine(rank, "forward", PATH, 7, "forward", None, 60) for rank in (0, 1)),
)
LATE_LINES = (
    SampledLine(1, "other", PATH, 23, "update_metric", None, 80),
    *(SampledLine(rank, "forward", PATH, 7, "forward", None, 60) for rank in range(4)),
)
TWO_HOSTS = Topology(
    hosts={rank: f"gpu-{rank // 8:03}" for rank in range(16)}, mesh={rank: {"pp": rank // 8} for rank in range(16)}
)
RARE = adds("other", 120, chance=0.04)
ELABORATED = {"MEMORY_LEAK, workers"}  # the summary begins with the headline, and is shown alone in alerts


def found(job: Job, *faults, **facts) -> list[Finding]:
    known = {"lines": LATE_LINES if job.ranks > 2 else LINES, **facts}
    return diagnose(window_of(job, *faults), JobFacts(world_size=job.ranks, **known))


def reduced_often() -> BatchHistory:
    batches = BatchHistory()
    batches.reductions = 4, 4
    return batches


def epochs() -> list[Finding]:
    rows = np.zeros(11, EPOCHS.dtype)
    rows["step"], rows["ns"], rows["create_ns"] = np.arange(11) * 20, 200 * MS, 150 * MS

    def waits(own, _) -> None:
        own["input_wait"][:, ::20] += 200

    return found(ALONE, waits, loader=LoaderFacts(num_workers=2), epochs=rows)


def skipped() -> list[Finding]:
    steps = SkippedSteps()
    steps.rank, steps.rows, steps.latest, steps.steps = 0, 300, 299, np.arange(100, 300)
    return found(ALONE, skipped=steps)


def imbalanced() -> list[Finding]:
    job = Job(ranks=4)
    return diagnose(steps_of(job, uneven(4, job.steps)), JobFacts(world_size=4))


DEAD_WORKER = "DataLoader worker (pid 4711) is killed by signal: Killed. "
BEHIND = (standing.group(14, "all_reduce", flying=False),)


def hanging(other: RankSnapshot) -> list[Finding]:
    return diagnose(window_of(Job(ranks=2)), standing.facts([standing.in_backward(0), other]))


def later(own, _) -> None:
    own["other"][:, 110:] += 12


CASES: dict[str, Callable[[], list[Finding]]] = {
    "HEALTHY": lambda: found(Job(ranks=2, own={"forward": 2.0, "backward": 3.0, "optimizer": 0.5, "other": 0.9})),
    "HEALTHY, part of the run": lambda: found(
        Job(ranks=2, own={"forward": 2.0, "backward": 3.0, "optimizer": 0.5, "other": 0.9}),
        time=RunTime.of(40.0, {"steps": 18.0, "startup": 4.0, "evaluation": 8.0, "idle": 10.0}),
    ),
    "COMPUTE_BOUND": lambda: found(ALONE),
    "INPUT_BOUND": lambda: found(ALONE, adds("input_wait", 20), loader=LoaderFacts(dataset="Photos", num_workers=0)),
    "INPUT_BOUND, workers": epochs,
    "H2D_BOUND": lambda: found(ALONE, adds("h2d", 9)),
    "COMM_BOUND": lambda: found(Job(comm=20.0)),
    "COMM_BOUND, accumulated": lambda: found(Job(comm=20.0), batches=reduced_often()),
    "RESIDUAL_HEAVY": lambda: found(ALONE, adds("other", 30)),
    "INPUT_STRAGGLER": lambda: found(Job(ranks=4), adds("input_wait", 20, (1,))),
    "COMPUTE_STRAGGLER": lambda: found(Job(ranks=4), adds("forward", 20, (1,))),
    "COMPUTE_STRAGGLER, host": lambda: found(
        Job(ranks=16, steps=80), adds("forward", 20, tuple(range(8, 16))), topology=TWO_HOSTS
    ),
    "H2D_STRAGGLER": lambda: found(Job(ranks=4), adds("h2d", 20, (1,))),
    "STRAGGLER": lambda: found(Job(ranks=4), adds("other", 20, (1,))),
    "RESIDUAL_HEAVY, every n-th step": lambda: found(ALONE, adds("other", 200, every=20)),
    "CPU_CONTENTION": lambda: found(ALONE, wait_of_ready_time={0: 0.45}, wait_of_wall_time={0: 0.4}),
    "DEVICE_CONTENTION": lambda: found(ALONE, samples=shared(np.where(SECONDS >= 15, 60.0, 0.0))),
    "GIL_CONTENTION": lambda: locked(samples(ran=0.1), monitor(0.9)),
    "JITTER": lambda: found(Job(ranks=1, steps=220, grouped=False), RARE),
    "STARTUP": lambda: found(ALONE, time=RunTime.of(200.0, {"steps": 110.0, "startup": 90.0})),
    "STARTUP, compiled": lambda: found(
        ALONE, time=replace(RunTime.of(200.0, {"steps": 110.0, "startup": 90.0}), compile_s=70.0)
    ),
    "EVAL_HEAVY": lambda: found(ALONE, time=RunTime.of(100.0, {"steps": 40.0, "evaluation": 60.0}, 12)),
    "AFTER_STEPS": lambda: found(
        ALONE,
        time=RunTime.of(100.0, {"startup": 20.0, "steps": 30.0, "idle": 50.0}),
        lines=(SampledLine(0, "after", "/x/train.py", 7, "plot", None, 97),),
    ),
    "CHECKPOINT_STALLS": lambda: found(ALONE, adds("checkpoint", 100, every=20)),
    "GC_PAUSES": lambda: found(ALONE, adds("other", 30), pauses=collected(r0=collections(30, called=True))),
    "GC_PAUSES, by the interpreter": lambda: found(
        ALONE, adds("forward", 400, every=20), pauses=collected(r0=collections(400, every=20, phase=2))
    ),
    "RECOMPILES": lambda: found(
        ALONE,
        long_forwards(8),
        pauses=compilations(*[Compiled.AGAIN] * 7, Compiled.LIMIT),
        time=RunTime.of(9.0, {"steps": 8.0}),
    ),
    "RECOMPILES, no more": lambda: found(
        ALONE, pauses=compilations(*[Compiled.AGAIN] * 7, Compiled.LIMIT, ms=0.1, guard=7)
    ),
    "THROTTLED": lambda: found(ALONE, samples=hot_samples(THERMAL)),
    "DEVICE_FAULT": lambda: found(ALONE, health=faulty(GOOD, {"xid": 79}).health),
    "STOPPED": lambda: found(
        Job(ranks=2),
        pause(57, 1),
        stops={1: [Stop(30.0, "steps", 57, 57, 4e8)]},
        time=RunTime.of(100.0, {"steps": 100.0}),
    ),
    "STOPPED, machine": lambda: found(
        ALONE, stops={0: [Stop(3600.0, "suspended", 57, 57)]}, time=RunTime.of(7200.0, {"steps": 3600.0})
    ),
    "STEPS_SKIPPED": skipped,
    "SLOWDOWN": lambda: found(ALONE, later),
    "DATA_IMBALANCE": imbalanced,
    "DUPLICATE_DATA": lambda: found(Job(ranks=4), batches=history(*([[5, 6, 7, 8]] * 4))),
    "NO_GRADIENT_SYNC": lambda: found(
        Job(ranks=2, steps=60, grouped=False), batches=group_of_two(), latest=(59, 59), state="finished"
    ),
    "EVAL_MODE": lambda: found(
        ALONE, evaluation_mode=EvaluationModeSteps("Net", ["BatchNorm2d", "Dropout"], 100, 500), latest=(599,)
    ),
    "NO_ZERO_GRAD": lambda: found(ALONE, keeps_gradients="AdamW"),
    "WEIGHTS_UNCHANGED": lambda: found(
        ALONE, unchanged_weights={0: UnchangedParameters("AdamW", 12, 12, True)}, latest=(599,), state="finished"
    ),
    "NUMERIC": lambda: found(
        Job(ranks=2), losses=losses_of([3.0, 2.0, 1.5, NAN, NAN, NAN], [3.0, 2.0, NAN, NAN, NAN, NAN]), latest=(79, 79)
    ),
    "LIMIT_NEAR": lambda: found(ALONE, limits=(ResourceUse(1, Resource.OPEN_FILES, 980, 1024),)),
    "MEMORY_LEAK": lambda: found(ALONE, **leaking()),
    "MEMORY_LEAK, full soon": lambda: found(ALONE, **leaking(used_bytes=15 << 30)),
    "MEMORY_LEAK, device": lambda: found(Job(ranks=2), memory=device_leak()),
    "MEMORY_LEAK, workers": lambda: found(ALONE, **growing_workers()),
    "MEMORY_PRESSURE": lambda: found(ALONE, **full_host()),
    "MEMORY_PRESSURE, device": lambda: found(ALONE, memory=full_device()),
    "MEMORY_IMBALANCE": lambda: found(Job(ranks=4), memory=uneven_devices()),
    "ALLOCATOR_CHURN": lambda: found(Job(ranks=2), turnover=emptied(ranks=(1,)), latest=(219, 219)),
    "HANG": lambda: hanging(
        standing.snapshot(1, standing.line(6, "stuck", PATH), wchan="hrtimer_nanosleep", groups=BEHIND)
    ),
    "HANG, in one collective": lambda: hanging(standing.in_backward(1)),
    "HANG, different collectives": lambda: hanging(
        standing.snapshot(
            1, standing.call("barrier"), standing.line(40, "main", PATH), groups=(standing.group(15, "barrier"),)
        )
    ),
    "RANK_LOST": lambda: found(
        Job(ranks=2),
        exits=(RankExit(rank=1, state="killed", signal=9, last_step=219, open_step=220, open_phase="backward"),),
        state="failed",
    ),
    "RANK_LOST, by a worker": lambda: found(
        Job(ranks=2),
        exits=(RankExit(rank=1, state="failed", code=1, exception=f"RuntimeError: {DEAD_WORKER}", last_step=219),),
        state="failed",
    ),
    "WORKER_LOST": lambda: found(
        ALONE, lost_workers={0: [LostWorker(pid=4711, worker=1, workers=4, signal=7, step=108, shm_bytes=64 << 20)]}
    ),
    "RANK_LOST, out of memory": lambda: found(
        Job(ranks=2),
        exits=(RankExit(rank=1, state="killed", signal=9, last_step=219, open_phase="evaluation", oom="group"),),
        state="failed",
        **full_host(),
    ),
    "RANK_LOST, time limit": lambda: found(
        Job(ranks=2),
        exits=(
            RankExit(
                rank=0, state="killed", signal=15, last_step=219, saved_steps=200, stopped=True, at_s=1e6, open_step=220
            ),
        ),
        job_end_s=1e6,
        state="stopped",
    ),
    "RANK_LOST, ended from outside": lambda: found(
        Job(ranks=2),
        exits=(
            RankExit(rank=0, state="killed", signal=15, last_step=219, saved_steps=200, stopped=True, open_step=220),
        ),
        ended_by=EndingSignal(15, 1e6, "slurmstepd", 4711),
        state="stopped",
    ),
    "RANK_LOST, crash": lambda: found(
        Job(ranks=2),
        exits=(RankExit(rank=0, state="killed", signal=11, open_step=7, file=PATH, line=12, function="f", stack="f"),),
        state="failed",
    ),
    "INSUFFICIENT_DATA": lambda: found(Job(ranks=2, steps=4)),
}


@cache
def of_kind(case: str) -> Finding:
    """Return the finding of a case: diagnosed once, for all widths and tests."""
    kind = case.partition(",")[0]
    return next(finding for finding in CASES[case]() if finding.kind == kind)


def shown(case: str, width: int = 80) -> str:
    """Return the lines of the card that the finding makes."""
    finding = of_kind(case)
    view = run_view(report([{"forward": 3.0, "other": 1.0}], finding.rounded()))
    lines = plain(card(view, Viewport(width, 24)), Viewport(width, 24)).splitlines()
    return "".join(f"{line}\n" for line in lines[: lines.index("")])


def test_each_kind_has_a_case():
    """A new kind needs one too."""
    assert {case.partition(",")[0] for case in CASES} == {kind.value for kind in Kind}


@pytest.mark.parametrize("case", CASES)
def test_sentences_are_plain(case):
    """They fit on any screen, agree in number, and end with a full stop; a headline is one sentence without."""
    finding = of_kind(case)

    for width in (60, 80, 120):
        assert max(map(len, shown(case, width).splitlines())) <= width

    assert not finding.headline[:1].islower()
    assert not finding.headline.endswith(".")
    for text in (finding.headline, finding.summary, finding.next):
        assert not re.search(r"\b1 (steps|ranks|times|workers|cores|samples)\b", text), text

    assert finding.summary.endswith(".")
    assert finding.next.endswith(".")


@pytest.mark.parametrize("case", CASES)
def test_a_card_says_a_thing_once(case):
    """No sentence of the summary begins with the headline and says no more; a gain is in one place."""
    lines = shown(case)

    assert f"{of_kind(case).headline}:" not in of_kind(case).summary or case in ELABORATED
    assert len(re.findall(r"x\s+faster", lines)) <= 1 or "Gain" not in lines


@pytest.mark.parametrize("case", ["RESIDUAL_HEAVY", "STARTUP", "EVAL_HEAVY", "STRAGGLER"])
def test_a_line_is_reported_with_its_file(case):
    """The file's name, the line and the function are in the headline or the summary."""
    finding = of_kind(case)

    assert "train.py:23 update_metric" in f"{finding.headline} {finding.summary}"


def test_the_cards_of_all_kinds():
    """The text is that of the snapshot."""
    seen = "\n".join(shown(case) for case in CASES)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(seen, encoding="utf-8")

    assert seen == SNAPSHOT.read_text(encoding="utf-8")
