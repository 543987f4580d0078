"""Accuracy of the diagnosis on fabricated runs with one fault each, and false findings on healthy runs.

    python benchmarks/diagnosis_accuracy.py [--runs 40] [--seed 0] [--json FILE]

Each run has 2, 4 or 8 ranks (or one), 60 to 400 steps of 3 to 60 ms, log-normal noise of 5 to 50 % per part of the
step, in a third of the runs contention spikes, and backward measured in every step or every fourth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.diagnosis.fabricated import Fault, Job, adds, at_once, takes_turns, window_of

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.ruleset import diagnose

QUIET = ("HEALTHY", "COMPUTE_BOUND")
PARTS = {
    "input_wait": "INPUT_STRAGGLER",
    "h2d": "H2D_STRAGGLER",
    "forward": "COMPUTE_STRAGGLER",
    "backward": "COMPUTE_STRAGGLER",
    "optimizer": "COMPUTE_STRAGGLER",
    "other": "STRAGGLER",
}


@dataclass
class Case:
    """One fabricated run and its expected verdict."""

    job: Job
    faults: list[Fault] = field(default_factory=list)
    kinds: tuple[str, ...] = QUIET
    ranks: tuple[tuple[int, ...], ...] = ((),)
    phase: str | None = None


Make = Callable[[np.random.Generator], Case]


def any_job(random: np.random.Generator, **fixed: object) -> Job:
    """Return a job as in the module's docstring."""
    shape = random.dirichlet([1.2, 2.5, 0.6])
    compute = float(random.uniform(0.7, 0.95))
    rest = 1 - compute
    own = {
        "forward": compute * shape[0],
        "backward": compute * shape[1],
        "optimizer": compute * shape[2],
        "input_wait": rest * 0.15,
        "other": rest * 0.15,
    }
    job = Job(
        ranks=int(random.choice([2, 4, 8])),
        steps=int(random.choice([60, 120, 220, 400])),
        own=own,
        comm=rest * 0.5,
        leave_ms=float(random.uniform(0.0, 1.0)),
        sigma=float(random.choice([0.05, 0.1, 0.2, 0.35, 0.5])),
        spikes=float(random.choice([0, 0, 0.02])),
        callback_every=int(random.choice([1, 4])),
    )
    return replace(job.scaled(float(np.exp(random.uniform(np.log(3), np.log(60))))), **fixed)  # type: ignore[arg-type]


def step_ms(job: Job) -> float:
    return sum(job.own.values()) + job.comm


def on_one_rank(size: Callable[[np.random.Generator, Job], float], **how: float) -> Make:
    def make(random: np.random.Generator) -> Case:
        job = any_job(random)
        part = str(random.choice(list(PARTS)))
        rank = int(random.integers(job.ranks))
        fault = adds(part, size(random, job), (rank,), every=int(how.get("every", 1)), chance=how.get("chance", 1.0))
        return Case(job, [fault], (PARTS[part],), ((rank,),), part)

    return make


def two_ranks(random: np.random.Generator) -> Case:
    job = any_job(random, ranks=int(random.choice([4, 8])))
    part = str(random.choice(list(PARTS)))
    ranks = tuple(sorted(random.choice(job.ranks, 2, replace=False).tolist()))
    return Case(job, [adds(part, max(20, step_ms(job)), ranks)], (PARTS[part],), (ranks,), part)


def alternating(random: np.random.Generator) -> Case:
    job = any_job(random)
    part = str(random.choice(["forward", "optimizer"]))
    ranks = tuple(sorted(random.choice(job.ranks, 2, replace=False).tolist()))
    expected = () if job.ranks == 2 else ranks
    fault = takes_turns(part, max(20, 2 * step_ms(job)), ranks)
    return Case(job, [fault], (PARTS[part],), (expected, ranks), part)


def mixed(random: np.random.Generator) -> Case:
    """Two ranks, two causes: the larger one is expected as verdict."""
    job = any_job(random, ranks=int(random.choice([4, 8])))
    first, second = (str(part) for part in random.choice(list(PARTS), 2, replace=False))
    ranks = random.choice(job.ranks, 2, replace=False).tolist()
    size = max(20, step_ms(job))
    faults = [adds(first, 2 * size, (ranks[0],)), adds(second, size, (ranks[1],))]
    return Case(job, faults, (PARTS[first],), ((ranks[0],),), first)


def on_all(part: str, kind: str, low: float = 0.15, high: float = 2.0) -> Make:
    def make(random: np.random.Generator) -> Case:
        job = any_job(random)
        size = max(step_ms(job) * float(random.uniform(low, high)), 2.0)
        return Case(job, [adds(part, size)], (kind,), ((),), part)

    return make


def comm_heavy(random: np.random.Generator) -> Case:
    job = any_job(random)
    return Case(
        replace(job, comm=max(step_ms(job) * float(random.uniform(0.7, 3)), 5)), [], ("COMM_BOUND",), ((),), "comm"
    )


def rare_steps(random: np.random.Generator) -> Case:
    job = any_job(random, steps=400, grouped=bool(random.integers(2)), sigma=float(random.choice([0.05, 0.1, 0.2])))
    part = str(random.choice(["forward", "other"]))
    fault = at_once(part, max(step_ms(job), 5) * float(random.uniform(10, 20)), 0.03)
    return Case(job if job.grouped else replace(job, ranks=1), [fault], ("JITTER",), ((),), part)


