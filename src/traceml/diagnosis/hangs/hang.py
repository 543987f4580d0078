"""The finding `HANG`."""

from __future__ import annotations

from typing import Any

import numpy as np

from traceml.database.snapshots.rank_snapshot import RankSnapshot, user_line
from traceml.diagnosis.advice import STORE_OF_ITS_OWN
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.progress.step_sequences import DivergedRanks
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.hangs.blame import HangCause
from traceml.diagnosis.hangs.hang_advice import hang_advice
from traceml.diagnosis.hangs.hang_detection import DetectedHang, detect_hang
from traceml.diagnosis.hangs.hang_wording import are_apart, failed_thread, handling_rank, hang_summary, operation_text
from traceml.diagnosis.hangs.rank_state import awaited_thread, blocked_worker, doing, gil_holder
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.steps.aligned_steps import AlignedSteps

__all__ = ["hang"]

_S = 1e9
# Of ranks that were to meet in a collective, what they had called before tells where they diverged.
_NOT_MEETING = (HangCause.NETWORK, HangCause.RENDEZVOUS, HangCause.STUCK, HangCause.UNANSWERED)


def hang(window: AlignedSteps, facts: JobFacts) -> Finding | None:
    """Return the finding about a job that hangs, or has hung when it was ended."""
    # The last step may be the one that hung, and that the end of the job has closed.
    times = window.total[:, :-1]
    p99_s = float(np.quantile(times, 0.99)) / _S if times.size else 0.0
    found = detect_hang(facts, p99_s)
    if found is None:
        return None

    diverged = None if facts.progress is None or found.blame.cause in _NOT_MEETING else facts.progress.diverged
    return _finding(found, diverged, facts)


def _finding(found: DetectedHang, diverged: DivergedRanks | None, facts: JobFacts) -> Finding:
    shown = next(iter(found.stuck), None)
    phase = shown.phase if shown is not None and shown.phase else None
    has_old_store = found.blame.cause is HangCause.RENDEZVOUS and facts.store_restarts > 0
    return Finding.of(
        Kind.HANG,
        ranks=found.blame.ranks,
        phase=phase,
        summary=hang_summary(found) + (f" {diverged.text}" if diverged is not None else ""),
        next=STORE_OF_ITS_OWN if has_old_store else hang_advice(found),
        evidence=_evidence(found, shown) | ({} if diverged is None else {"apart_since_step": diverged.since}),
        cost_share=1.0,
    )


def _evidence(found: DetectedHang, shown: RankSnapshot | None) -> dict[str, Any]:
    data, operation = found.blame.data, found.blame.operation
    handling, (_, failed) = handling_rank(found), failed_thread(found) or (0, None)
    return known_facts(
        cause=str(found.blame.cause),
        quiet_s=round(found.quiet_s, 1),
        busy=found.is_busy or None,
        waiting=sorted(set(found.blame.waits) - set(found.blame.ranks)) or None,
        **({} if data is None else data.evidence),
        operation=(operation_text(operation) or None) if operation is not None else None,
        sizes=(list(operation.sizes) or None) if operation is not None else None,
        failed_thread=failed.name if failed is not None else None,
        thread_exception=failed.exception if failed is not None else None,
        handled_exception=handling.handled if handling is not None else None,
        exception=found.raised.exception if found.raised is not None else None,
        **({} if shown is None else _of_snapshot(shown)),
        **({"first_rank": shown.rank} if shown is not None and are_apart(found) else {}),
    )


def _of_snapshot(shown: RankSnapshot) -> dict[str, Any]:
    """Return what the snapshot of the named rank shows: its line, or that of what it waits for, and its state."""
    worker, thread = blocked_worker(shown), awaited_thread(shown) or gil_holder(shown)
    line = user_line(worker) if worker is not None else None
    line = line or (thread.line if thread is not None else None) or user_line(shown)
    evidence = known_facts(
        step=shown.step if shown.step >= 0 else None,
        answered=shown.answered,
        process_state=shown.process_state or None,
        state=doing(shown) or None,
        worker=worker.pid if worker is not None else None,
        thread=(thread.name or None) if thread is not None else None,
        blocker=(shown.blocker.pid or None) if shown.blocker is not None else None,
    )
    if line is not None:
        return evidence | {"file": line.file, "line": line.line, "function": line.function}

    seen = shown.seen_line
    return evidence | ({} if seen is None else {"seen": f"{seen.file}:{seen.line} {seen.function}"})
