"""Joining of the messages of all hosts: the window and the facts that the rules take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from traceml.database.schema import STEPS
from traceml.database.store.summaries import TableSums
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.intake import RowIntake
from traceml.diagnosis.steps.step_split import Floats
from traceml.diagnosis.steps.window import Ints, Window
from traceml.diagnosis.tree.host_second import HostSecond

__all__ = ["CentralMerger"]

MOST_HOSTS_ASKED = 4
"""If more hosts are late at once, no rows are asked for."""
SECONDS_ASKED = 30
"""Time for which the rows of a host are asked for."""
CLEAR_GAIN = 1.1
"""A finding that gains this much is far from the limits of the rules."""
_SLOTS = 128


class CentralMerger:
    """Takes the messages of hosts, and returns the input of the rules.

    Args:
        world_size: ranks of the job.

    Attributes:
        intake: rows of the ranks that hosts have chosen, and facts of all ranks.
        sums: sums of the steps of all ranks.
    """

    def __init__(self, world_size: int) -> None:
        self.intake = RowIntake(_SLOTS, world_size)
        self.intake.facts.world_size = world_size
        self.sums = TableSums.empty(STEPS)
        self._seconds = 0
        self._asked_until: dict[int, int] = {}
        self._hosts: dict[str, int] = {}
        self._last: list[HostSecond] = []
        self._above = np.zeros((0, _SLOTS), np.float32)
        self._steps = np.full((0, _SLOTS), -1, np.int64)

    @property
    def rows(self) -> int:
        """Number of ranks whose rows are taken now."""
        return sum(len(last.rows) for last in self._last)

    def take(self, seconds: Sequence[HostSecond]) -> None:
        """Take the messages of many hosts, at most one of each."""
        self._seconds += 1
        for second in seconds:
            self._take(second)

        self.intake.flush()
        self.sums = self.sums.join(*(second.sums for second in seconds))

    def wanted(self, findings: Sequence[Finding]) -> frozenset[int]:
        """Return the ranks whose full rows are wanted: those of hosts with late ranks, for some time.

        Where many hosts are late, as below a switch, the typical ranks are enough.
        """
        until = self._seconds + SECONDS_ASKED
        self._asked_until |= dict.fromkeys(self._late_hosts(findings), until)
        self._asked_until = {host: end for host, end in self._asked_until.items() if end > self._seconds}
        return frozenset(rank for host in self._asked_until for rank in self._ranks_of(host))

    def is_confirmed(self, findings: Sequence[Finding]) -> bool:
        """Return whether findings about late ranks are far from a limit, or rest on the rows of all ranks beside them.

        At the limit of a rule these may decide otherwise than a typical rank does: wait for them before you tell.
        """
        gains = [finding.speedup_if_fixed for finding in findings if finding.kind.rule.is_straggler]
        return min(gains, default=CLEAR_GAIN) >= CLEAR_GAIN or all(
            self._ranks_of(host) <= self._last[host].rows.keys() for host in self._late_hosts(findings)
        )

    def _late_hosts(self, findings: Sequence[Finding]) -> list[int]:
        late = {rank for finding in findings if finding.kind.rule.is_straggler for rank in finding.ranks}
        hosts = [host for host in range(len(self._last)) if not late.isdisjoint(self._ranks_of(host))] if late else []
        return hosts if len(hosts) <= MOST_HOSTS_ASKED else []

    def _ranks_of(self, host: int) -> set[int]:
        return {*self._last[host].ordinary, *self._last[host].rows}

    def snapshot(self, last: int) -> tuple[Window, JobFacts]:
        """Return the input of the rules: the newest aligned steps, at most `last`, and the facts."""
        window, facts = self.intake.snapshot(last)
        at = {message.typical: index for index, message in enumerate(self._last)}
        stands_for = {rank: self._stands_for(at[rank]) for rank in window.ranks.tolist() if rank in at}
        typical = [row for row, rank in enumerate(window.ranks.tolist()) if rank in at]
        above = np.zeros((len(window.ranks), len(window)), np.float32)
        above[typical] = self._above_of([at[rank] for rank in window.ranks[typical].tolist()], window.steps)
        latest = self._latest(window)
        return replace(window, stands_for=stands_for, above=above), replace(facts, latest=latest)

    def _take(self, second: HostSecond) -> None:
        index = self._hosts.setdefault(second.host, len(self._hosts))
        window = self.intake.window
        if index == len(self._last):
            self._last.append(replace(second, ordinary=(), rows={}))
            self._grow(index + 1)

        before = self._last[index]
        if second.typical != before.typical:
            self._steps[index] = -1

        for rank in set(before.rows).difference(second.rows):
            window.end(rank)  # its host does not send it any more: the others are not aligned with it

        for rank in {*second.ordinary, *second.rows}.difference(before.ordinary, before.rows):
            self.intake.facts.host(rank, second.host)

        self._last[index] = second
        for rank in second.begins:
            window.clear(rank)

        for rank, data in second.rows.items():
            self.intake.add(STEPS.name, rank, data)

        for rank in second.ended:
            window.end(rank)

        self._put_above(index, second)

    def _stands_for(self, index: int) -> tuple[int, ...]:
        """Return the ordinary ranks of a host without those that have rows of their own."""
        last = self._last[index]
        return tuple(rank for rank in last.ordinary if rank == last.typical or rank not in last.rows)

    def _put_above(self, index: int, second: HostSecond) -> None:
        steps = np.arange(second.first_step, second.first_step + len(second.above_ns))
        at = steps % _SLOTS
        self._above[index, at], self._steps[index, at] = second.above_ns, steps

    def _above_of(self, hosts: Sequence[int], steps: Ints) -> Floats:
        """Return the longest work beyond the typical rank's, host x step; 0 where it is not known."""
        at = np.ix_(np.array(hosts, np.intp), steps % _SLOTS)
        known = (self._steps[at] == steps) & ~np.isnan(self._above[at])
        return np.where(known, self._above[at], np.float32(0))

    def _grow(self, hosts: int) -> None:
        if hosts > len(self._above):
            more = max(hosts, 2 * len(self._above)) - len(self._above)
            self._above = np.concatenate([self._above, np.zeros((more, _SLOTS), np.float32)])
            self._steps = np.concatenate([self._steps, np.full((more, _SLOTS), -1, np.int64)])

    def _latest(self, window: Window) -> tuple[int, ...]:
        """Return the last step of each rank: of an ordinary one that of its typical rank; -1 of a silent host's."""
        latest = np.full(self.intake.facts.world_size, -1, np.int64)
        own = self.intake.window.latest
        for message in self._last:
            if message.typical not in window.missing_ranks:
                latest[[*message.ordinary, *message.ended]] = own[message.typical]

            latest[list(message.rows)] = own[list(message.rows)]

        return tuple(latest.tolist())
