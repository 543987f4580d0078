"""Live verdict: the diagnosis of a running run, stored as events."""

from __future__ import annotations

import logging
import time
from typing import Any

from traceml.aggregator.live_rows import LiveRows
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.insufficient_data import awaits_rows
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.merged_hosts.host_merger import STEPS_COMPARED
from traceml.diagnosis.merged_hosts.row_requests import RowRequests
from traceml.diagnosis.ruleset import diagnose, is_newest_part
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.fail_open import fail_open

__all__ = ["LiveVerdict"]

# A verdict of the same kind, ranks and phase is stored again after this time, as its numbers change.
_REPEAT_S = 5.0
# At most this share of a core is spent on diagnosis: the more it computes, the less often it runs.
_SHARE = 0.25
_AFTER_FAILURE_S = 60.0

# A host that does not send the rows that it is asked for does not hold up the verdict for more diagnoses than these.
_LONGEST_UNCONFIRMED = 5

_log = logging.getLogger("traceml")


class LiveVerdict:
    """Diagnoses the window of a run about once per second."""

    def __init__(self, live: LiveRows) -> None:
        self._live = live
        self._last: tuple[Any, ...] = ()
        self._stored_s = self._due_s = 0.0
        self._newest: dict[str, Any] | None = None  # event of a verdict that is not stored yet
        self.count = 0
        """Number of diagnoses."""
        self.findings: list[Finding] = []
        """All findings of the last diagnosis."""
        self.wanted: frozenset[int] = frozenset()
        """Ranks whose rows the hosts are asked for, where hosts are merged."""
        self._requests, self._unconfirmed = RowRequests(), 0

    @property
    def is_hang(self) -> bool:
        """Whether the last verdict is that the job hangs."""
        return bool(self.findings) and self.findings[0].kind is Kind.HANG

    def update(self, store: StoreWriter) -> None:
        """Diagnose if there are new rows, and store a verdict that changed or is older than a few seconds."""
        now_s, began_s = time.monotonic(), time.thread_time()
        may_differ = self._live.fresh or self._live.facts_builder.progress.has_snapshots  # of a rank without progress
        if not may_differ or now_s < self._due_s:
            self._store_newest(store, now_s)  # the rows may have ended with it
            return

        self._live.fresh = False
        self._due_s = now_s + _AFTER_FAILURE_S
        findings: list[Finding] = []
        with fail_open(_log, "aggregator", "the live verdict failed"):
            # Where hosts are merged, those steps are sent of each chosen rank.
            window, facts = self._live.intake.snapshot(STEPS_COMPARED if self._live.representatives else None)
            findings = diagnose(window, facts, self._history(window, facts))

        if not findings:
            return

        self.count += 1
        now_s, used_s = time.monotonic(), time.thread_time() - began_s
        self._due_s = now_s + used_s * (1 / _SHARE - 1) if used_s > _SHARE else 0.0
        if not self._is_confirmed(findings):
            return

        verdict = findings[0]
        self.findings = findings
        self._newest = _event(findings, window)
        awaited = verdict.summary if awaits_rows(verdict) else ""
        signature = (verdict.kind, verdict.ranks, verdict.phase, awaited)
        if signature != self._last:
            self._last, self._stored_s = signature, now_s - _REPEAT_S

        self._store_newest(store, now_s)

    def _store_newest(self, store: StoreWriter, now_s: float) -> None:
        """Store the newest verdict, unless one like it was stored a moment ago: then a later call does."""
        if self._newest is not None and now_s - self._stored_s >= _REPEAT_S:
            event, self._newest, self._stored_s = self._newest, None, now_s
            store.event("verdict", event)

    def _history(self, window: AlignedSteps, facts: JobFacts) -> AlignedSteps:
        """Return steps that are spread over the run if they show more than the window; else the window."""
        history = self._live.intake.history
        if history is None or self._live.representatives or not is_newest_part(window, facts):
            return window

        changed = history.changed()
        return window if changed is None else changed

    def _is_confirmed(self, findings: list[Finding]) -> bool:
        """Ask for the rows that findings near a limit need; return whether they are there, or do not come."""
        if not self._live.representatives:
            return True

        self.wanted = self._requests.wanted(findings, self._live.representatives)
        confirmed = self._requests.is_confirmed(findings, self._live.representatives)
        self._unconfirmed = 0 if confirmed else self._unconfirmed + 1
        return confirmed or self._unconfirmed > _LONGEST_UNCONFIRMED


def _event(findings: list[Finding], window: AlignedSteps) -> dict[str, Any]:
    data = [finding.to_dict() for finding in findings]
    return {"verdict": data[0], "findings": data, "step": int(window.steps[-1]) if len(window) else None}
