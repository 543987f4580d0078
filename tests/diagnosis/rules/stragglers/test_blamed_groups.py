"""Slow hosts, switches and stages of fabricated runs: the verdict names the smallest group that explains them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, rows_of, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.kept_steps import KeptSteps

JOB = Job(ranks=32, steps=80)
RANKS = range(JOB.ranks)
# Hosts of 4 ranks, 2 hosts per leaf switch; 4 stages of 8 ranks across all hosts.
CLUSTER = Topology(
    hosts={rank: f"gpu-{rank // 4:03}" for rank in RANKS},
    switches={rank: (f"leaf{rank // 8}",) for rank in RANKS},
    mesh={rank: {"pp": rank % 4} for rank in RANKS},
)
HOST, LEAF, STAGE = tuple(range(8, 12)), tuple(range(16, 24)), tuple(range(1, 32, 4))


def verdict(*faults, job: Job = JOB, seed: int = 0, **facts) -> Finding:
    known = {"hosts": CLUSTER.hosts, "topology": CLUSTER, **facts}
    return diagnose(window_of(job, *faults, seed=seed), JobFacts(world_size=job.ranks, **known))[0]


@pytest.mark.parametrize("part", ["forward", "input_wait", "other"])
@pytest.mark.parametrize(
    ("ranks", "name"), [(HOST, "host gpu-002"), (LEAF, "switch leaf2"), (STAGE, "pipeline stage 1")]
)
def test_a_slow_group_is_named(part, ranks, name):
    """Headline, summary and evidence name the group; the ranks are listed beside it."""
    found = verdict(adds(part, 10, ranks))

    assert (found.ranks, found.phase) == (ranks, part)
    assert found.evidence["rank_group"]["name"] == name
    assert found.headline.startswith(f"All {len(ranks)} ranks of {name} are slow in ")
    assert found.summary.startswith(f"All {len(ranks)} ranks of {name} (ranks ")


@pytest.mark.parametrize(
    ("ranks", "advice"),
    [
        ((1,), "Compare what rank 1 does in its forward with the others: code that runs on that rank only"),
        ((1, 5), "Compare what ranks 1, 5 do in their forward with the others: code that runs on those ranks only"),
    ],
)
def test_advice_on_one_rank_and_on_several(ranks: tuple[int, ...], advice: str) -> None:
    """A verb and a pronoun for each."""
    assert verdict(adds("forward", 10, ranks), hosts={}, topology=Topology()).next.startswith(advice)


@pytest.mark.parametrize("seed", range(4))
def test_a_weakly_slow_host_is_one_finding(seed):
    """The noise of single ranks does not split the host: its ranks are judged together."""
    found = verdict(adds("forward", 4.0, HOST), job=Job(ranks=32, steps=80, sigma=0.25), seed=seed)

    assert (found.ranks, found.phase) == (HOST, "forward")
    assert found.evidence["rank_group"]["name"] == "host gpu-002"


@pytest.mark.parametrize("ranks", [(9,), (8, 9, 10), (3, 4), (0, 5, 10)], ids=str)
def test_ranks_that_are_no_group_are_named_alone(ranks):
    """One rank, three of four, neighbors on two hosts, and any three: no host, switch or stage is blamed."""
    found = verdict(adds("forward", 10, ranks))

    assert (found.kind, found.ranks) == (Kind.COMPUTE_STRAGGLER, ranks)
    assert "rank_group" not in found.evidence
    assert "host" not in found.headline


@pytest.mark.parametrize("seed", range(4))
def test_without_a_fault_nobody_is_blamed(seed):
    """Places alone make no straggler."""
    assert not verdict(seed=seed).kind.rule.is_straggler


def _slower(factor: float, ranks: tuple[int, ...]) -> Fault:
    def throttled(own, _) -> None:
        for part in ("forward", "backward", "optimizer"):
            own[part][list(ranks)] *= factor

    return throttled


@pytest.mark.parametrize("factor", [1.6, 1.25])
def test_a_host_that_is_slower_in_everything_is_blamed_as_a_whole(factor):
    """Low clocks: each part takes a quarter as long again, or more, on each of its ranks."""
    found = verdict(_slower(factor, HOST))

    assert found.ranks == HOST
    assert "slower in every part" in found.summary
    assert "clocks and temperature" in found.next


@pytest.mark.parametrize("ranks", [HOST[:1], HOST[:2], (3, 4, 12, 22)], ids=str)
def test_a_few_cores_that_are_slower_are_no_slow_host(ranks):
    """Cores of a healthy job differ by as much."""
    assert verdict(_slower(1.25, ranks)).kind is Kind.HEALTHY


def test_a_host_that_is_slow_for_a_while_takes_no_turns() -> None:
    """All of its ranks read from a disk that becomes slow: they are late in the same steps."""

    def slow(own, _) -> None:
        own["input_wait"][list(HOST), 42:] += 20

    found = verdict(slow)

    assert (found.ranks, found.phase) == (HOST, "input_wait")
    assert found.summary.startswith(
        "All 4 ranks of host gpu-002 (ranks 8-11) slow the others down in 54 % of the steps"
    )
    assert found.headline.startswith("All 4 ranks of host gpu-002 are slow in ")
    assert "with even work" not in found.summary


def test_two_causes_on_one_host_stay_two_findings():
    """Ranks of one host that are late in different parts are not one group."""
    job = Job(ranks=4, steps=80)
    place = Topology(hosts=dict.fromkeys((0, 1), "a") | dict.fromkeys((2, 3), "b"))
    faults = adds("input_wait", 40, (2,)), adds("forward", 20, (3,))

    found = diagnose(window_of(job, *faults), JobFacts(world_size=4, topology=place))

    assert [(each.ranks, each.phase) for each in found] == [((2,), "input_wait"), ((3,), "forward")]


@pytest.mark.parametrize("fault", [adds("forward", 10, HOST), adds("input_wait", 20)], ids=["slow host", "slow input"])
def test_ranks_that_were_not_seen_are_counted(fault):
    """The verdict tells on how many ranks it rests, if some never sent a step."""
    silent = tuple(79 if rank not in (5, 6) else -1 for rank in RANKS)
    rows = rows_of(JOB, fault)
    kept = KeptSteps(128, JOB.ranks)
    for rank in RANKS:
        if silent[rank] >= 0:
            kept.scatter(np.full(JOB.steps, rank), rows[rank])

    facts = JobFacts(world_size=JOB.ranks, hosts=CLUSTER.hosts, topology=CLUSTER, latest=silent)
    found = diagnose(kept.aligned(), facts)[0]

    assert found.summary.endswith("30 of 32 ranks were seen in these steps.")
    assert (found.evidence["ranks_seen"], found.evidence["world_size"]) == (30, 32)


def test_where_all_ranks_were_seen_none_are_counted():
    """Nor where it is not known who was."""
    for latest in ((79,) * JOB.ranks, ()):
        assert "were seen" not in verdict(adds("forward", 10, HOST), latest=latest).summary


@pytest.mark.parametrize("seed", range(20))
def test_ranks_that_come_and_go_are_no_stragglers(seed):
    """Ranks that end, and others that begin again from step 0 in their place, are not taken for slow ones."""
    random = np.random.default_rng(seed)
    rows = rows_of(JOB, seed=seed)
    kept = KeptSteps(128, JOB.ranks)
    changes = {
        int(rank): int(step)
        for rank, step in zip(random.choice(JOB.ranks, 6, replace=False), random.integers(20, 70, 6), strict=True)
    }
    for rank in RANKS:
        until = changes.get(rank, JOB.steps)
        kept.scatter(np.full(until, rank), rows[rank][:until])
        if until == JOB.steps:
            continue

        kept.end(rank)
        if random.random() < 0.6:  # a spare joins, with steps of its own and a slow first one
            kept.clear(rank)
            again = rows[rank][: JOB.steps - until].copy()
            again["forward_ns"][0] += 2_000_000_000
            again["total_ns"][0] += 2_000_000_000
            kept.scatter(np.full(len(again), rank), again)

    facts = JobFacts(world_size=JOB.ranks, topology=CLUSTER, latest=tuple(kept.latest.tolist()))

    assert not any(found.kind.rule.is_straggler for found in diagnose(kept.aligned(), facts))


@pytest.mark.parametrize(
    ("steps", "latest", "state", "is_judged"),
    [
        (60, (59, -1), "running", False),
        (60, (59, 40), "running", True),
        (60, (59, -1), "finished", True),
        (400, (399, -1), "running", True),
    ],
)
def test_a_live_verdict_waits_a_second_for_the_rows_of_all_ranks(
    steps: int, latest: tuple[int, int], state: str, is_judged: bool
) -> None:
    """By those of one, all waiting would be for the network, and no rank late."""
    job = Job(ranks=2, steps=steps, own={"forward": 2.0, "backward": 4.0}, comm=4.0)
    kept = KeptSteps(512, 2)
    kept.scatter(np.zeros(steps, np.int64), rows_of(job)[0])
    found = diagnose(kept.aligned(), JobFacts(world_size=2, latest=latest, state=state))[0]

    assert (found.kind is not Kind.INSUFFICIENT_DATA) is is_judged
    assert (found.summary == "Too few ranks for a verdict: steps of 1 of 2 ranks were seen.") is not is_judged
