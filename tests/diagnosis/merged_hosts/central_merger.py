"""The center without its connections: joins the messages of all hosts, as `RelayedHosts` does with those of peers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from traceml.database.schema import STEPS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.intake import RowIntake
from traceml.diagnosis.merged_hosts.host_merger import HostUpdate
from traceml.diagnosis.merged_hosts.row_requests import RowRequests
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.representatives import HostChoice

__all__ = ["CentralMerger"]

_SLOTS = 128


class CentralMerger:
    """Takes the updates of hosts, and returns the input of the rules.

    Args:
        world_size: ranks of the job.

    Attributes:
        intake: rows of the ranks that hosts have chosen, and facts of all ranks.
    """

    def __init__(self, world_size: int) -> None:
        self.intake = RowIntake(_SLOTS, world_size)
        self.intake.facts_builder.world_size = world_size
        self._requests = RowRequests()

    @property
    def rows(self) -> int:
        """Number of ranks whose rows are taken now."""
        return sum(len(choice.sent) for choice in self.intake.kept.representatives.choices)

    def take(self, updates: Iterable[HostUpdate]) -> None:
        """Take the updates of many hosts, at most one of each."""
        for update in updates:
            self._take(update)

        self.intake.flush()

    def choice_of(self, host: str) -> HostChoice | None:
        """Return the last choice of a host; None before there is one."""
        return self.intake.kept.representatives.choice_of(host)

    def wanted(self, findings: Sequence[Finding]) -> frozenset[int]:
        """Return the ranks whose full rows are wanted; see `RowRequests`."""
        return self._requests.wanted(findings, self.intake.kept.representatives)

    def is_confirmed(self, findings: Sequence[Finding]) -> bool:
        """Return whether findings can be told; see `RowRequests`."""
        return self._requests.is_confirmed(findings, self.intake.kept.representatives)

    def snapshot(self, last: int) -> tuple[AlignedSteps, JobFacts]:
        """Return the input of the rules: the newest aligned steps, at most `last`, and the facts."""
        return self.intake.snapshot(last)

    def _take(self, update: HostUpdate) -> None:
        kept, choice = self.intake.kept, update.choice
        before = kept.representatives.choice_of(choice.host)
        if kept.representatives.take(choice):
            self._name_host(choice, before)

        kept.representatives.add(choice.host, update.above)
        for rank in set(choice.sent).difference(() if before is None else before.sent):
            kept.clear(rank)

        for rank, data in update.rows.items():
            self.intake.add(STEPS.name, rank, data)

        for rank in choice.ended:
            kept.end(rank)

    def _name_host(self, choice: HostChoice, before: HostChoice | None) -> None:
        for rank in choice.alive.difference(() if before is None else before.alive):
            self.intake.facts_builder.host(rank, choice.host)
