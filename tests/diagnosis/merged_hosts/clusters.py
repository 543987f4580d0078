"""Fabricated clusters with a fault at one level, diagnosed from all rows and from the updates of hosts.

`benchmarks/tree.py` uses it with more ranks and more faults.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.diagnosis.fabricated import Fault, Job, adds, rows_of
from tests.diagnosis.merged_hosts.central_merger import CentralMerger
from tests.diagnosis.merged_hosts.update_bytes import UpdatePacker, unpacked
from traceml.database.schema import DEVICE_STEPS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.merged_hosts.host_merger import STEPS_COMPARED, HostMerger, HostUpdate
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.kept_steps import KeptSteps

LEVELS = ("none", "rank", "host", "switch", "stage", "all")
PARTS = ("input_wait", "h2d", "forward", "backward", "optimizer", "other")
LAST = STEPS_COMPARED
STEPS_PER_SECOND = 10
Rows = Sequence[np.ndarray[Any, Any]]
_LAUNCH_NS = 100_000
_ON_DEVICE = ("h2d_ns", "forward_ns", "backward_ns", "optimizer_ns")


def _device_rows(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    device = np.zeros(len(rows), DEVICE_STEPS.dtype)
    for column in DEVICE_STEPS.names:
        device[column] = rows[column]

    return device


@dataclass(frozen=True)
class Cluster:
    """Hosts of some ranks below leaf switches; stages of the model are across all hosts."""

    ranks: int = 64
    per_host: int = 8
    hosts_per_switch: int = 2
    stages: int = 4

    @property
    def topology(self) -> Topology:
        """The place of each rank."""
        ranks = range(self.ranks)
        return Topology(
            hosts={rank: self.host_of(rank) for rank in ranks},
            switches={rank: (f"leaf{rank // (self.per_host * self.hosts_per_switch)}",) for rank in ranks},
            mesh={rank: {"pp": rank % self.stages} for rank in ranks},
        )

    def host_of(self, rank: int) -> str:
        """Return the host of a rank."""
        return f"gpu-{rank // self.per_host:04}"

    def group(self, level: str, random: np.random.Generator) -> tuple[int, ...] | None:
        """Return the ranks of any group of a level; None for all ranks."""
        rank = int(random.integers(self.ranks))
        under = self.per_host * self.hosts_per_switch
        return {
            "rank": (rank,),
            "host": tuple(range(rank // self.per_host * self.per_host, (rank // self.per_host + 1) * self.per_host)),
            "switch": tuple(range(rank // under * under, (rank // under + 1) * under)),
            "stage": tuple(range(rank % self.stages, self.ranks, self.stages)),
        }.get(level)


@dataclass(frozen=True)
class FaultyRun:
    """A run of a cluster: its rows, those of its devices if it has any, and the level of its fault."""

    cluster: Cluster
    rows: Rows
    level: str
    ranks: tuple[int, ...] | None
    part: str
    device_rows: Rows = ()

    def on_devices(self, every: int) -> FaultyRun:
        """Return the run as one of GPUs, which measure every n-th step: what they compute, hosts only launch."""
        launching = [rows.copy() for rows in self.rows]
        for rows in launching:
            rows["backward_own_ns"] = np.where(rows["backward_own_ns"] < 0, -1, _LAUNCH_NS)
            for column in _ON_DEVICE:
                rows[column] = np.minimum(rows[column], _LAUNCH_NS)

        return replace(self, rows=launching, device_rows=[_device_rows(rows[::every]) for rows in self.rows])


def any_run(cluster: Cluster, seed: int, level: str | None = None, steps: int = 70) -> FaultyRun:
    """Return a run with a fault of any size in any part of the step of some ranks."""
    random = np.random.default_rng(seed)
    level = level or LEVELS[seed % len(LEVELS)]
    job = Job(
        ranks=cluster.ranks,
        steps=steps,
        sigma=float(random.uniform(0.03, 0.25)),
        comm=float(random.uniform(0.3, 3.0)),
        callback_every=int(random.choice([1, 4])),
    ).scaled(float(random.choice([0.5, 1.0, 6.0])))
    ranks, part = cluster.group(level, random), str(random.choice(PARTS))
    size = sum(job.own.values()) * float(random.choice([0.05, 0.2, 0.35, 0.6, 1.5]))
    faults: list[Fault] = [] if level == "none" else [adds(part, size, ranks, every=int(random.choice([1, 1, 3])))]
    return FaultyRun(cluster, rows_of(job, *faults, seed=seed), level, ranks, part)


def flat_verdict(run: FaultyRun) -> Finding:
    """Return the verdict from the rows of all ranks."""
    kept = KeptSteps(128, run.cluster.ranks)
    for rank, rows in enumerate(run.rows):
        kept.scatter(np.full(len(rows), rank), rows)

    for rank, rows in enumerate(run.device_rows):
        kept.scatter_device(np.full(len(rows), rank), rows)

    return diagnose(kept.aligned(last=LAST), facts_of(run.cluster, kept.latest.tolist()))[0]


def tree_verdict(run: FaultyRun) -> Finding:
    """Return the last confirmed verdict from the updates of hosts, each of which has passed as bytes."""
    central, asked = CentralMerger(run.cluster.ranks), set[int]()
    packers = defaultdict[str, UpdatePacker](UpdatePacker)
    verdict = None
    for number, second in enumerate(updates(run, asked), 1):
        packed = {each.choice.host: packers[each.choice.host].packed(each) for each in second}
        for rank in (rank for update in second for rank in update.rows if run.device_rows):
            central.intake.add(DEVICE_STEPS.name, rank, until(run.device_rows[rank], number).tobytes())

        central.take(unpacked(data, central.choice_of(host)) for host, data in packed.items())
        findings = central_findings(central, run.cluster)
        verdict = findings[0] if central.is_confirmed(findings) else verdict
        asked.clear()
        asked |= central.wanted(findings)

    assert verdict is not None
    return verdict


def central_findings(central: CentralMerger, cluster: Cluster) -> list[Finding]:
    """Return the findings of what hosts have sent so far."""
    window, facts = central.snapshot(LAST)
    return diagnose(window, facts_of(cluster, facts.latest))


def updates(run: FaultyRun, asked: Collection[int] = ()) -> Iterator[list[HostUpdate]]:
    """Yield the updates of all hosts, second by second.

    Args:
        run: the run.
        asked: ranks whose rows are asked for; may change between the seconds.
    """
    cluster = run.cluster
    hosts = sorted({cluster.host_of(rank) for rank in range(cluster.ranks)})
    mergers = {host: HostMerger(host, cluster.ranks) for host in hosts}
    for first in range(0, len(run.rows[0]), STEPS_PER_SECOND):
        for rank, rows in enumerate(run.rows):
            mergers[cluster.host_of(rank)].add(rank, rows[first : first + STEPS_PER_SECOND].tobytes())

        for rank, rows in enumerate(run.device_rows):
            new = rows[(rows["step"] >= first) & (rows["step"] < first + STEPS_PER_SECOND)]
            mergers[cluster.host_of(rank)].add_device(rank, new.tobytes())

        flushed = [merger.flush(asked) for merger in mergers.values()]
        yield [update for update in flushed if update is not None]


def until(rows: np.ndarray[Any, Any], seconds: int) -> np.ndarray[Any, Any]:
    """Return the rows of the steps of the first seconds."""
    return rows[rows["step"] < seconds * STEPS_PER_SECOND]


def facts_of(cluster: Cluster, latest: Sequence[int]) -> JobFacts:
    """Return the facts that both forms have."""
    topology = cluster.topology
    return JobFacts(world_size=cluster.ranks, hosts=topology.hosts, topology=topology, latest=tuple(latest))


def is_at_limit(*findings: Finding) -> bool:
    """Return whether a finding is at the limit of a rule: its ranks are reported from a gain of 5 % on."""
    return any(abs(finding.speedup_if_fixed - 1.05) <= 0.01 for finding in findings if finding.ranks)


def told(finding: Finding) -> tuple[str, tuple[int, ...], str | None, str | None]:
    """Return kind, ranks, phase and group of a verdict."""
    group = finding.evidence.get("rank_group") or {}
    return str(finding.kind), finding.ranks, finding.phase, group.get("words")
