"""The finding `HANG`."""

from __future__ import annotations

from typing import Any

import numpy as np

from traceml.database.snapshots import RankSnapshot
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.progress.step_sequences import DivergedRanks
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.hangs.blame import HangCause
from traceml.diagnosis.hangs.hang_advice import hang_advice
from traceml.diagnosis.hangs.hang_detection import DetectedHang, detect_hang
from traceml.diagnosis.hangs.hang_words import failed_thread, hang_summary, operation_text
from traceml.diagnosis.hangs.rank_state import awaited_thread, blocked_worker, doing, gil_holder, user_line
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.steps.aligned_steps import AlignedSteps

__all__ = ["hang"]

_S = 1e9
# Ranks that were to meet in a collective: what they had called before tells where they diverged.
_OF_COLLECTIVES = (
    HangCause.NEVER_CAME, HangCause.DATA_ENDED, HangCause.ALONE, HangCause.ENDED, HangCause.MISMATCH, HangCause.SIZES,
    HangCause.ROOTS, HangCause.CIRCLE,
)  # fmt: skip


def hang(window: AlignedSteps, facts: JobFacts) -> list[Finding]:
    """Return the finding about a job that hangs, or has hung when it was ended.

    Args:
        window: steps of the job, which show how long they take.
    """
    # The last step may be the one that hung, and that the end of the job has closed.
    times = window.total[:, :-1]
    p99_s = float(np.quantile(times, 0.99)) / _S if times.size else 0.0
    found = detect_hang(facts, p99_s)
    if found is None:
        return []

    diverged = facts.progress.diverged if facts.progress is not None and found.blame.cause in _OF_COLLECTIVES else None
    return [_finding(found, diverged)]


def _finding(found: DetectedHang, diverged: DivergedRanks | None) -> Finding:
    named = found.blame.ranks
    first = next((found.snapshots[rank] for rank in named if rank in found.snapshots), None)
    shown = first or (None if named else next(iter(found.snapshots.values())))
    phase = shown.phase if shown is not None and shown.phase else None
    return Finding.of(
        Kind.HANG,
        ranks=named,
        phase=phase,
        summary=hang_summary(found) + (f" {diverged.text}" if diverged is not None else ""),
        next=hang_advice(found),
        evidence=_evidence(found, shown) | ({} if diverged is None else {"apart_since_step": diverged.since}),
        cost_share=1.0,
    )


def _evidence(found: DetectedHang, shown: RankSnapshot | None) -> dict[str, Any]:
    worker = blocked_worker(shown) if shown is not None else None
    thread = (awaited_thread(shown) or gil_holder(shown)) if shown is not None else None
    line = user_line(worker) if worker is not None and user_line(worker) is not None else None
    line = line or (thread.line if thread is not None else None) or (user_line(shown) if shown is not None else None)
    failed = failed_thread(found)
    operation, seen = found.blame.operation, shown.seen_line if shown is not None else None
    return known_facts(
        cause=str(found.blame.cause),
        quiet_s=round(found.quiet_s, 1),
        busy=found.is_busy or None,
        batches=max(found.blame.data.batches) if found.blame.data is not None else None,
        batches_of_others=min(found.blame.data.others) if found.blame.data is not None else None,
        file=line.file if line else None,
        line=line.line if line else None,
        function=line.function if line else None,
        seen=f"{seen.file}:{seen.line} {seen.function}" if line is None and seen is not None else None,
        step=shown.step if shown is not None and shown.step >= 0 else None,
        operation=(operation_text(operation) or None) if operation is not None else None,
        sizes=list(operation.sizes) or None if operation is not None else None,
        waiting=sorted(set(found.blame.waits) - set(found.blame.ranks)) or None,
        answered=shown.answered if shown is not None else None,
        process_state=(shown.process_state or None) if shown is not None else None,
        state=(doing(shown) or None) if shown is not None else None,
        worker=worker.pid if worker is not None else None,
        thread=(thread.name or None) if thread is not None else None,
        failed_thread=failed[1].name if failed is not None else None,
        thread_exception=failed[1].exception if failed is not None else None,
        blocker=shown.blocker.pid if shown is not None and shown.blocker is not None else None,
    )
