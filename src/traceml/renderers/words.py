"""Plain words for verdicts, phases and ends of ranks."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from traceml.formatting import count_text, percent_text

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


def headline(verdict: Mapping[str, Any]) -> str:
    """Return a finding in one plain sentence without a full stop.

    Args:
        verdict: a finding in the shape of the report.
    """
    kind = str(verdict.get("kind") or "INSUFFICIENT_DATA")
    phase = verdict.get("phase")
    ranks = list(verdict.get("ranks") or ())
    cost = verdict.get("cost_share")
    if kind.endswith("STRAGGLER"):
        return _straggler(ranks, phase, cost)

    if kind == "RANK_LOST":
        return _lost(ranks, phase, verdict.get("evidence") or {})

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


def end_of_rank(rank: Mapping[str, Any]) -> str | None:
    """Return how a rank ended, when it did not end well: `killed by SIGKILL at step 37, in forward`.

    Args:
        rank: an entry of the report's `ranks`.
    """
    state = rank.get("state")
    if state in ("running", "finished", None):
        return None

    left = rank.get("exit") or {}
    said = f"{state}"
    if (number := left.get("signal")) is not None:
        said = f"killed by {signal_name(int(number))}"
    elif exception := left.get("exception"):
        said = f"failed with {_first_line(str(exception))}"
    elif (code := left.get("code")) is not None:
        said = f"{state} with exit status {code}"

    step, phase = left.get("last_step"), left.get("open_phase")
    when = f", last step {count_text(int(step))}" if step is not None and int(step) >= 0 else ""
    where = f", in {phase_label(str(phase))}" if phase else ""
    return f"{said}{when}{where}"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "an exception"


def tracker_text(
    backend: str, state: str, delivered: int, pending: int | None, failed: int, error: str, fallback: int = 0
) -> str:
    """Return how a tracker stands: `mlflow 12,340 delivered, 20 wait: refused the connection`."""
    parts = [f"{count_text(delivered)} delivered"]
    if fallback:
        parts.append(f"{count_text(min(fallback, delivered))} of them to its fallback")
    if pending:
        parts.append(f"{count_text(pending)} wait{'s' if pending == 1 else ''}")
    if failed:
        parts.append(f"{count_text(failed)} refused")

    error = error if len(error) <= _ERROR_CHARS else f"{error[:_ERROR_CHARS]}..."
    what = {"unauthorized": "not let in", "broken": "cannot work"}.get(state, "")
    why = ": ".join(text for text in (what, error) if text)
    return f"{backend} {', '.join(parts)}" + (f" ({why})" if why else "")
