"""Trainings before and after their advice was followed, and those to which it must not be given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from msgspec import structs

from tests.diagnosis.fabricated import MS, Fault, Job, adds, at_once, takes_turns, window_of
from traceml.database.schema import EPOCHS, LINE_OTHER, PAUSES, Pause
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

__all__ = ["FOLLOWED", "Followed", "Training"]

ALONE, PAIR = Job(ranks=1, grouped=False), Job(ranks=2)
WORKERS = LoaderFacts(num_workers=2, persistent_workers=False)


@dataclass(frozen=True)
class Training:
    """A fabricated training.

    Attributes:
        job: its usual durations.
        faults: what is added to them.
        facts: what is known besides its steps.
    """

    job: Job
    faults: tuple[Fault, ...] = ()
    facts: JobFacts = JobFacts()  # noqa: RUF009 - immutable

    def findings(self) -> list[Finding]:
        """Return its findings."""
        return diagnose(window_of(self.job, *self.faults), structs.replace(self.facts, world_size=self.job.ranks))

    def step_ms(self) -> float:
        """Return its mean step."""
        window = window_of(self.job, *self.faults)
        return float(window.total.mean()) / MS


@dataclass(frozen=True)
class Followed:
    """An advice.

    Attributes:
        name: short.
        kind: kind of the finding that gives it.
        says: part of its text.
        before: a training that gets it.
        after: the same training where it was followed.
        refused: a training that must not get it.
    """

    name: str
    kind: Kind
    says: str
    before: Training
    after: Training
    refused: Training


def _first_steps(ms: float, every: int = 20) -> Fault:
    def fault(own: dict[str, np.ndarray], _: np.random.Generator) -> None:
        own["input_wait"][:, ::every] += ms

    return fault


def _epochs(ms: float, loader: LoaderFacts = WORKERS, every: int = 20) -> JobFacts:
    rows = np.zeros(-(-ALONE.steps // every), EPOCHS.dtype)
    rows["step"], rows["ns"], rows["create_ns"] = np.arange(len(rows)) * every, (ms + 0.3) * MS, ms * MS
    return JobFacts(loader=loader, epochs=rows)


def _collections(ms: float, every: int = 1, *, called: bool = True) -> JobFacts:
    steps = np.arange(every // 2, ALONE.steps, every)
    rows = np.zeros(len(steps), PAUSES.dtype)
    rows["step"], rows["ns"], rows["count"] = steps, int(ms * MS), 1
    rows["cause"], rows["phase"], rows["detail"] = int(Pause.COLLECTION), LINE_OTHER, 2
    rows["called"], rows["line_id"], rows["text_id"] = called, 5, -1
    pauses = PauseHistory({0: {5: "/x/train.py:31 tidy"}})
    pauses.add(0, rows)
    return JobFacts(pauses=pauses)


def _reductions(backwards: float, reductions: float) -> JobFacts:
    builder = JobFactsBuilder(2)
    builder.info(0, {"kind": "reductions", "backwards_per_step": backwards, "reductions_per_step": reductions})
    return builder.build()


def _cost(part: str, ms: float) -> tuple[Training, Training]:
    return Training(ALONE, (adds(part, ms),)), Training(ALONE)


def _late(part: str, ms: float = 8.0) -> tuple[Training, Training]:
    return Training(PAIR, (adds(part, ms, ranks=(1,)),)), Training(PAIR)


def _averages_every(steps: int, *faults: Fault) -> Training:
    return Training(replace(PAIR, meets_every=steps), faults, JobFacts(batches=BatchHistory()))


_FAST, _EVEN = Training(ALONE), Training(PAIR)
_ALL_LATE: Callable[[str], Training] = lambda part: Training(PAIR, (adds(part, 8.0),))  # noqa: E731 - a table's cell

FOLLOWED: tuple[Followed, ...] = (
    Followed("copies overlap", Kind.H2D_BOUND, "non_blocking=True", *_cost("h2d", 6.0), _FAST),
    Followed("own code is cheaper", Kind.RESIDUAL_HEAVY, "what else the training loop does",
             *_cost("other", 10.0), Training(ALONE, (adds("forward", 10.0),))),
    Followed("a phase of the user is cheaper", Kind.RESIDUAL_HEAVY, "what else the training loop does",
             *_cost("user", 10.0), Training(ALONE, (adds("optimizer", 10.0),))),
    Followed("every 10th step, half as often", Kind.RESIDUAL_HEAVY, "every 20th step",
             Training(ALONE, (adds("other", 80.0, every=10),)), Training(ALONE, (adds("other", 80.0, every=20),)),
             Training(ALONE, (adds("other", 8.0),))),
    Followed("saving half as often", Kind.CHECKPOINT_STALLS, "Save half as often",
             Training(ALONE, (adds("checkpoint", 100.0, every=20),)),
             Training(ALONE, (adds("checkpoint", 100.0, every=40),)),
             Training(ALONE, (adds("checkpoint", 10.0, every=20),))),
    Followed("one iterator for all epochs", Kind.INPUT_BOUND, "Set persistent_workers=True in the DataLoader, and use",
             Training(ALONE, (_first_steps(200),), _epochs(200)), Training(ALONE, (), _epochs(0)),
             Training(ALONE, (_first_steps(200),), _epochs(200, structs.replace(WORKERS, persistent_workers=True)))),
    Followed("one loader for all epochs", Kind.INPUT_BOUND, "Make the DataLoader once, before the loop over epochs",
             Training(ALONE, (_first_steps(200),),
                      _epochs(200, structs.replace(WORKERS, persistent_workers=True, made=8))),
             Training(ALONE, (), _epochs(0)), Training(ALONE, (_first_steps(200),), _epochs(200))),
    Followed("collecting every 500th step", Kind.GC_PAUSES, "every 500th step",
             Training(ALONE, (adds("other", 30.0),), _collections(30)), Training(ALONE), _FAST),
    Followed("no_sync", Kind.COMM_BOUND, "under model.no_sync()",
             Training(replace(PAIR, comm=20.0), (), _reductions(4, 4)), Training(replace(PAIR, comm=5.0)),
             Training(replace(PAIR, comm=0.8), (), _reductions(4, 4))),
    Followed("communication overlaps", Kind.COMM_BOUND, "Synchronize less per sample",
             Training(replace(PAIR, comm=12.0)), Training(replace(PAIR, comm=0.0)), _EVEN),
    Followed("the data of a late rank", Kind.INPUT_STRAGGLER, "shard, file system, worker processes",
             *_late("input_wait"), _ALL_LATE("input_wait")),
    Followed("copies of a late rank", Kind.H2D_STRAGGLER, "PCIe slot of its device", *_late("h2d"), _ALL_LATE("h2d")),
    *(
        Followed(f"{part} of a late rank", Kind.COMPUTE_STRAGGLER, f"does in its {part} with the others",
                 *_late(part), _ALL_LATE(part))
        for part in ("forward", "backward", "optimizer")
    ),
    Followed("code of a late rank", Kind.STRAGGLER, "runs only on rank 1", *_late("other"), _ALL_LATE("other")),
    Followed("code of a late rank, in local SGD", Kind.STRAGGLER, "runs only on rank 1",
             _averages_every(8, adds("other", 30.0, ranks=(1,))), _averages_every(8),
             _averages_every(8, adds("other", 30.0))),
    Followed("ranks in turns", Kind.COMPUTE_STRAGGLER, "Balance the work of the ranks in each step",
             Training(PAIR, (takes_turns("forward", 30.0, (0, 1)),)), Training(PAIR, (adds("forward", 15.0),)),
             Training(PAIR, (adds("forward", 30.0),))),
    Followed("rare long steps", Kind.JITTER, "inputs of unusual size or shape",
             Training(ALONE, (at_once("forward", 90.0, 0.04),)), Training(ALONE),
             Training(ALONE, (adds("forward", 4.0),))),
)  # fmt: skip
"""Advice that promises shorter steps, except that on loading (`test_loading_simulated.py`)."""
