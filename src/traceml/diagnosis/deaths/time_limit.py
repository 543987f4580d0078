"""Jobs that the scheduler ended at their time limit, and the steps that an end loses."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from traceml.diagnosis.deaths.end_words import step_text
from traceml.diagnosis.facts.job_facts import JobFacts, RankExit
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import plural
from traceml.process_ends import signal_name

__all__ = ["at_time_limit", "lost_steps", "lost_steps_text"]

# A scheduler ends a job at its limit, and may warn it before: Slurm with --signal=USR1@120.
_EARLY_S = {
    signal.SIGTERM: 60.0,
    signal.SIGKILL: 30.0,
    signal.SIGXCPU: 60.0,
    signal.SIGUSR1: 900.0,
    signal.SIGUSR2: 900.0,
}


def at_time_limit(bad: Sequence[RankExit], causes: Sequence[RankExit], facts: JobFacts) -> list[Finding]:
    """Return the finding about a job that was ended at its time limit; empty where another cause came before.

    Args:
        bad: the ends that are failures.
        causes: those that caused the others.
        facts: about the job, with the time limit.
    """
    ended = [each for each in causes or bad if _is_at_limit(each, facts.job_end_s)]
    if not ended or len(ended) < len(causes or bad):
        return []

    last = max(ended, key=lambda each: each.last_step or 0)
    lost = lost_steps(last, facts.exits)
    return [
        Finding(
            kind=Kind.RANK_LOST,
            severity=Kind.RANK_LOST.severity_for(0.0),
            ranks=(),
            phase=last.open_phase,
            summary=f"The scheduler ended the job at its time limit ({_signal_text(last)}){step_text(last)}"
            f"{lost_steps_text(lost)}.",
            next=(
                "Ask for more time, and go on from the last checkpoint. To lose fewer steps, save when the scheduler "
                "warns: sbatch --signal=USR1@120 sends a signal two minutes before the end."
            ),
            evidence=_evidence(last, lost),
            cost_share=1.0,
        )
    ]


def lost_steps(ended: RankExit, exits: Sequence[RankExit]) -> int | None:
    """Return the steps that ended since the last checkpoint of any rank; None where none was saved."""
    saved = max((each.saved_steps for each in exits if each.saved_steps is not None), default=None)
    if saved is None or ended.last_step is None:
        return None

    return max(ended.last_step + 1 - saved, 0)


def lost_steps_text(lost: int | None) -> str:
    """Return what a sentence says of lost steps; empty where there are none, or that is not known."""
    if not lost:
        return ""

    return f"; {plural(lost, 'step')} since the last checkpoint {'is' if lost == 1 else 'are'} lost"


def _is_at_limit(ended: RankExit, job_end_s: float | None) -> bool:
    # Ranks that did not report are ended by SIGKILL, which comes last.
    number = ended.signal if ended.signal is not None else signal.SIGKILL if ended.state == "lost" else None
    if job_end_s is None or number not in _EARLY_S or ended.at_s is None or ended.oom:
        return False

    return ended.at_s >= job_end_s - _EARLY_S[signal.Signals(number)]


def _signal_text(ended: RankExit) -> str:
    return signal_name(ended.signal or signal.SIGKILL)


def _evidence(ended: RankExit, lost: int | None) -> dict[str, object]:
    known = {
        "cause": "time_limit",
        "signal": ended.signal,
        "step": ended.open_step if ended.open_step is not None else ended.last_step,
        "last_step": ended.last_step,
        "lost_steps": lost,
    }
    return {key: value for key, value in known.items() if value is not None}