def single(part: str, kind: str) -> Make:
    def make(random: np.random.Generator) -> Case:
        job = any_job(random, ranks=1, grouped=False)
        size = max(step_ms(job) * float(random.uniform(0.2, 2)), 2.0)
        return Case(job, [adds(part, size)], (kind,), ((),), part)

    return make


def healthy(**fixed: object) -> Make:
    return lambda random: Case(any_job(random, **fixed))


def tiny(random: np.random.Generator) -> Case:
    own = {"input_wait": 0.1, "forward": 0.1, "backward": 0.15, "optimizer": 0.1, "other": 0.1}
    ranks = int(random.choice([1, 2, 4]))
    return Case(
        Job(
            ranks=ranks,
            own=own,
            comm=0.3,
            leave_ms=0.3,
            sigma=0.3,
            spikes=0.02,
            spike_ms=5,
            grouped=ranks > 1,
            steps=400,
        )
    )


def skewed(random: np.random.Generator) -> Case:
    begins = float(random.choice([0, 0.3, 0.6]))
    kinds = (*QUIET, "SLOWDOWN") if begins else QUIET  # from then on steps do take longer
    return Case(any_job(random, skew=float(random.uniform(1.1, 1.35)), skew_from=begins), kinds=kinds)


def busy_host(random: np.random.Generator) -> Case:
    """Ranks whose speed wanders, and programs that take their cores for a while: no code is at fault."""
    steps = int(random.choice([120, 220, 400]))
    lasting = {"wander_steps": int(random.choice([3, 8, 15])), "wander": float(random.uniform(0.05, 0.25))}
    stolen = {"stolen": float(random.choice([0, 0.2, 0.5])), "spike_ms": float(random.uniform(3, 12))}
    return Case(any_job(random, steps=steps, **lasting, **stolen), kinds=(*QUIET, "SLOWDOWN", "JITTER"))


CASES: dict[str, Make] = {
    "one rank, 20-40 ms": on_one_rank(lambda random, _job: float(random.uniform(20, 40))),
    "one rank, 50-100 % of a step": on_one_rank(lambda random, job: step_ms(job) * float(random.uniform(0.5, 1))),
    "one rank, 20-30 % of a step": on_one_rank(
        lambda random, job: max(step_ms(job) * float(random.uniform(0.2, 0.3)), 1.5)
    ),
    "one rank, 12-20 % of a step": on_one_rank(
        lambda random, job: max(step_ms(job) * float(random.uniform(0.12, 0.2)), 1.5)
    ),
    "one rank, 60 ms every 5th step": on_one_rank(lambda _random, _job: 60.0, every=5),
    "one rank, 60 ms in 10 % of steps": on_one_rank(lambda _random, _job: 60.0, chance=0.1),
    "two late ranks, one cause": two_ranks,
    "two late ranks, two causes": mixed,
    "two ranks late in turns": alternating,
    "all ranks: input": on_all("input_wait", "INPUT_BOUND"),
    "all ranks: copies": on_all("h2d", "H2D_BOUND"),
    "all ranks: other code": on_all("other", "RESIDUAL_HEAVY"),
    "communication": comm_heavy,
    "rare long steps": rare_steps,
    "one process: input": single("input_wait", "INPUT_BOUND"),
    "one process: other code": single("other", "RESIDUAL_HEAVY"),
    "healthy": healthy(),
    "healthy, spikes in 5 % of steps": healthy(spikes=0.05, spike_ms=5.0),
    "healthy, one process": healthy(ranks=1, grouped=False),
    "healthy, skewed by itself": skewed,
    "healthy, tiny": tiny,
    "healthy, busy host": busy_host,
}


@dataclass
class Score:
    """Number of verdicts with the right kind, ranks and phase."""

    runs: int = 0
    kind: int = 0
    ranks: int = 0
    phase: int = 0
    said: dict[str, int] = field(default_factory=dict)

    def add(self, case: Case, verdict: Finding) -> None:
        """Count one verdict."""
        kind = verdict.kind.value in case.kinds
        ranks = kind and tuple(verdict.ranks) in case.ranks
        self.runs += 1
        self.kind += kind
        self.ranks += ranks
        self.phase += ranks and (case.phase is None or verdict.phase == case.phase)
        self.said[verdict.kind.value] = self.said.get(verdict.kind.value, 0) + 1


def measure(runs: int, seed: int) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for number, (name, make) in enumerate(CASES.items()):
        scores[name] = Score()
        for run in range(runs):
            random = np.random.default_rng((seed, number, run))
            case = make(random)
            window = window_of(case.job, *case.faults, seed=int(random.integers(2**31)))
            scores[name].add(case, diagnose(window, JobFacts(world_size=case.job.ranks))[0])

    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scores = measure(options.runs, options.seed)
    print(f"{'case':36} {'runs':>5} {'kind':>6} {'+rank':>6} {'+phase':>6}  verdicts")
    for name, score in scores.items():
        said = ", ".join(f"{kind} {count}" for kind, count in sorted(score.said.items(), key=lambda item: -item[1]))
        shares = [f"{100 * count / score.runs:5.0f}%" for count in (score.kind, score.ranks, score.phase)]
        print(f"{name:36} {score.runs:5d} {' '.join(shares)}  {said}")

    quiet = [score for name, score in scores.items() if name.startswith("healthy")]
    alarms = sum(score.runs - score.kind for score in quiet)
    print(f"false alarms: {alarms} of {sum(score.runs for score in quiet)} healthy runs")
    if options.json:
        options.json.write_text(json.dumps({name: vars(score) for name, score in scores.items()}, indent=1))


if __name__ == "__main__":
    main()
