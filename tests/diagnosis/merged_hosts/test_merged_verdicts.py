"""The verdict of merged hosts is that of all rows: faults of a rank, host, switch or stage, of all ranks, and none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, rows_of, takes_turns
from tests.diagnosis.merged_hosts.central_merger import CentralMerger
from tests.diagnosis.merged_hosts.clusters import (
    LEVELS,
    Cluster,
    FaultyRun,
    any_run,
    central_findings,
    flat_verdict,
    is_at_limit,
    told,
    tree_verdict,
    updates,
)
from traceml.database.schema import STEPS
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.merged_hosts.host_merger import STEPS_COMPARED, HostMerger

CLUSTER = Cluster(ranks=32, per_host=4)


def fabricated(*faults, steps: int = 70) -> FaultyRun:
    """Return a quiet run of the cluster."""
    return FaultyRun(CLUSTER, rows_of(Job(ranks=CLUSTER.ranks, steps=steps), *faults), "none", None, "forward")


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(12, 96))])
def test_merged_hosts_give_the_verdict_of_all_rows(seed):
    """Kind, ranks, phase and group are the same, except where the gain is just at a limit; the cost to some percent."""
    run = any_run(CLUSTER, seed)

    flat, tree = flat_verdict(run), tree_verdict(run)

    if is_at_limit(flat, tree):
        return

    assert told(tree) == told(flat)
    assert tree.cost_share == pytest.approx(flat.cost_share, rel=0.1, abs=0.03)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 96))])
def test_merged_hosts_with_devices_give_the_verdict_of_all_rows(seed, every):
    """What a slow device takes longer for is in the device times alone: hosts launch as fast as ever, and wait."""
    run = any_run(CLUSTER, seed, level=LEVELS[seed % 2 or 2]).on_devices(every)

    flat, tree = flat_verdict(run), tree_verdict(run)

    if is_at_limit(flat, tree):
        return

    assert told(tree) == told(flat)


@pytest.mark.parametrize(("part", "kind"), [("other", Kind.STRAGGLER), ("input_wait", Kind.INPUT_STRAGGLER)])
def test_ranks_that_wait_in_steps_without_device_times_are_not_late(part: str, kind: Kind) -> None:
    """Their hosts wait for the device in no phase; the rank for which they wait is named, with its gain."""
    cluster, fault = Cluster(ranks=4, per_host=4), adds(part, 40.0, (1,), every=5)
    whole = FaultyRun(cluster, rows_of(Job(ranks=4, steps=1000), fault), "none", None, part)

    found, all_measured = flat_verdict(whole.on_devices(4)), flat_verdict(whole)

    assert (found.kind, found.ranks, found.phase) == (kind, (1,), part)
    assert found.speedup_if_fixed == pytest.approx(all_measured.speedup_if_fixed, rel=0.05)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param(takes_turns("input_wait", 20, tuple(range(8))), Kind.INPUT_BOUND, id="ranks of a host"),
        pytest.param(takes_turns("other", 20, tuple(range(32))), Kind.RESIDUAL_HEAVY, id="all ranks"),
        pytest.param(adds("input_wait", 20, chance=0.05), Kind.INPUT_BOUND, id="all ranks by chance"),
    ],
)
@pytest.mark.parametrize("per_host", [4, 8])
def test_ranks_that_take_turns_are_found(fault: Fault, kind: Kind, per_host: int) -> None:
    """On average they are alike, and none of them differs from its host's median."""
    cluster = Cluster(ranks=32, per_host=per_host)
    run = FaultyRun(cluster, rows_of(Job(ranks=32, steps=80), fault, seed=3), "turns", None, "")

    flat, tree = flat_verdict(run), tree_verdict(run)

    assert told(tree) == told(flat)
    assert tree.kind is kind
    assert tree.speedup_if_fixed == pytest.approx(flat.speedup_if_fixed, rel=0.1)


def test_of_a_quiet_host_one_rank_is_sent():
    """And in each second its new rows alone."""
    run = fabricated()
    *_, before, sent = updates(run)

    assert sum(len(update.rows) for update in sent) <= 2 * len(sent)
    steady = [new for new, old in zip(sent, before, strict=True) if new.choice.typical in old.rows]
    assert len(steady) >= len(sent) // 2
    for update in steady:
        rows = np.frombuffer(update.rows[update.choice.typical], STEPS.dtype)
        assert rows["step"].tolist() == list(range(60, 70))
        assert rows.tobytes() == run.rows[update.choice.typical][60:].tobytes()


def test_a_rank_that_differs_is_sent_with_its_earlier_rows():
    """It is compared with the others over the same steps; when it is like them again, it is not sent any more."""
    steps = 240

    def slow_for_a_while(own, _) -> None:
        own["forward"][5, 60:100] += 20

    run = fabricated(slow_for_a_while, steps=steps)
    of_host = [second[1] for second in updates(run)]

    first = next(update for update in of_host[5:] if 5 in update.rows)
    assert len(first.rows[5]) == STEPS_COMPARED * STEPS.row_bytes
    assert 5 not in first.choice.ordinary
    assert 5 in of_host[-1].choice.ordinary


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
    begin = {0, 1, 2, 3}.difference(chosen.rows)
    assert begin
    assert all(len(more.rows[rank]) == STEPS_COMPARED * STEPS.row_bytes for rank in begin)


def test_ranks_do_not_differ_by_their_first_steps():
    """These are set-up, and not compared; without numpy's warning of an empty mean the host sends them."""
    sent = merger_of(Job(ranks=2, steps=2)).flush()

    assert sent is not None
    assert sent.choice.ordinary == (0, 1)
    assert sent.choice.typical in sent.rows


@pytest.mark.parametrize("level", ["none", "host"])
def test_a_host_that_falls_silent_is_counted(level):
    """Its agent is gone: the verdict is about the others, and says so."""
    run = fabricated(*([adds("forward", 15, tuple(range(8, 12)))] if level == "host" else []), steps=180)
    central = CentralMerger(CLUSTER.ranks)
    for number, second in enumerate(updates(run)):
        central.take(each for each in second if number < 8 or each.choice.host != "gpu-0000")

    verdict = central_findings(central, CLUSTER)[0]

    assert verdict.summary.endswith("28 of 32 ranks were seen in these steps.")
    assert verdict.ranks == ((8, 9, 10, 11) if level == "host" else ())


def test_before_any_step_there_is_no_message():
    """A host whose ranks are still loading sends nothing."""
    assert HostMerger("h", 8).flush() is None


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 12))])
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
