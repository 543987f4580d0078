"""The verdict of merged hosts is that of all rows: faults of a rank, host, switch or stage, of all ranks, and none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.diagnosis.merged_hosts.central_merger import CentralMerger
from tests.diagnosis.merged_hosts.clusters import (
    Cluster,
    FaultyRun,
    any_run,
    central_findings,
    flat_verdict,
    is_at_limit,
    messages,
    told,
    tree_verdict,
)
from traceml.database.schema import STEPS
from traceml.database.store.summaries import StepSums, sum_rows
from traceml.diagnosis.merged_hosts.host_merger import STEPS_COMPARED, HostMerger
from traceml.diagnosis.merged_hosts.host_second import HostSecond

CLUSTER = Cluster(ranks=32, per_host=4)


def fabricated(*faults, steps: int = 70) -> FaultyRun:
    """Return a quiet run of the cluster."""
    return FaultyRun(CLUSTER, rows_of(Job(ranks=CLUSTER.ranks, steps=steps), *faults), "none", None, "forward")


@pytest.mark.parametrize("seed", [*range(24), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(24, 96))])
def test_merged_hosts_give_the_verdict_of_all_rows(seed):
    """Kind, ranks, phase and group are the same, except where the gain is just at a limit; the cost to some percent."""
    run = any_run(CLUSTER, seed)

    flat, tree = flat_verdict(run), tree_verdict(run)

    if is_at_limit(flat, tree):
        return

    assert told(tree) == told(flat)
    assert tree.cost_share == pytest.approx(flat.cost_share, rel=0.1, abs=0.03)


def test_sums_of_all_ranks_are_exact():
    """Hosts send few rows, and the sums and the histogram of step times of all."""
    run = fabricated()
    central = CentralMerger(CLUSTER.ranks)
    for second in messages(run):
        central.take([HostSecond.decoded(data) for data in second])

    every = np.concatenate(run.rows)
    exact = sum_rows("steps", every)[0].widened(central.sums.width)
    assert central.sums.bins.tolist() == exact.bins.tolist()
    assert central.sums.levels.tolist() == exact.levels.tolist()
    (median,) = StepSums.of({"steps": central.sums}).quantiles_ns([0.5])
    assert median == pytest.approx(float(np.median(every["total_ns"])), rel=0.0075)


def test_of_a_quiet_host_one_rank_is_sent():
    """And in each second its new rows alone."""
    run = fabricated()
    *_, last = messages(run)
    sent = [HostSecond.decoded(data) for data in last]

    assert sum(len(second.rows) for second in sent) <= 2 * len(sent)
    steady = [second for second in sent if second.typical not in second.begins]
    assert len(steady) >= len(sent) // 2
    for second in steady:
        rows = np.frombuffer(second.rows[second.typical], STEPS.dtype)
        assert rows["step"].tolist() == list(range(60, 70))
        assert rows.tobytes() == run.rows[second.typical][60:].tobytes()


def test_a_rank_that_differs_is_sent_with_its_earlier_rows():
    """It is compared with the others over the same steps; when it is like them again, it is not sent any more."""
    steps = 240

    def slow_for_a_while(own, _) -> None:
        own["forward"][5, 60:100] += 20

    run = fabricated(slow_for_a_while, steps=steps)
    of_host = [[HostSecond.decoded(each) for each in second][1] for second in messages(run)]

    first = next(second for second in of_host[5:] if 5 in second.rows)
    assert 5 in first.begins
    assert len(first.rows[5]) == STEPS_COMPARED * STEPS.row_bytes
    assert 5 not in first.ordinary
    assert 5 in of_host[-1].ordinary


def merger_of(job: Job) -> HostMerger:
    """Return the merger of a host that has the rows of all ranks."""
    merger = HostMerger("h", job.ranks)
    for rank, rows in enumerate(rows_of(job)):
        merger.add(rank, rows.tobytes())

    return merger


def test_ranks_can_be_asked_for():
    """Full rows of any rank, from the next second on."""
    merger = merger_of(Job(ranks=4, steps=40))

    chosen = merger.flush()
    assert chosen is not None
    more = merger.flush(asked=(0, 1, 2, 3, 99))
    assert more is not None
    assert sorted(more.rows) == [0, 1, 2, 3]
    assert set(more.begins) == {0, 1, 2, 3}.difference(chosen.rows)
    assert all(len(more.rows[rank]) == STEPS_COMPARED * STEPS.row_bytes for rank in more.begins)


def test_ranks_do_not_differ_by_their_first_steps():
    """These are set-up, and not compared; without numpy's warning of an empty mean the host sends them."""
    sent = merger_of(Job(ranks=2, steps=2)).flush()

    assert sent is not None
    assert sent.ordinary == (0, 1)
    assert sent.typical in sent.rows


@pytest.mark.parametrize("level", ["none", "host"])
def test_a_host_that_falls_silent_is_counted(level):
    """Its agent is gone: the verdict is about the others, and says so."""
    run = fabricated(*([adds("forward", 15, tuple(range(8, 12)))] if level == "host" else []), steps=180)
    central = CentralMerger(CLUSTER.ranks)
    for number, second in enumerate(messages(run)):
        sent = [HostSecond.decoded(data) for data in second]
        central.take([each for each in sent if number < 8 or each.host != "gpu-0000"])

    verdict = central_findings(central, CLUSTER)[0]

    assert verdict.summary.endswith("28 of 32 ranks were seen in these steps.")
    assert verdict.ranks == ((8, 9, 10, 11) if level == "host" else ())


def test_before_any_step_there_is_no_message():
    """A host whose ranks are still loading sends nothing."""
    assert HostMerger("h", 8).flush() is None


@pytest.mark.parametrize("seed", range(12))
def test_ranks_that_come_and_go_are_no_stragglers(seed):
    """Ranks end, and others join in their place from step 0 on; hosts see it before the center does."""
    random = np.random.default_rng(seed)
    run = fabricated(steps=100)
    changes = dict(zip(random.choice(CLUSTER.ranks, 5, replace=False).tolist(), [2, 3, 4, 5, 6], strict=True))
    mergers = {host: HostMerger(host, CLUSTER.ranks) for host in map(CLUSTER.host_of, range(0, CLUSTER.ranks, 4))}
    central, begun = CentralMerger(CLUSTER.ranks), dict.fromkeys(range(CLUSTER.ranks), 0)
    for second in range(10):
        for rank, rows in enumerate(run.rows):
            merger = mergers[CLUSTER.host_of(rank)]
            if changes.get(rank) == second:
                merger.end(rank)
                begun[rank] = -1
            elif changes.get(rank, 99) + 2 == second and rank % 2:
                merger.join(rank)
                begun[rank] = second

            if begun[rank] >= 0:
                first = 10 * (second - begun[rank])
                merger.add(rank, rows[first : first + 10].tobytes())

        flushed = [merger.flush() for merger in mergers.values()]
        central.take([each for each in flushed if each is not None])
        assert not central_findings(central, CLUSTER)[0].kind.rule.is_straggler


@pytest.mark.parametrize("cut", [0, 1, 7, -1, -20])
def test_damaged_messages_are_refused(cut):
    """The error says so; nothing of the message is taken."""
    run = fabricated(steps=30)
    data = next(iter(messages(run)))[0]

    with pytest.raises(ValueError, match="the message of a host cannot be read"):
        HostSecond.decoded(data[:cut])

    with pytest.raises(ValueError, match="cannot be read"):
        HostSecond.decoded(b"\x93\x01\x02\x03")
