"""Merged hosts: agreement with the verdict of all rows, and cost and delay of the verdict for thousands of ranks.

    python benchmarks/tree.py [--cases 300] [--ranks 10000] [--seconds 16]

First, faults of a rank, a host, a switch, a pipeline stage, all ranks, and none, in runs of 128 fabricated ranks: the
verdict of the hosts' messages is compared with that of all rows (kind, ranks, phase, group). Then a job of hosts of 8
ranks that makes 10 steps a second; after half of it a fault begins. Printed per fault: bytes that a host sends in a
second, mean and largest; CPU time of merging per host; CPU time of the center (reading messages, joining, all rules
once a second) as a share of a core; and the seconds from the fault to the verdict that names it. Connections and the
store are not part of it: see `ingest.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.diagnosis.fabricated import Job, rows_of
from tests.diagnosis.merged_hosts.central_merger import CentralMerger
from tests.diagnosis.merged_hosts.clusters import (
    LEVELS,
    STEPS_PER_SECOND,
    Cluster,
    any_run,
    facts_of,
    flat_verdict,
    is_at_limit,
    told,
    tree_verdict,
)
from tests.diagnosis.merged_hosts.update_bytes import UpdatePacker, unpacked

from traceml.diagnosis.merged_hosts.host_merger import STEPS_COMPARED, HostMerger
from traceml.diagnosis.ruleset import diagnose

OWN_MS = {"input_wait": 2.0, "forward": 25.0, "backward": 55.0, "optimizer": 10.0, "other": 2.0}
GOAL_BYTES, GOAL_CPU, GOAL_DELAY_S = 1000, 0.10, 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=16)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["none", "rank", "host", "switch", "stage"])
    options = parser.parse_args()
    same = agreement(options.cases)
    print(
        f"\n| fault, {options.ranks:,} ranks | B/s per host, mean / largest | CPU per host | center's core "
        "| delay | verdict |"
    )
    print("|---|---|---|---|---|---|")
    for level in options.levels if options.ranks else ():
        print(measure(level, options.ranks, options.seconds).line, flush=True)

    return 0 if same else 1


def agreement(cases: int) -> bool:
    """Print how often the verdicts are the same; return whether they always are."""
    cluster = Cluster(ranks=128, per_host=8, hosts_per_switch=4)
    found: Counter[tuple[str, str]] = Counter()
    for seed in range(cases):
        run = any_run(cluster, 10_000 + seed)
        verdicts = flat_verdict(run), tree_verdict(run)
        flat, tree = map(told, verdicts)
        result = "same" if flat == tree else "at limit" if is_at_limit(*verdicts) else "other"
        found[run.level, result] += 1
        if flat != tree:
            print(f"seed {10_000 + seed}, {run.level}, {result}: {shown(flat)} != {shown(tree)}")

    print("\n| fault | same verdict | other, gain at the limit of 5 % | other |\n|---|---|---|---|")
    for level in LEVELS:
        print(f"| {level} | {found[level, 'same']} | {found[level, 'at limit']} | {found[level, 'other']} |")

    return not any(count for (_, result), count in found.items() if result == "other")


def shown(verdict: tuple[Any, ...]) -> str:
    kind, ranks, phase, group = verdict
    return f"{kind} {phase} {group or list(ranks)[:8]}"


@dataclass
class Figures:
    """Figures of one fault."""

    level: str
    hosts: int
    seconds: int
    sent: list[int] = field(default_factory=list)
    largest: int = 0
    host_s: float = 0.0
    center_s: float = 0.0
    delay_s: float | None = None
    verdict: str = ""

    @property
    def line(self) -> str:
        """The figures as a row of a table."""
        steady = self.sent[2:]  # the first messages have the rows that were made before the first choice
        delay = "-" if self.level == "none" else "none" if self.delay_s is None else f"{self.delay_s:.0f} s"
        return (
            f"| {self.level} | {np.mean(steady) / self.hosts:.0f} / {self.largest:,} "
            f"| {1000 * self.host_s / self.hosts / self.seconds:.2f} ms/s | {self.center_s / self.seconds:.1%} "
            f"| {delay} | {self.verdict} |"
        )


def measure(level: str, ranks: int, seconds: int) -> Figures:
    """Play a job second by second; return its figures."""
    cluster = Cluster(ranks=ranks, per_host=8, hosts_per_switch=32)
    late = cluster.group(level, np.random.default_rng(7))
    begins = seconds // 2 * STEPS_PER_SECOND
    job = Job(ranks=ranks, steps=seconds * STEPS_PER_SECOND, own=OWN_MS, comm=4.0, sigma=0.08)
    rows = rows_of(job, slow_from(begins, late, 60.0) if late else unchanged)
    hosts = [Host(cluster, first) for first in range(0, ranks, cluster.per_host)]
    central, figures = CentralMerger(ranks), Figures(level, len(hosts), seconds)
    facts, asked = facts_of(cluster, ()), frozenset[int]()
    for second in range(seconds):
        at = slice(second * STEPS_PER_SECOND, (second + 1) * STEPS_PER_SECOND)
        packed = [each[at].tobytes() for each in rows]
        began = time.process_time()
        messages = [host.message(packed, asked) for host in hosts]
        merged = time.process_time()
        central.take(unpacked(each, central.choice_of(host.name)) for host, each in zip(hosts, messages, strict=True))
        window, known = central.snapshot(STEPS_COMPARED)
        findings = diagnose(window, msgspec.structs.replace(facts, latest=known.latest))
        asked = central.wanted(findings)
        figures.host_s += merged - began
        figures.center_s += time.process_time() - merged
        figures.sent.append(sum(map(len, messages)))
        if second > 1:
            figures.largest = max(figures.largest, *map(len, messages))

        confirmed = central.is_confirmed(findings)
        figures.verdict = findings[0].headline if confirmed else figures.verdict
        if confirmed and figures.delay_s is None and late and findings[0].ranks == late:
            figures.delay_s = second + 1 - seconds // 2

    return figures


class Host:
    """The aggregator of a host without its connections and store.

    Args:
        cluster: the cluster.
        first: its first rank.
    """

    def __init__(self, cluster: Cluster, first: int) -> None:
        self.name = cluster.host_of(first)
        self._ranks = range(first, min(first + cluster.per_host, cluster.ranks))
        self._merger, self._packer = HostMerger(self.name, cluster.ranks), UpdatePacker()

    def message(self, packed: list[bytes], asked: frozenset[int]) -> bytes:
        """Return the message about a second of new rows, by rank."""
        for rank in self._ranks:
            self._merger.add(rank, packed[rank])

        update = self._merger.flush(asked)
        assert update is not None, "a host with steps has an update"
        return self._packer.packed(update)


def unchanged(_own: dict[str, Any], _random: np.random.Generator) -> None:
    """Leave the run without a fault."""


def slow_from(step: int, ranks: tuple[int, ...], ms: float) -> Callable[[dict[str, Any], np.random.Generator], None]:
    """Return a fault that makes the forward pass of some ranks longer from a step on."""

    def fault(own: dict[str, Any], _: np.random.Generator) -> None:
        own["forward"][list(ranks), step:] += ms

    return fault


if __name__ == "__main__":
    sys.exit(main())
