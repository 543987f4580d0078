"""Requests for the rows of all ranks of a host, where a finding is near the limit of a rule."""

from __future__ import annotations

from collections.abc import Sequence

from traceml.diagnosis.findings import Finding
from traceml.diagnosis.steps.representatives import HostChoice, Representatives

__all__ = ["RowRequests"]

MAX_HOSTS_ASKED = 4
"""If more hosts are late at once, no rows are asked for."""
SECONDS_ASKED = 30
"""Time for which the rows of a host are asked for."""
CLEAR_GAIN = 1.1
"""A finding that gains this much is far from the limits of the rules."""


class RowRequests:
    """Decides which hosts are asked for the rows of all their ranks, and which findings wait for them."""

    def __init__(self) -> None:
        self._seconds = 0
        self._asked_until: dict[str, int] = {}

    def wanted(self, findings: Sequence[Finding], representatives: Representatives) -> frozenset[int]:
        """Return the ranks whose full rows are wanted: those of hosts with late ranks, for some time.

        Where many hosts are late, as below a switch, the typical ranks are enough. Call it once a second.
        """
        self._seconds += 1
        until = self._seconds + SECONDS_ASKED
        self._asked_until |= {choice.host: until for choice in _late_hosts(findings, representatives)}
        self._asked_until = {host: end for host, end in self._asked_until.items() if end > self._seconds}
        choices = (representatives.choice_of(host) for host in self._asked_until)
        return frozenset(rank for choice in choices if choice is not None for rank in choice.alive)

    @staticmethod
    def is_confirmed(findings: Sequence[Finding], representatives: Representatives) -> bool:
        """Return whether findings about late ranks are far from a limit, or based on rows of all ranks of their hosts.

        At the limit of a rule these may decide otherwise than a typical rank does: wait for them before you decide.
        """
        gains = [finding.speedup_if_fixed for finding in findings if finding.blames_ranks]
        return min(gains, default=CLEAR_GAIN) >= CLEAR_GAIN or all(
            choice.alive <= set(choice.sent) for choice in _late_hosts(findings, representatives)
        )


def _late_hosts(findings: Sequence[Finding], representatives: Representatives) -> list[HostChoice]:
    late = {rank for finding in findings if finding.blames_ranks for rank in finding.ranks}
    hosts = [choice for choice in representatives.choices if not late.isdisjoint(choice.alive)] if late else []
    return hosts if len(hosts) <= MAX_HOSTS_ASKED else []
