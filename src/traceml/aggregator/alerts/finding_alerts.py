"""Alerts of findings that persist: each once per run, to the targets of the setting `on_finding`."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.alerts.alert_targets import AlertTarget
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.fail_open import fail_open
from traceml.privacy.masker import Masker

__all__ = ["FindingAlerts"]

_SCHEMA = "traceml.alert/1"
_MOST, _PER_S = 10, 60.0
_AT_END = (Kind.HANG, Kind.RANK_LOST)

_log = logging.getLogger("traceml")

_Key = tuple[Kind, tuple[int, ...], str | None]


class _RunAlerts(msgspec.Struct):
    """Findings of one run: since when each persists, and those that were sent."""

    since_s: dict[_Key, float] = {}
    sent: set[_Key] = msgspec.field(default_factory=set)


class FindingAlerts:
    """Sends alerts of findings; on the event loop of the aggregator, which continues meanwhile.

    Args:
        targets: receivers; without one nothing is done.
        after_s: time that a finding persists before it is sent.
        masker: masks what is sent to webhooks.
    """

    def __init__(
        self,
        targets: Sequence[AlertTarget],
        after_s: float,
        now_s: Callable[[], float] = time.monotonic,
        masker: Masker | None = None,
    ) -> None:
        self._targets, self._after_s, self._now_s = targets, after_s, now_s
        self._masker = masker or Masker()
        self._runs: dict[ActiveRun, _RunAlerts] = {}
        self._recent: deque[float] = deque(maxlen=_MOST)
        self._tasks: dict[asyncio.Task[None], Path] = {}

    def check(self, run: ActiveRun, findings: Sequence[Finding]) -> None:
        """Take the findings of a running run, and send those that have persisted for long enough.

        Args:
            findings: all that were found last; one that is missing no longer persists.
        """
        if not self.has_targets:
            return

        known, now_s = self._runs.setdefault(run, _RunAlerts()), self._now_s()
        present = {_key(each): each for each in findings if each.severity is not Severity.INFO}
        known.since_s = {key: known.since_s.get(key, now_s) for key in present}
        for key, finding in present.items():
            if now_s - known.since_s[key] >= self._after_s:
                self._send_once(run, known, finding)

    def check_end(self, run: ActiveRun, findings: Sequence[Finding]) -> None:
        """Send what is known only now, or now for sure: a run that is over hung, or lost a rank."""
        if not self.has_targets:
            return

        known = self._runs.setdefault(run, _RunAlerts())
        for finding in findings:
            if finding.kind in _AT_END and not any(kind is finding.kind for kind, *_ in known.sent):
                self._send_once(run, known, finding, is_last=True)

    def is_sending(self, path: Path) -> bool:
        """Whether an alert of the run in this folder is on its way."""
        return path in self._tasks.values()

    @property
    def has_targets(self) -> bool:
        """Whether anyone is notified of findings."""
        return bool(self._targets)

    @property
    def is_busy(self) -> bool:
        """Whether any alert is on its way."""
        return bool(self._tasks)

    def forget(self, run: ActiveRun) -> None:
        """Forget a run that is over."""
        self._runs.pop(run, None)

    async def close(self, timeout_s: float) -> None:
        """Wait for alerts that are on their way, then give them up: commands are killed."""
        if self._tasks:
            _, late = await asyncio.wait(list(self._tasks), timeout=timeout_s)
            for task in late:
                task.cancel()

            await asyncio.gather(*late, return_exceptions=True)

    def _send_once(self, run: ActiveRun, known: _RunAlerts, finding: Finding, *, is_last: bool = False) -> None:
        """Send a finding unless it was sent, or too many were sent just now: then it is tried again.

        Args:
            is_last: whether there is no later try: then the number does not matter.
        """
        key, now_s = _key(finding), self._now_s()
        are_many = len(self._recent) == _MOST and now_s - self._recent[0] < _PER_S
        if key in known.sent or (are_many and not is_last):
            return

        known.sent.add(key)
        self._recent.append(now_s)
        document = _document(run, finding)
        whole, masked = (json.dumps(each).encode() for each in (document, self._masker.mask_mapping(document)))
        for target in self._targets:
            task = asyncio.create_task(self._send(run, finding, target, masked if target.is_masked else whole))
            self._tasks[task] = run.path
            task.add_done_callback(self._tasks.pop)

    async def _send(self, run: ActiveRun, finding: Finding, target: AlertTarget, document: bytes) -> None:
        error = "the aggregator ended before it was delivered"
        try:
            with fail_open(_log, "aggregator", f"the alert {finding.kind} of run {run.id} was not delivered"):
                try:
                    await target.send(document)
                    error = ""
                except Exception as failure:
                    error = str(failure)
                    raise
        finally:
            self._note(run, finding, target, error)

    def _note(self, run: ActiveRun, finding: Finding, target: AlertTarget, error: str) -> None:
        """Store an event about an alert, in a run that is not over."""
        _log.info("alert %s of run %s to %s: %s", finding.kind, run.id, target.name, error or "delivered")
        if not run.ended:
            with fail_open(_log, "aggregator", "an alert is not recorded"):
                run.store.event("alert", {"kind": str(finding.kind), "target": target.name, "error": error})


def _key(finding: Finding) -> _Key:
    return finding.kind, finding.ranks, finding.phase


def _document(run: ActiveRun, finding: Finding) -> dict[str, Any]:
    """Return an alert as JSON data; `text` is what chat programs show."""
    return {
        "schema": _SCHEMA,
        "text": f"{finding.kind} in run {run.id}: {finding.headline}. {finding.next}",
        "run": {"id": run.id, "path": str(run.path), **run.about},
        "host": socket.gethostname(),
        "time": time.time(),
        "finding": finding.to_dict(),
    }
