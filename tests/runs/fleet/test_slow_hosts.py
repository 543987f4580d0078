"""The list of slow hosts: who is on it, and who must not be."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tests.runs.fleet.fabricated_fleet import fleet_report
from traceml.runs.fleet.fleet_dataset import FleetDataset
from traceml.runs.fleet.fleet_runs import read_runs
from traceml.runs.fleet.slow_hosts import LAST_JOBS, judge_hosts, tail_probability

HOSTS = [f"h{number:02}" for number in range(24)]


@pytest.fixture
def judged(tmp_path):
    """Write reports, read them back, and judge the hosts."""

    def judge(reports):
        dataset = FleetDataset(tmp_path / "fleet")
        for report in reports:
            dataset.add(report)

        return judge_hosts(read_runs(dataset.files()).runs)

    return judge


def jobs(count, seed=0, hosts=8, **facts):
    """Jobs on hosts drawn by chance."""
    random = np.random.default_rng(seed)
    for number in range(count):
        yield fleet_report(number, list(random.choice(HOSTS, hosts, replace=False)), random=random, **facts)


def test_a_slow_host_is_listed(judged):
    """With its jobs, how much slower it is, and in which phase; the healthy ones are not."""
    found = judged(jobs(80, slow={"h07": 1.2}))

    assert [slow.host for slow in found.slow] == ["h07"]
    slow = found.slow[0]
    assert (slow.jobs, slow.slow_jobs, slow.phase) == (LAST_JOBS, LAST_JOBS, "forward")
    assert slow.expected_jobs == pytest.approx(LAST_JOBS / 7.5, rel=0.07)  # of 15 ranks, without rank 0, two are its
    assert slow.excess == pytest.approx(0.06, abs=0.02)  # 20 % of 30 of 100 ms
    assert slow.chance < 1e-6
    assert (found.hosts, found.judged, found.jobs, found.left_out) == (24, 24, 80, 0)


def test_healthy_hosts_are_not_listed(judged):
    """Whatever the noise."""
    assert judged(jobs(80, noise=0.1)).slow == []


def test_a_repaired_host_is_no_longer_listed(judged):
    """The last jobs count."""
    before, after = list(jobs(60, slow={"h07": 1.3})), list(jobs(60, seed=1))
    for number, report in enumerate(after):
        report.run.id, report.run.started = f"later-{number}", (report.run.started or 0) + 1e8

    assert [slow.host for slow in judged(before).slow] == ["h07"]
    assert judged([*before, *after]).slow == []


def test_a_small_difference_is_not_listed(judged):
    """A host that is always the slowest by 1 % costs less than its repair."""
    assert judged(jobs(80, noise=0.0001, slow={"h07": 1.03})).slow == []


def test_a_host_of_few_jobs_is_not_judged(judged):
    """Four are too few, however slow."""
    found = judged(fleet_report(number, HOSTS[:8], slow={"h07": 2.0}) for number in range(4))

    assert (found.hosts, found.judged, found.slow) == (8, 0, [])


def test_chance_among_many_hosts_is_counted(judged):
    """Slowest in five of five jobs on two hosts: one of 32 healthy hosts would be."""
    found = judged(fleet_report(number, HOSTS[:2], slow={"h01": 1.5}) for number in range(5))

    assert (found.judged, found.slow) == (2, [])


def test_the_work_of_rank_0_is_no_sign(judged):
    """It logs and saves; its host is judged by its other ranks."""
    reports = [fleet_report(number, HOSTS[:8]) for number in range(20)]
    for report in reports:
        report.phases[1].by_rank[0].mean_ms *= 2

    assert judged(reports).slow == []


def test_other_runs_are_left_out(judged):
    """On one host, or with few steps."""
    short = (fleet_report(number, HOSTS[:8], steps=20, slow={"h03": 2.0}) for number in range(20))
    single = (fleet_report(number, [HOSTS[3]], id=f"single-{number}") for number in range(20))
    found = judged([*short, *single])

    assert (found.jobs, found.left_out, found.slow) == (0, 40, [])


def test_the_tail_is_that_of_all_outcomes():
    """Next to the sum over all outcomes of independent events."""
    chances = (0.5, 0.25, 0.125, 0.1)
    for least in range(5):
        whole = sum(
            np.prod([chance if happened else 1 - chance for chance, happened in zip(chances, outcome, strict=True)])
            for outcome in product((0, 1), repeat=4)
            if sum(outcome) >= least
        )
        assert tail_probability(chances, least) == pytest.approx(whole)
