"""Which ranks are late, where others are near them."""

from __future__ import annotations

import pytest

from tests.diagnosis.fabricated import Job, adds, window_of
from tests.diagnosis.merged_hosts.clusters import Cluster, any_run, flat_verdict, told
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.rules.stragglers import find_late
from traceml.diagnosis.steps.segments import segments_of


@pytest.mark.parametrize("between_ms", [(), (2.4,), (3.2, 2.4), (3.4, 3.2, 2.5)])
def test_ranks_between_the_late_ones_and_the_others_hide_none(between_ms: tuple[float, ...]) -> None:
    """They are few, and nearer to the others: these count as others, from which the late ones are clearly apart."""
    faults = [adds("forward", 8.0, (0, 1, 2))]
    faults += [adds("forward", ms, (rank,)) for rank, ms in enumerate(between_ms, 3)]
    window = window_of(Job(ranks=32, steps=120, sigma=0.02), *faults)

    found, *_ = find_late(segments_of(window, JobFacts(world_size=32)), JobFacts(world_size=32))

    assert found.rows.tolist() == [0, 1, 2]
    assert len(found.others) == 29


def test_the_noise_of_one_rank_hides_no_late_host() -> None:
    """Its backward was measured in 8 of 32 steps; the host's forward takes 17 of 120 ms more."""
    run = any_run(Cluster(ranks=128, per_host=8, hosts_per_switch=4), 10_214)

    kind, ranks, phase, group = told(flat_verdict(run))

    assert (kind, ranks, phase) == ("COMPUTE_STRAGGLER", run.ranks, "forward")
    assert group == "all 8 ranks of host gpu-0002"
