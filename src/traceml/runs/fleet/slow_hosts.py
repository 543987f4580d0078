"""Hosts that were among the slowest in most of their last jobs.

Within a job all hosts do the same work at the same time, so no clock, model or version disturbs the comparison. If all
are healthy, each is as likely as any other to be among the slowest, whatever the noise: of k slowest among n hosts the
probability is k/n. A host is listed when it was there so often that chance, over all judged hosts together, gives
such a list less than once in a hundred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from traceml.diagnosis.facts.core_waits import medians_of_others
from traceml.diagnosis.findings import significant
from traceml.runs.fleet.fleet_runs import FleetRun
from traceml.runs.fleet.fleet_types import HostJudgment, SlowHost

__all__ = ["LAST_JOBS", "MAX_CHANCE", "MIN_EXCESS", "MIN_JOBS", "MIN_STEPS", "judge_hosts", "tail_probability"]

LAST_JOBS = 20
"""Jobs of a host that count, the newest: what was repaired before them is no longer reported."""
MIN_JOBS = 5
MIN_STEPS = 50
MIN_EXCESS = 0.02
"""A smaller difference costs less than its repair, and healthy hosts differ by as much."""
MAX_CHANCE = 0.01
_SLOWEST_SHARE = 8  # of eight hosts one is among the slowest


@dataclass(frozen=True, slots=True)
class _Placing:
    """Place of a host in one job: whether it was among the slowest, the probability of that, and its excess."""

    run: FleetRun
    chance: float
    is_slow: bool
    excess: float
    phase: str


def judge_hosts(runs: Sequence[FleetRun]) -> HostJudgment:
    """Compare hosts within their jobs."""
    jobs = [run for run in runs if len(run.hosts) > 1 and run.steps >= MIN_STEPS]
    placings: dict[str, list[_Placing]] = defaultdict(list)
    for job in jobs:
        for host, placing in _placings(job):
            placings[host].append(placing)

    last = {host: each[-LAST_JOBS:] for host, each in placings.items() if len(each) >= MIN_JOBS}
    found = [slow for host, each in last.items() if (slow := _judged(host, each, len(last))) is not None]
    found.sort(key=lambda slow: (-slow.excess, slow.host))
    return HostJudgment(
        hosts=len(placings), judged=len(last), jobs=len(jobs), left_out=len(runs) - len(jobs), slow=found
    )


def _placings(job: FleetRun) -> Iterator[tuple[str, _Placing]]:
    ordered = sorted(job.hosts, key=lambda each: -each.work_ms)
    count = max(1, round(len(ordered) / _SLOWEST_SHARE))
    ranks = sum(each.ranks for each in ordered)
    names = sorted({name for each in ordered for name in each.phases})
    work = np.array([[each.phases.get(name, 0.0) for name in names] + [each.work_ms] for each in ordered])
    usual_ms = [[*medians_of_others(dict(enumerate(column))).values()] for column in work.T.tolist()]
    beyond = work - np.array(usual_ms).T
    for at, each in enumerate(ordered):
        # A host of many ranks has the slowest of them more often, as far as the noise is that of single ranks.
        chance = min(count * max(1 / len(ordered), each.ranks / ranks), 1.0)
        usual = each.work_ms - float(beyond[at, -1])
        excess = float(beyond[at, -1]) / usual if usual > 0 else 0.0
        yield each.host, _Placing(job, chance, at < count, excess, names[int(beyond[at, :-1].argmax())])


def _judged(host: str, placings: Sequence[_Placing], hosts: int) -> SlowHost | None:
    slow = [each for each in placings if each.is_slow]
    if 2 * len(slow) <= len(placings):
        return None

    chance = min(tail_probability((each.chance for each in placings), len(slow)) * hosts, 1.0)
    excess = float(np.median([each.excess for each in placings]))
    if chance > MAX_CHANCE or excess < MIN_EXCESS:
        return None

    phases = [each.phase for each in slow]
    return SlowHost(
        host=host,
        jobs=len(placings),
        slow_jobs=len(slow),
        expected_jobs=significant(sum(each.chance for each in placings)) or 0.0,
        chance=significant(chance) or 0.0,
        excess=significant(excess) or 0.0,
        phase=max(phases, key=phases.count),
        last_run=slow[-1].run.run,
        last_started=slow[-1].run.started,
    )


def tail_probability(chances: Iterable[float], least: int) -> float:
    """Return the probability that at least some number of independent events happen, each with its own probability."""
    counts = np.ones(1)
    for chance in chances:
        counts = np.convolve(counts, (1 - chance, chance))

    return float(counts[least:].sum())
