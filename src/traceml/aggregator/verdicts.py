"""The verdict so far: what limits a run while it goes on, told in its store."""

from __future__ import annotations

import logging
import time
from typing import Any

from traceml.aggregator.live import LiveRows
from traceml.database.store import StoreWriter
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.window import Window
from traceml.fail_open import fail_open

__all__ = ["LiveVerdict"]

# One that stays the same is told again this often, as its numbers move.
_REPEAT_S = 5.0
# Of a second, at most this share goes into diagnosing: what takes long is done less often.
_SHARE = 0.25
_AFTER_FAILURE_S = 60.0

# The rules' cost grows with ranks x steps; over a thousand ranks fewer steps tell as much.
_MAX_STEPS, _MIN_STEPS, _MAX_CELLS = 200, 32, 65_536

_log = logging.getLogger("traceml")


class LiveVerdict:
    """Diagnoses a run's windows about once a second.

    Args:
        live: its windows and facts.
    """

    def __init__(self, live: LiveRows) -> None:
        self._live = live
        self._last: tuple[Any, ...] = ()
        self._told_s = self._due_s = 0.0
        self.count = 0
        """How often it was diagnosed."""

    def update(self, store: StoreWriter) -> None:
        """Diagnose if something is new, and tell a verdict that changed, or is older than a few seconds."""
        began_s = time.monotonic()
        if not self._live.fresh or began_s < self._due_s:
            return

        self._live.fresh = False
        self._due_s = began_s + _AFTER_FAILURE_S
        findings: list[Finding] = []
        with fail_open(_log, "aggregator", "the live verdict failed"):
            window, facts = self._live.intake.snapshot(_steps_for(self._live.intake.facts.world_size))
            findings = diagnose(window, facts)

        if not findings:
            return

        self.count += 1
        now_s = time.monotonic()
        self._due_s = now_s + (now_s - began_s) * (1 / _SHARE - 1) if now_s - began_s > _SHARE else 0.0
        verdict = findings[0]
        signature = (verdict.kind, verdict.ranks, verdict.phase)
        if signature != self._last or now_s - self._told_s >= _REPEAT_S:
            self._last, self._told_s = signature, now_s
            store.event("verdict", _told(findings, window))


def _steps_for(ranks: int) -> int:
    return max(_MIN_STEPS, min(_MAX_STEPS, _MAX_CELLS // max(ranks, 1)))


def _told(findings: list[Finding], window: Window) -> dict[str, Any]:
    told = [finding.to_dict() for finding in findings]
    return {"verdict": told[0], "findings": told, "step": int(window.steps[-1]) if len(window) else None}
