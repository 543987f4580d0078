"""Plain words for verdicts, phases and ends of ranks."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from traceml.diagnosis.findings import Finding
from traceml.formatting import count_text, percent_text
from traceml.runs.report_types import RankSection, TrackerSection

__all__ = ["end_of_rank", "headline", "phase_label", "ranks_text", "short_label", "signal_name", "tracker_text"]

# Phase -> (its name in a table, where a rank is slow when it is slow there). Other names are the user's own phases.
_PHASES = {
    "input_wait": ("input", "loading data"),
    "h2d": ("h2d", "copying to the device"),
    "forward": ("forward", "forward"),
    "backward": ("backward", "backward"),
    "optimizer": ("optimizer", "the optimizer"),
    "comm": ("comm", "communication"),
    "checkpoint": ("checkpoint", "saving checkpoints"),
    "user": ("user", "its own phases"),
    "other": ("other", "code outside the known phases"),
}


_ERROR_CHARS = 100


def phase_label(phase: str) -> str:
    """Return a phase's name for a column or a bar."""
    return _PHASES.get(phase, (phase, ""))[0]


def short_label(phase: str) -> str:
    """Return a phase's name where there is little room."""
    return {"optimizer": "optim", "checkpoint": "ckpt"}.get(phase, phase_label(phase))


def ranks_text(ranks: Sequence[int], *, most: int = 4) -> str:
    """Return `rank 1`, `ranks 1, 3 and 5`, `ranks 0, 1, 2, 3 and 12 more`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"

    names = [str(rank) for rank in ranks]
    if len(names) > most:
        return f"ranks {', '.join(names[:most])} and {len(names) - most} more"

    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def headline(finding: Finding) -> str:
    """Return a finding in one plain sentence without a full stop."""
    kind, phase, ranks, cost = finding.kind.value, finding.phase, list(finding.ranks), finding.cost_share or None
    if kind.endswith("STRAGGLER"):
        return _straggler(ranks, phase, cost)

    if kind == "RANK_LOST":
        return _lost(ranks, phase, finding.evidence)

    if kind in _SENTENCES:
        return _SENTENCES[kind].format(part=_part(cost), phase=phase_label(phase) if phase else "compute")

    if kind == "RESIDUAL_HEAVY":
        where = f"your phase '{phase}'" if phase and phase not in _PHASES else "code outside the known phases"
        return f"{_part(cost)} goes to {where}"

    return _plain(kind, ranks, phase)


_SENTENCES = {
    "HEALTHY": "Nothing holds this run back",
    "COMPUTE_BOUND": "The model's own compute limits this run, most of it in {phase}",
    "INPUT_BOUND": "Training waits for data: {part}",
    "H2D_BOUND": "Copying to the device holds training back: {part}",
    "COMM_BOUND": "Communication between ranks holds training back: {part}",
    "JITTER": "Some steps take far longer than the rest: {part}",
    "INSUFFICIENT_DATA": "Not enough data for a verdict",
}


def _part(cost: float | None) -> str:
    return "part of each step" if cost is None else f"{percent_text(cost)} of step time"


def _straggler(ranks: list[int], phase: str | None, cost: float | None) -> str:
    who = ranks_text(ranks) if ranks else "one rank"
    are = "is" if len(ranks) < 2 else "are"
    where = "" if phase is None else f" in {_PHASES.get(phase, ('', repr(phase)))[1]}"
    share = "" if cost is None else f", {percent_text(cost)} of step time"
    return f"{who[0].upper()}{who[1:]} {are} slow{where}: the others wait{share}"


def _lost(ranks: list[int], phase: str | None, evidence: Mapping[str, Any]) -> str:
    who = ranks_text(ranks) if ranks else "a rank"
    how = ""
    if (number := evidence.get("signal")) is not None:
        how = f" by {signal_name(int(number))}"
    elif exception := evidence.get("exception"):
        how = f" by {str(exception).splitlines()[0].split(':')[0]}"
    elif (code := evidence.get("exit_code", evidence.get("code"))) is not None:
        how = f" with exit status {code}"

    step = evidence.get("step", evidence.get("last_step"))
    when = "" if step is None else f" at step {count_text(int(step))}"
    where = "" if phase is None else f", in {phase_label(phase)}"
    return f"{who[0].upper()}{who[1:]} ended{how}{when}{where}"


def _plain(kind: str, ranks: list[int], phase: str | None) -> str:
    words = kind.replace("_", " ").capitalize()
    of = f" on {ranks_text(ranks)}" if ranks else ""
    where = f", in {phase_label(phase)}" if phase else ""
    return f"{words}{of}{where}"


def end_of_rank(rank: RankSection) -> str | None:
    """Return how a rank ended badly: `killed by SIGKILL, last step 36, in forward`; None where it did not."""
    if rank.state in ("running", "finished"):
        return None

    end = rank.exit
    text = rank.state
    if end.signal is not None:
        text = f"killed by {signal_name(end.signal)}"
    elif end.exception:
        text = f"failed with {_first_line(end.exception)}"
    elif end.code is not None:
        text = f"{rank.state} with exit status {end.code}"

    when = f", last step {count_text(end.last_step)}" if end.last_step is not None and end.last_step >= 0 else ""
    where = f", in {phase_label(end.open_phase)}" if end.open_phase else ""
    return f"{text}{when}{where}"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "an exception"


def tracker_text(tracker: TrackerSection) -> str:
    """Return the state of a tracker: `mlflow 12,340 delivered, 20 wait: refused the connection`."""
    parts = [f"{count_text(tracker.delivered)} delivered"]
    if tracker.fallback:
        parts.append(f"{count_text(min(tracker.fallback, tracker.delivered))} of them to its fallback")

    if tracker.pending:
        parts.append(f"{count_text(tracker.pending)} wait{'s' if tracker.pending == 1 else ''}")

    if tracker.failed:
        parts.append(f"{count_text(tracker.failed)} refused")

    error = tracker.error if len(tracker.error) <= _ERROR_CHARS else f"{tracker.error[:_ERROR_CHARS]}..."
    what = {"unauthorized": "not let in", "broken": "cannot work"}.get(tracker.state, "")
    why = ": ".join(text for text in (what, error) if text)
    return f"{tracker.backend} {', '.join(parts)}" + (f" ({why})" if why else "")
