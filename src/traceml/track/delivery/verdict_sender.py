"""The verdict of a run as tag, text and facts of an experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from traceml.database.states import RunStatus
from traceml.database.store.reader import RunEvent
from traceml.diagnosis.kinds import Kind
from traceml.run_folder import REPORT_NAME
from traceml.track.delivery.delivery_plan import PlannedExperiment
from traceml.track.delivery.refusals import refusal_counted
from traceml.track.delivery.tracker_session import Delivery
from traceml.trusted_files import read_regular

__all__ = ["has_report", "send_live_verdict", "send_verdict"]


def send_live_verdict(delivery: Delivery, main: PlannedExperiment, event: RunEvent) -> None:
    """Send a live verdict if it names another cause than the last one."""
    verdict = event.data.get("verdict") or {}
    if _has_no_step(verdict):
        return

    signature = [verdict.get("kind"), verdict.get("ranks"), verdict.get("phase")]
    if signature == delivery.state.resume.get("verdict") or not _is_wanted(delivery, main):
        return

    delivery.state.resume["verdict"] = signature
    text = f"{verdict.get('kind')}: {verdict.get('summary', '')} {verdict.get('next', '')}".strip()
    with refusal_counted(delivery.state, "a verdict"):
        delivery.session.tags(main, {"traceml/verdict": str(verdict.get("kind"))})
        delivery.session.text(main, "traceml/verdict", text, max(int(event.data.get("step") or 0), 0))
        delivery.audit.record("tags", ["traceml/verdict"], 1)
        delivery.state.derived += 1


def send_verdict(delivery: Delivery, main: PlannedExperiment) -> None:
    """Send the verdict of the whole run from the report, else the last live one."""
    if not _is_wanted(delivery, main):
        return

    verdict = _report_verdict(delivery.run_dir)
    if verdict is None:
        last = delivery.reader.last_event("verdict")
        verdict = (last.data.get("verdict") or {}) if last is not None else {}

    # A run that is resumed has that of its earlier job until it gets another one.
    if verdict.get("kind") and (main.row.get("resume") or not _has_no_step(verdict)):
        facts = {f"traceml/verdict_{name}": verdict[name] for name in ("summary", "next") if verdict.get(name)}
        with refusal_counted(delivery.state, "the verdict"):
            delivery.session.tags(main, {"traceml/verdict": verdict["kind"]})
            if facts:
                delivery.session.facts(main, facts)

            delivery.audit.record("tags", ["traceml/verdict", *facts], 1)


def has_report(run_dir: Path, since_s: float) -> bool:
    """Return whether a run's report was written at or after a time, in epoch seconds."""
    try:
        return (run_dir / REPORT_NAME).stat().st_mtime >= since_s
    except OSError:
        return False


def _is_wanted(delivery: Delivery, main: PlannedExperiment) -> bool:
    return delivery.rules.of(main).filters.takes("traceml/verdict")


def _report_verdict(run_dir: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(read_regular(run_dir / REPORT_NAME))
        verdict: dict[str, Any] = report["verdict"]
        return verdict if report["run"]["state"] != RunStatus.RUNNING else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_no_step(verdict: dict[str, Any]) -> bool:
    """Whether a verdict only reports that no step was traced, as for a run that only logs."""
    return verdict.get("kind") == Kind.INSUFFICIENT_DATA and (verdict.get("evidence") or {}).get("steps") == 0
